"""A bound on memory that counts the page cache: a control group of this process's own.

RLIMIT_DATA counts what a process maps for itself, and no file. What is read from files or written
to them stays in the kernel's page cache as long as there is room, so a program that keeps its data
in files seems to need no memory at all. A control group counts those pages too, and where they
exceed its limit the kernel writes them to the disk and forgets them.

Sources: cgroups(7); the kernel's documentation of the memory controller, versions 1 and 2.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distlab import host

MOUNT = Path("/sys/fs/cgroup")
PREFIX = "distlab-"  # of a group's name, which ends with its owner's process id
MOST = 2**50  # bytes, more than any machine has
FILES = {  # of version 1 and 2: limit, limit with swap, what is used, and its peak
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.usage_in_bytes",
        "memory.max_usage_in_bytes"),
    2: ("memory.max", "memory.swap.max", "memory.current", "memory.peak"),
}  # fmt: skip
# Waits until the owner is gone, by its end of the pipe; then ends what is left, and the group.
GUARDIAN = """
cat > /dev/null
for again in $(seq 100); do
    for process in $(cat "$0/cgroup.procs" 2> /dev/null); do kill -9 "$process"; done
    rmdir "$0" && exit
    [ -d "$0" ] || exit
    sleep 0.1
done
"""


class Group:
    """A control group: its folder, and the bytes charged to it, page cache included."""

    def __init__(self, folder: Path, version: int) -> None:
        self.folder, self.version = folder, version
        self.limit, self.swap, self.usage, self.maximum = (folder / name for name in FILES[version])

    def bound(self, limit: int) -> None:
        limit = min(limit, MOST)  # of a longer number the kernel takes the low digits
        self.limit.write_text(str(limit), encoding="utf-8")
        if self.swap.exists():  # version 1 counts memory and swap together
            self.swap.write_text(str(limit if self.version == 1 else 0), encoding="utf-8")

    def used(self) -> int:
        return int(self.usage.read_text(encoding="utf-8"))

    def peak(self) -> int | None:
        """The most that was used; None where the kernel does not tell."""
        return int(host.read(self.maximum) or 0) or None


@contextmanager
def bounded_memory(limit: int) -> Iterator[Group | None]:
    """Let this process use `limit` bytes more than it has, page cache included, in the block.

    Gives None, and sets no bound, where the process may make no group. What is charged stays with
    the group that it was charged to, so what this process holds by now is not counted. Memory that
    is not of files and exceeds the limit gets the process killed: bound that by `device_memory`.
    The group is gone after the block; after a SIGKILL too, with all processes that were in it.
    """
    found = _hierarchy()
    if found is None:
        yield None
        return
    root, own, version = found
    _remove_orphans(root, own)
    for parent in _from(root, own):
        group = Group(parent / f"{PREFIX}{os.getpid()}", version)
        guardian = None
        try:
            group.folder.mkdir()
            guardian = _start_guardian(group.folder)
            group.bound(limit)
            _enter(group.folder)
        except OSError:  # may not, or this group's children have no memory controller
            _end_guardian(guardian, group.folder)
            continue
        try:
            yield group
        finally:
            for process in (group.folder / "cgroup.procs").read_text(encoding="utf-8").split():
                with suppress(OSError):  # it has ended meanwhile
                    (own / "cgroup.procs").write_text(process, encoding="utf-8")
            _end_guardian(guardian, group.folder)
        return
    yield None


def _hierarchy() -> tuple[Path, Path, int] | None:
    """The root of the memory controller's groups, this process's own one, and the version."""
    lines = [line.split(":", 2) for line in host.read("/proc/self/cgroup").splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return _places(MOUNT / "memory", path, 1)
    for _, controllers, path in lines:
        if not controllers and "memory" in host.read(MOUNT / "cgroup.controllers").split():
            return _places(MOUNT, path, 2)
    return None


def _places(root: Path, path: str, version: int) -> tuple[Path, Path, int]:
    own = root / path.lstrip("/")
    return root, own if own.is_dir() else root, version  # a container may see its own as the root


def _from(root: Path, own: Path) -> list[Path]:
    """Where a group could be made: from the root down, since one that holds processes may not."""
    between = [folder for folder in own.parents if folder.is_relative_to(root)]
    return [*reversed(between), own]


def _enter(folder: Path) -> None:
    (folder / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")


def _start_guardian(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["sh", "-c", GUARDIAN, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for its owner
    )


def _end_guardian(guardian: subprocess.Popen[bytes] | None, folder: Path) -> None:
    if guardian is None:
        with suppress(OSError):
            folder.rmdir()
        return
    guardian.communicate()  # closes the pipe; it removes the group, and ends within 10 s


def _remove_orphans(root: Path, own: Path) -> None:
    """Groups whose owner and guardian were both killed."""
    for parent in _from(root, own):
        for folder in parent.glob(f"{PREFIX}*"):
            if not Path("/proc", folder.name.removeprefix(PREFIX)).exists():
                with suppress(OSError):
                    folder.rmdir()
