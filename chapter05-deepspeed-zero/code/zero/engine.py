"""DeepSpeed's engine as this chapter uses it: begun in a job that has met, quiet, and counted.

    engine = begin(model, config, job)
    loss = engine(inputs, targets=targets)
    engine.backward(loss)
    engine.step()

`import deepspeed` reads the environment and looks for compilers, so it is done here, in `begin`,
after the reader's flags have been refused or taken.
"""

import copy
import io
import json
import logging
import math
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distlab.errors import UsageError
from distlab.measure import tensor_bytes
from distlab.model import Llama, config_from_args, model_from_args
from distlab.runtime import Runtime
from zero import operators

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NEVER = 10**9  # steps: the engine does not print
PARTITIONS = (  # where the optimizer has its gradients, in stages 1 and 2, and in 3
    "averaged_gradients", "all_grad_tensors",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
)  # fmt: skip
OFFLOADED = ("offload_optimizer", "offload_param")
REFUSALS = (  # DeepSpeed's, of a config
    AssertionError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    ImportError, NotImplementedError,
)  # fmt: skip


def load() -> Any:
    """`import deepspeed`, as this chapter wants it: on this device, and without a word.

    On a CPU its back end would compile an all-reduce over shared memory (a minute, at first use),
    which only its inference calls; it is told that this machine cannot have it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls what torch 2.13 renamed, and broadcasts tied weights as parameters.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
    warnings.filterwarnings("ignore", message="c10d::broadcast_: an autograd kernel")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    compatible = deepspeed.ops.__compatible_ops__
    compatible["deepspeed_shm_comm"] = False
    return deepspeed


def join(job: Runtime) -> Any:
    """DeepSpeed, in the process group that this job has already."""
    deepspeed = load()
    os.environ.setdefault("LOCAL_RANK", str(job.local_rank))  # srun does not set it
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend=job.backend, dist_init_required=False, verbose=False
        )
    return deepspeed


def begin(
    model: nn.Module, config: Mapping[str, Any], job: Runtime, parameters: Any = None,
    optimizer: Any = None, flag: str = "--config",
) -> Any:  # fmt: skip
    """An engine for `model`; `parameters` are groups for the config's optimizer, or all of them.

    Raises `UsageError` that names `flag` where the config wants an operator that is not built.
    """
    load_operators(config, job, flag)
    deepspeed = join(job)
    with redirect_stdout(io.StringIO()):  # it prints which process groups experts get
        engine, *_ = deepspeed.initialize(
            model=model, config=copy.deepcopy(dict(config)), optimizer=optimizer,
            model_parameters=None if optimizer else parameters or model.parameters(),
            dist_init_required=False,
        )  # fmt: skip
    return engine


@contextmanager
def refusing(flag: str, path: str | Path) -> Iterator[None]:
    """One line for what DeepSpeed says of a config as it begins, where no check found it before."""
    try:
        yield
    except REFUSALS as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"{flag} {path}: DeepSpeed refuses it ({type(error).__name__}: {why}); correct that, "
            f"or compare it with a file of {CONFIGS.name}/"
        ) from error


def load_operators(config: Mapping[str, Any], job: Runtime, flag: str) -> None:
    """On a GPU DeepSpeed compiles its own, since which ones depends on the card."""
    if job.device.type != "cpu":
        return
    load()
    zero = config.get("zero_optimization", {})
    devices = [(zero.get(part) or {}).get("device", "none") for part in OFFLOADED]
    torchs = config.get("optimizer", {}).get("params", {}).get("torch_adam", False)
    if devices[0] in ("cpu", "nvme") and not torchs:
        operators.use(operators.CPU_ADAM, flag=flag)
    if "nvme" in devices:
        operators.use(operators.PINNED, operators.ASYNC_IO, flag=flag)


def read_config(path: str | Path, flag: str = "--config") -> dict[str, Any]:
    """A config file's content. Raises `UsageError` for a file that is none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        config = json.loads(text, object_pairs_hook=_each_once)
    except FileNotFoundError:
        shipped = ", ".join(sorted(file.name for file in CONFIGS.glob("*.json")))
        raise UsageError(
            f"{flag} {path}: there is no such file; {CONFIGS.name}/ has {shipped}"
        ) from None
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}; name a readable JSON file") from None
    except (ValueError, RecursionError) as error:  # also of another encoding, and of huge numbers
        why = str(error).partition(";")[0]
        raise UsageError(
            f"{flag} {path} is no JSON in UTF-8: {why}; compare it with a file of {CONFIGS.name}/"
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"{flag} {path} holds a {type(config).__name__}; a config is an object")
    return config


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A section; Python would keep the last of two keys of one name, without a word."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the key {twice!r} stands twice in a section")
    return dict(pairs)


