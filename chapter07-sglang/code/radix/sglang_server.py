"""SGLang's server: the command that starts it on a GPU, or on a CPU with what it needs, and itself.

sglang_server.sh runs this module as a program; what it does not know goes to SGLang and wins.
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlab import script
from distlab.errors import UsageError
from distlab.files import repo_root
from distlab.hardware import has_cuda
from distlab.serving.node import known_options, split_flags
from distlab.serving.tiny_model import PRESETS, add_model_flags, model_directory

CONFIG = "chapter07-sglang/configs/sglang_server.yaml"
# Tokens in the cache. By itself SGLang takes what main memory has left, and pages it in.
CPU_TOKENS = {"smoke": 8192, "laptop": 32768, "gpu": 32768}


def main() -> int:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    parser.add_argument("--config", metavar="FILE", default=str(repo_root() / CONFIG))
    ours, flags = split_flags(sys.argv[1:], known_options(parser))
    args = parser.parse_args(ours)
    if not Path(args.config).is_file():
        raise UsageError(f"--config {args.config} is no file; use one such as {CONFIG}")
    if Path(args.config).suffix not in (".yaml", ".yml"):
        raise UsageError(f"--config {args.config} is no YAML file; SGLang wants it to end in .yaml")
    refuse_without_sglang()
    set_environment()
    line = serve_line(model_directory(args), args.preset, ["--config", args.config, *flags])
    print(f"starting: python -m sglang.launch_server {shlex.join(line)}", flush=True)
    return serve(line)


def serve_line(model: Path, preset: str, flags: Sequence[str] = ()) -> list[str]:
    """The flags of SGLang's server for the folder `model`; `flags` stand last and win."""
    line = ["--model-path", str(model), "--served-model-name", model.name]
    if not has_template(model):
        line += ["--chat-template", "chatml"]
    if not has_cuda():
        line += ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"]
        line += ["--max-total-tokens", str(CPU_TOKENS[preset])]
    if preset == "smoke":
        line.append("--skip-server-warmup")  # a request that compiles kernels, on a GPU
    return [*line, *flags]


def has_template(model: Path) -> bool:
    """Whether the model says how a chat is written; without one SGLang refuses chats."""
    if (model / "chat_template.jinja").is_file():
        return True
    config = model / "tokenizer_config.json"
    return config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))


def set_environment(ranks: int = 1) -> None:
    """The variables that SGLang reads when it is imported. What the user has set stays."""
    wanted = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not has_cuda():
        cores = cores_of_this_process()
        # A part for each rank of the job. Without it SGLang refuses more ranks than NUMA nodes.
        wanted["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * ranks)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def cores_of_this_process() -> str:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    return ",".join(map(str, sorted(cores)))


def refuse_without_sglang() -> None:
    if importlib.util.find_spec("sglang") is None:
        raise UsageError(
            "this Python has no SGLang; run it with the one that "
            "`python3 scripts/lab.py env sglang` builds and prints"
        )


def serve(line: list[str]) -> int:
    """SGLang's server, in this process and those that it starts, until a signal ends it."""
    # A wrong flag of SGLang's would print the 800 lines of its usage.
    argparse.ArgumentParser.error = one_line_error  # type: ignore[method-assign,assignment]
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    arguments: Any = prepare_server_args(line)
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def one_line_error(parser: argparse.ArgumentParser, message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(script.BAD_ARGUMENT)


if __name__ == "__main__":
    script.exit(main)
