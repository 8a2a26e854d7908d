"""How the vLLM scripts start an engine in their own process: on GPUs, and on a CPU."""

import importlib.util
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlab import host
from distlab.errors import UsageError
from distlab.hardware import has_cuda
from distlab.model import read_config

if TYPE_CHECKING:
    from vllm import LLM

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # its attention on CPUs has these
CPU_CACHE_BYTES = {"smoke": 2**26, "laptop": 2**29, "gpu": 2**30}


def add_engine_flags(parser: Any) -> None:
    """--dtype, --max-model-len, and --eager or --no-eager."""
    from argparse import BooleanOptionalAction

    from distlab.script import positive_int

    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-model-len", type=positive_int, default=512, metavar="TOKENS")
    parser.add_argument(
        "--eager", action=BooleanOptionalAction, help="no torch.compile: starts a minute sooner"
    )


@contextmanager
def running(model: Path, args: Namespace, **more: Any) -> Iterator["LLM"]:
    """vLLM's offline engine for the folder `model`, in this process; ended with the block.

    `more` are further arguments of `vllm.LLM`, and win.
    """
    refuse(model, args.max_model_len)
    set_environment()
    warnings.filterwarnings("ignore", category=FutureWarning)  # vLLM's own, of torch
    from vllm import LLM

    llm = LLM(str(model), **{**engine_arguments(args), **more})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        _leave_process_group()


def engine_arguments(args: Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`. On a CPU the cache is told in bytes: vLLM would take half of the
    machine's memory, and end where less than that is free."""
    arguments: dict[str, Any] = {
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "enforce_eager": args.eager,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if not has_cuda():
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES[args.preset]
        arguments["gpu_memory_utilization"] = 0.1  # of the main memory, on a CPU
        arguments["block_size"] = 32  # it takes 128, and only full blocks are ever shared
    return arguments


def set_environment(multiprocessing: bool = False) -> None:
    """The variables that vLLM reads when it is imported. What the user has set stays."""
    wanted = {
        "HF_HUB_OFFLINE": "1",  # the model is a folder: nothing is asked of the network
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing)),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    if not has_cuda():
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = thread_binding()
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def thread_binding() -> str:
    """All cores that this process may use; by itself vLLM leaves one to the server's process.

    `nobind` where OMP_NUM_THREADS asks for fewer threads than there are cores, as tests do: bound
    threads of several programs would wait for the same core.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    wanted = host.threads_asked() or len(cores)
    if not cores or min(wanted, host.usable_cores()) < len(cores):
        return "nobind"
    return ",".join(map(str, cores))


def refuse(model: Path, max_model_len: int) -> None:
    """Name in one line what vLLM would fail at after half a minute."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "this Python has no vLLM; run it with the one that "
            "`python3 scripts/lab.py env vllm` builds and prints"
        )
    config = read_config(model)
    if config.dim_per_head not in CPU_HEADS and not has_cuda():
        raise UsageError(
            f"--model {model} has heads of {config.dim_per_head} dimensions, and vLLM's attention "
            f"on a CPU has kernels for {', '.join(map(str, CPU_HEADS))}; use another model"
        )
    if max_model_len > config.max_position_embeddings:
        raise UsageError(
            f"--max-model-len {max_model_len} is more than the model's "
            f"{config.max_position_embeddings} positions; use at most those"
        )


def _leave_process_group() -> None:
    """A process that ends inside its group of one is warned of by torch."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
