"""SGLang on a processor without its compiled kernels: what it imports and never calls there.

SGLang 0.5 runs on any CPU through torch's own operators, but two imports fail on the way, since the
package index has only CUDA builds of what they load. A line in the environment's site-packages
imports this module whenever its Python begins (`python -m radix.sglang_on_cpu` writes it), and it
stands in for

    torchvision   whose compiled half registers two operators: they are declared, not implemented
    sgl_kernel    compiled kernels for GPUs, and for CPUs with AMX: each raises when it is called

and it tells SGLang to use its CPU engine. SGLang itself stays as it is. With torch's CUDA build
nothing is done.
"""

import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import NoReturn

OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
             "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip
ENGINE = {"SGLANG_USE_CPU_ENGINE": "1"}


class MissingKernels(Loader):
    """`sgl_kernel` and all modules below it: any name is there, and none of them computes."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MissingModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


class MissingModule(ModuleType):
    def __getattr__(self, name: str) -> "Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class Missing:
    """A kernel, or what describes one: it may be looked up and passed on, and not be called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> "Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.name}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"{self.name} is one of SGLang's compiled kernels, and this machine has none: what "
            "needs it runs on a GPU only"
        )


class Finder(MetaPathFinder):
    """Asked before Python's own finders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            declare_operators()
        if name.partition(".")[0] == "sgl_kernel":
            return spec_from_loader(name, MissingKernels(), is_package=True)
        return None


def declare_operators() -> None:
    import torch

    for operator in OPERATORS:
        try:
            torch.library.define(f"torchvision::{operator.partition('(')[0]}",
                                 operator[operator.index("(") :])  # fmt: skip
        except RuntimeError:  # they are there: torchvision's compiled half is one for this torch
            return


def stand_in() -> None:
    """Do all this in the process that imports the module, once."""
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    if PathFinder.find_spec("sgl_kernel") is None:
        for name, value in ENGINE.items():
            os.environ.setdefault(name, value)
        sys.meta_path.insert(0, Finder())


def install() -> None:
    """Have this environment's Python import the module whenever it begins."""
    folder = Path(sysconfig.get_path("purelib"))
    line = f"import {__spec__.name if __spec__ else __name__}\n"
    (folder / "sglang_on_cpu.pth").write_text(line, encoding="utf-8")


if __name__ == "__main__":
    install()
else:
    stand_in()