def stage_config(
    stage: int, sequences: int, *, accumulate: int = 1, learning_rate: float = 1e-3,
    dtype: str = "float32", clip: float = 0.0, **zero: Any,
) -> dict[str, Any]:  # fmt: skip
    """The least that a config needs: `sequences` are a rank's in a micro-batch."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": sequences,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "optimizer": {
            "type": "AdamW",
            "params": {  # without a decay CPUAdam has 0, torch's 0.01
                "lr": learning_rate,
                "weight_decay": 0.01,
                "torch_adam": True,
            },
        },
        "zero_optimization": {"stage": stage, **zero},
        "steps_per_print": NEVER,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    return config


FILLED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "lr", "weight_decay", "bf16.enabled", "fp16.enabled", "ZeRO's sizes",
)  # fmt: skip
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def fill(config: Mapping[str, Any], args: Namespace, job: Runtime) -> dict[str, Any]:
    """The config with each "auto" of `FILLED` replaced by what the flags say, and those of ZeRO's
    sizes left out, so that DeepSpeed's own hold.

    Raises `UsageError` where it has a number of its own that contradicts a flag.
    """
    where = f"--config {args.config}:"
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UsageError(f'{where} zero_optimization {zero!r} is no section; write {{"stage": 2}}')
    flags: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("--batch-size", args.batch_size),
        "gradient_accumulation_steps": ("--accumulate", args.accumulate),
        "gradient_clipping": ("--clip", args.clip),
        "lr": ("--learning-rate", args.learning_rate),
        "weight_decay": ("--weight-decay", args.weight_decay),
    }

    def filled(section: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in section.items():
            if isinstance(value, dict):
                found[key] = filled(value)
                if found[key].get("enabled") == "auto" and key in DTYPES:
                    found[key]["enabled"] = args.dtype == DTYPES[key]
                continue
            if value == "auto" and (key.startswith("stage3_") or key.endswith("_bucket_size")):
                continue
            if value == "auto" and key == "train_micro_batch_size_per_gpu":
                value = args.batch_size // (job.world_size * args.accumulate)
            flag, wanted = flags.get(key, ("", value))
            if flag and value != "auto":
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise UsageError(f'{where} {key} {value!r} is no number; write one, or "auto"')
                if value != wanted:
                    least = 0 if key == "weight_decay" else math.ulp(0.0)
                    taken = math.isfinite(value) and value >= least
                    also = f", or use {flag} {value}" if taken else ""
                    raise UsageError(
                        f'{where} {key} is {value}, and {flag} {wanted}; write "auto" there{also}'
                    )
            found[key] = wanted
        return found

    settings = {"steps_per_print": NEVER, **filled(config)}
    settings.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if args.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
    elif args.dtype == "float16":
        settings["fp16"] = {"enabled": True}
    return settings


def new_model(args: Namespace, config: Mapping[str, Any], job: Runtime) -> Llama:
    """The model of the flags and --seed; in stage 3 no rank ever holds more than a part of it.

    `zero.Init` divides each parameter as soon as it is made. What the model's own initialisation
    writes is then lost, so rank 0 draws the same numbers again, parameter by parameter.
    """
    torch.manual_seed(args.seed)
    if config["zero_optimization"]["stage"] < 3:
        return model_from_args(args, job.device)
    load_operators(config, job, "--config")  # parameters may go to a disk as they are made
    zero = join(job).zero
    with zero.Init(config_dict_or_path=copy.deepcopy(dict(config)), mem_efficient_linear=False):
        model = Llama(config_from_args(args))
    torch.manual_seed(args.seed)
    for module in model.modules():  # the numbers that torch draws as it makes a module
        if isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, bias=False)
        elif isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim)
    for name, parameter in model.named_parameters():
        with zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if job.is_main:
                model.initialise(name, parameter)
    return model


def own_batch(args: Namespace, job: Runtime) -> tuple[Tensor, Tensor]:
    """This rank's, always the same: inputs and targets [--batch-size, --seq-len]."""
    generator = torch.Generator().manual_seed(args.seed + job.rank)
    shape = (args.batch_size, args.seq_len + 1)
    tokens = torch.randint(config_from_args(args).vocab_size, shape, generator=generator)
    tokens = tokens.to(job.device)
    return tokens[:, :-1], tokens[:, 1:]


def held(engine: Any) -> dict[str, int]:
    """Bytes that this rank keeps, by kind: walked over unique storages, each counted once.

    weights: what the module computes with; gradients: what backward left; optimizer: its moments;
    master: float32 copies of the weights (or of a part) beside these, which DeepSpeed always makes.
    """
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    weights = [t for p in engine.module.parameters() for t in _local(p)]
    gradients = [*_gradients(engine)]
    moments = [
        value
        for state in inner.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    masters = [p.detach() for group in inner.param_groups for p in group["params"]]
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])  # stage 3's, of its own
    kinds = {"weights": weights, "gradients": gradients, "moments": moments, "master": masters}
    seen: list[Tensor] = []
    found, before = {}, 0
    for name, tensors in kinds.items():
        seen += tensors
        now = tensor_bytes(seen)
        found[name], before = now - before, now
    return found


def _local(parameter: Any) -> list[Tensor]:
    """What is here of a parameter; of stage 3's this rank's part, and the whole if it is there."""
    parts = [parameter.ds_tensor] if hasattr(parameter, "ds_tensor") else []
    return [tensor.detach() for tensor in (parameter, *parts)]


def _gradients(engine: Any) -> Iterator[Tensor]:
    """Whole ones of the module, and the optimizer's of this rank's partitions."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = [p for group in inner.param_groups for p in group["params"]]  # have them, offloaded
    yield from (p.grad for p in (*engine.module.parameters(), *masters) if p.grad is not None)
    for name in PARTITIONS:
        for value in (getattr(optimizer, name, None) or {}).values():
            several = value if isinstance(value, list) else [value]
            yield from (tensor for tensor in several if isinstance(tensor, Tensor))
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if isinstance(flat, Tensor):
        yield flat


@contextmanager
def engine_of(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """`begin`, and the engine's hooks and buffers gone at the end."""
    engine = begin(*args, **kwargs)
    try:
        yield engine
    finally:
        engine.destroy()


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """float32 copies of all parameters, whole, on every rank; every rank calls it."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter)
        found[name] = (parameter if value is None else value).detach().float().clone()
    return found


def whole_gradients(engine: Any) -> dict[str, Tensor]:
    """Of the last backward, before the step; every rank calls it."""
    from deepspeed.utils import safe_get_full_grad

    return {
        name: gradient.float().clone()
        for name, parameter in engine.module.named_parameters()
        if (gradient := safe_get_full_grad(parameter)) is not None
    }
