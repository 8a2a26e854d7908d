"""Python imports this at every start: where diagnose watches a rank, it brings the agent.

`diagnose.py` puts this folder first in PYTHONPATH. In all other processes, such as torchrun's own
or what a rank starts, nothing happens. A sitecustomize that this one hides is imported after it.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

HERE = str(Path(__file__).parent)


class AfterTorch:
    """A finder that runs `then` as soon as `import torch` is complete, whoever imports it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_watch(module: object) -> None:
            load(module)  # type: ignore[arg-type]
            from diagnose_agent.hooks import activate

            activate()

        spec.loader.exec_module = load_and_watch  # type: ignore[method-assign, assignment]
        return spec


def hidden_sitecustomize() -> None:
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(HERE).resolve()]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec and spec.loader:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if {"DIAGNOSE_DIR", "RANK"} <= os.environ.keys() and "DIAGNOSE_RANK_PID" not in os.environ:
    os.environ["DIAGNOSE_RANK_PID"] = str(os.getpid())  # what this rank starts is no rank
    sys.meta_path.insert(0, AfterTorch())  # type: ignore[arg-type]
hidden_sitecustomize()
