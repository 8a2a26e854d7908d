"""A disk that loses power: what was not brought to it by fsync is gone afterwards.

The functions of `os` that change names, and fsync, are watched; before the n-th of them the power
may go. Then a file that was written to after its last fsync is torn. What becomes of a name, a
folder's too, that has changed since the last fsync of the folder it is in, nobody can know: the
change is either lost or, with `names_kept`, already on the disk.
"""

import os
import shutil
from contextlib import contextmanager, suppress

from distlab.lab.grade_student import rig

WATCHED = ("fsync", "fdatasync", "replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir")


class PowerCut(BaseException):
    """No `except Exception` hears of a power cut."""


class Disk:
    """What would survive of everything under the folder `root`."""

    def __init__(self, root, cut_before=None, names_kept=False, torn=0.5):
        self.root, self.cut_before = root, cut_before
        self.names_kept, self.torn = names_kept, torn
        self.operations = []  # names, in order
        self.safe = {}  # of each inode at its last fsync: bytes, or {name: inode} of a folder
        self.held = {}  # a descriptor of each inode above, lest its number be given away
        for path in self._paths():
            self._keep(path)

    def _paths(self):
        return [self.root, *(path for path in self.root.rglob("*") if not path.is_symlink())]

    def _keep(self, path):
        self.safe[path.stat().st_ino] = content_of(path)
        inside = path.iterdir() if path.is_dir() else ()
        for known in [path, *(one for one in inside if not one.is_symlink())]:
            number = known.stat().st_ino
            self.safe.setdefault(number, {} if known.is_dir() else b"")
            if number not in self.held:
                self.held[number] = os.open(known, os.O_RDONLY)

    @contextmanager
    def watching(self):
        real = {name: getattr(os, name) for name in WATCHED if hasattr(os, name)}

        def watched(name):
            def operation(*arguments, **keywords):
                if len(self.operations) == self.cut_before:
                    raise PowerCut
                self.operations.append(name)
                result = real[name](*arguments, **keywords)
                if name in ("fsync", "fdatasync"):
                    self._synced(arguments[0])
                return result

            return operation

        for name in real:
            setattr(os, name, watched(name))
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    def _synced(self, target):
        number = target if isinstance(target, int) else target.fileno()
        for path in self._paths():
            if path.stat().st_ino == os.fstat(number).st_ino:
                self._keep(path)

    def lose_power(self):
        """Leave under the root what the disk holds."""
        now = {path.stat().st_ino: content_of(path) for path in self._paths()}
        if self.names_kept:
            for path in self._paths():
                if path.is_dir():
                    self._keep(path)
        left = self._left(self.root.stat().st_ino, now)
        for descriptor in self.held.values():
            os.close(descriptor)
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        restore(self.root, left)

    def _left(self, inode, now):
        """The bytes of a file, or {name: what is left} of a folder."""
        safe = self.safe[inode]
        if isinstance(safe, dict):
            return {name: self._left(number, now) for name, number in safe.items()}
        written = now.get(inode, safe)
        return safe if written == safe else written[: int(len(written) * self.torn)]


def content_of(path):
    if path.is_dir():
        return {p.name: p.stat().st_ino for p in path.iterdir() if not p.is_symlink()}
    return path.read_bytes()


def restore(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.mkdir(exist_ok=True)
    for name, inner in content.items():
        restore(path / name, inner)


@rig
def save_until_cut(save, root, folder, step, payload, cut_before=None, names_kept=False, torn=0.5):
    """Save with the power cut before operation `cut_before`; what was done, and whether it ended.

    Without a cut in between, the power goes when `save` has returned. `root`, above `folder` or the
    same, is what the disk holds; `torn` is the part of a torn file that is left.
    """
    disk = Disk(root, cut_before, names_kept, torn)
    finished = False
    with suppress(PowerCut), disk.watching():
        save(folder, step, payload)
        finished = True
    disk.lose_power()
    return disk.operations, finished
