"""A disk that loses power: what was not brought to it by fsync is gone afterwards.

os.fsync, os.replace, os.rename and os.unlink are watched; before the n-th of them the power may go.
Then a name is there only if the folder's fsync came after it, and a file that was written to after
its last fsync is torn: half of it is there.
"""

import os
from contextlib import contextmanager

from distlab.lab.grade_student import rig

WATCHED = ("fsync", "replace", "rename", "unlink", "remove")


class PowerCut(BaseException):
    """No `except Exception` hears of a power cut."""


class Disk:
    def __init__(self, folder, cut_before=None):
        self.folder, self.cut_before = folder, cut_before
        self.operations = []  # names, in order
        self.safe = {}  # content of each inode at its last fsync
        self.names = self._listing()  # name: inode, as on the disk
        for name, inode in self.names.items():
            self.safe[inode] = (folder / name).read_bytes()

    def _listing(self):
        if not self.folder.is_dir():
            return {}
        return {p.name: p.stat().st_ino for p in self.folder.iterdir() if p.is_file()}

    @contextmanager
    def watching(self):
        real = {name: getattr(os, name) for name in WATCHED}

        def watched(name):
            def operation(*arguments, **keywords):
                if len(self.operations) == self.cut_before:
                    raise PowerCut
                self.operations.append(name)
                result = real[name](*arguments, **keywords)
                if name == "fsync":
                    self._synced(arguments[0])
                return result

            return operation

        for name in WATCHED:
            setattr(os, name, watched(name))
        try:
            yield
        finally:
            for name in WATCHED:
                setattr(os, name, real[name])

    def _synced(self, target):
        """Note the content of a file, or the names in the folder, as safe."""
        number = target if isinstance(target, int) else target.fileno()
        status = os.fstat(number)
        if self.folder.is_dir() and status.st_ino == self.folder.stat().st_ino:
            self.names = self._listing()
            return
        for name, inode in self._listing().items():
            if inode == status.st_ino:
                self.safe[inode] = (self.folder / name).read_bytes()

    def lose_power(self):
        """Leave in the folder what the disk holds."""
        written = {}
        for name, inode in self._listing().items():
            written[inode] = (self.folder / name).read_bytes()
            (self.folder / name).unlink()
        kept = {}
        for name, inode in self.names.items():
            safe = self.safe.get(inode, b"")
            now = written.get(inode, safe)
            kept[name] = safe if now == safe else now[: len(now) // 2]
        for name, content in kept.items():
            (self.folder / name).write_bytes(content)


@rig
def save_until_cut(save, folder, step, payload, cut_before=None):
    """Save with the power cut before operation `cut_before`; what was done, and whether it ended.

    Without a cut in between, the power goes when `save` has returned.
    """
    disk = Disk(folder, cut_before)
    finished = False
    try:
        with disk.watching():
            save(folder, step, payload)
        finished = True
    except PowerCut:
        pass
    disk.lose_power()
    return disk.operations, finished
