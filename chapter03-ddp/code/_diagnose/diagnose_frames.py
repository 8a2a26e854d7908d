"""Where a rank is: its own lines of Python, without those of torch and of other libraries."""

import os
import pickle
import site
import sys
import sysconfig
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

Place = tuple[str, int, str]  # file, line, function

FOLDERS = {
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *site.getsitepackages(),
    site.getusersitepackages(),
    str(Path(__file__).parent),
    str(Path(dist.__file__).parents[2]),
}
LIBRARIES = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in FOLDERS)
BENCH = f"{os.sep}distlab{os.sep}"  # this book's library is one too
_own: dict[str, bool] = {}


def is_own(filename: str) -> bool:
    """Whether a file is the user's: no library's, and no frozen or generated code."""
    known = _own.get(filename)
    if known is None:
        real = os.path.realpath(filename)
        known = not (filename.startswith("<") or real.startswith(LIBRARIES) or BENCH in real)
        _own[filename] = known
    return known


def own_place(frame: FrameType | None) -> Place | None:
    """The innermost own line of a running frame."""
    while frame is not None:
        code: CodeType = frame.f_code
        if is_own(code.co_filename):
            return code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back
    return None


def caller() -> Place | None:
    """The own line that led to whoever calls this."""
    return own_place(sys._getframe(1))


def own_frame() -> FrameType | None:
    """The innermost own frame of the calling thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_own(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def main_place() -> tuple[Place | None, str]:
    """Where the main thread is in the user's code, and the function at the very end."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return own_place(frame), frame.f_code.co_name if frame else ""


def threads() -> list[dict[str, Any]]:
    """Every thread's own lines, innermost first, and the function at the very end."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, frame in sys._current_frames().items():
        places, leaf = [], f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
        walk: FrameType | None = frame
        while walk is not None:
            if is_own(walk.f_code.co_filename):
                places.append((walk.f_code.co_filename, walk.f_lineno, walk.f_code.co_name))
            walk = walk.f_back
        if places:
            found.append({"ident": str(ident), "name": names.get(ident, "?"), "leaf": leaf,
                          "own": places})  # fmt: skip
    return found


def flight_recorder(collectives: bool, stacks: bool) -> dict[str, Any]:
    """torch's flight recorder: the last collectives of this rank, and the state of each group."""
    dump: Any = c10d._dump_fr_trace  # type: ignore[attr-defined]
    if dist.is_initialized() and "nccl" in dist.get_backend():
        dump = getattr(c10d, "_dump_nccl_trace", dump)
    return pickle.loads(dump(collectives, stacks, False))  # made in this process a moment ago
