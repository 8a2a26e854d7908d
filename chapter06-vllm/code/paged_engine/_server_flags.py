"""The server's flags for the engine and for its limits, with their defaults."""

import argparse
from typing import Any

from distlab import script
from paged_engine.engine import EngineConfig

# Flag, type, default, help; the names are EngineConfig's.
ENGINE: list[tuple[str, Any, Any, str]] = [
    ("dtype", str, "auto", "auto: as saved; or float32, bfloat16, float16"),
    ("device", str, "auto", "auto, cpu, or cuda"),
    ("block-size", script.positive_int, 16, "tokens in a block of the cache"),
    ("num-blocks", script.positive_int, None, "size of the cache, in blocks"),
    ("kv-cache-bytes", script.positive_int, None, "size of the cache, in bytes"),
    ("max-batch-tokens", script.positive_int, 2048, "tokens computed in a step"),
    ("max-sequences", script.positive_int, 64, "sequences in a step"),
    ("max-model-len", script.positive_int, None, "context, if shorter than the model's"),
    ("tensor-parallel", script.positive_int, 1, "processes that share each layer"),
]
LIMITS: list[tuple[str, Any, Any, str]] = [
    ("max-queue", script.non_negative_int, 256, "sequences that may wait; more get status 429"),
    ("max-body-bytes", script.positive_int, 2**20, "of a request's body"),
    ("request-seconds", script.positive_float, 600.0, "after which a request is given up"),
    ("drain-seconds", script.positive_float, 30.0, "for what runs when the server is to stop"),
]


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the engine")
    _add(group, ENGINE)
    for name, meaning in (
        ("prefix-caching", "share the blocks of common beginnings"),
        ("compile", "compile the model's operators"),
    ):
        action = argparse.BooleanOptionalAction
        group.add_argument(f"--{name}", action=action, default=True, help=meaning)


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    _add(parser.add_argument_group("limits"), LIMITS)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    names = [flag.replace("-", "_") for flag, *_ in ENGINE]
    values = {name: getattr(args, name) for name in [*names, "prefix_caching", "compile"]}
    return EngineConfig(model=str(args.model), **values)


def _add(group: Any, flags: list[tuple[str, Any, Any, str]]) -> None:
    for name, kind, default, meaning in flags:
        shown = f"{meaning} (default: {default})" if default is not None else meaning
        group.add_argument(f"--{name}", type=kind, default=default, help=shown)
