"""DeepSpeed's compiled operators: built once for this machine, then loaded as they are.

DeepSpeed compiles an operator when it is first used: for minutes, in the middle of a job, on every
rank, behind a lock file that a killed build leaves behind and that the next job waits for without
end. Here `python3 scripts/lab.py env deepspeed` compiles them beforehand, and jobs load what it
made: no compiler, no lock and no wait.
"""

import ctypes
import os
import shutil
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

from distlab.environments.recipes import FOLDER
from distlab.errors import RunError, UsageError

CPU_ADAM, ASYNC_IO, PINNED = "cpu_adam", "async_io", "pin_memory"
BUILDERS = {CPU_ADAM: "CPUAdamBuilder", PINNED: "PinMemoryBuilder", ASYNC_IO: "AsyncIOBuilder"}
CURE = "python3 scripts/lab.py env deepspeed builds it"


def folder() -> Path:
    """Where they are: $TORCH_EXTENSIONS_DIR, or the environment deepspeed's."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or FOLDER / "deepspeed" / "operators")


def library(name: str) -> Path:
    return folder() / name / f"{name}.so"


def build() -> None:
    """Compile all of them into this environment; `lab env deepspeed` calls it.

    They appear when all are there: jobs that run meanwhile see neither a part nor a build's locks.
    """
    done, building = Path(sys.prefix) / "operators", Path(sys.prefix) / "operators.building"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(building)
    os.environ["DS_ACCELERATOR"] = "cpu"
    if shutil.which("g++") is None:
        raise SystemExit("DeepSpeed's operators need g++, and there is none; apt install g++")
    for folder_of_another in (done, building):
        shutil.rmtree(folder_of_another, ignore_errors=True)
    from deepspeed.ops import op_builder

    for number, (name, builder) in enumerate(BUILDERS.items(), start=1):
        print(f"Compiling DeepSpeed's {name}, {number} of {len(BUILDERS)}", flush=True)
        (building / name).mkdir(parents=True)
        _lean(getattr(op_builder, builder)()).load(verbose=False)
    building.rename(done)


def _lean(builder: Any) -> Any:
    """The builder, without debug information: most of the compiler's time went into that."""
    given = builder.cxx_args
    builder.cxx_args = lambda: [argument for argument in given() if argument != "-g"]
    return builder


def use(*names: str, flag: str) -> None:
    """Have DeepSpeed take these operators from `folder`.

    Raises `UsageError` that names `flag` where one is not built, and `RunError` for one that this
    machine cannot load.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    for name in names:
        if not library(name).exists():
            raise UsageError(f"{flag} needs DeepSpeed's operator {name}; {CURE}")
        if name in OpBuilder._loaded_ops:
            continue
        try:
            OpBuilder._loaded_ops[name] = _loaded(name)
        except ImportError as error:
            raise RunError(f"{library(name)} does not load here ({error}); {CURE} anew") from error


def _loaded(name: str) -> object:
    loader = ExtensionFileLoader(name, str(library(name)))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    if name == PINNED:  # async_io takes some of its functions
        ctypes.CDLL(str(library(name)), mode=ctypes.RTLD_GLOBAL)
    return module
