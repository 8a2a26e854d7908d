"""A folder of checkpoints: their names, which are old, what a killed writer left, the thread."""

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from distlab.errors import UsageError

NAME = re.compile(r"step_(\d{8,})")
SAVE_WAITS_S = 5.0  # for the one before: less than the other ranks wait in a collective
PATIENCE_S = 60.0  # at the end of a run, and for another process that writes


class CheckpointFolder:
    """What every kind of checkpoint does alike; how one is written and read is the kind's own.

    With `asynchronous` a thread writes. `keep` is how many of the newest are kept; an old one goes
    only after the new one is in place. `report` gets one line for each that could not be written,
    or is damaged; a thread may call it.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        asynchronous: bool = True,
        report: Callable[[str], object] = print,
    ) -> None:
        if keep < 1:
            raise UsageError(f"--keep {keep} would keep no checkpoint; use 1 or more")
        self.folder, self.keep = Path(folder), keep
        self.asynchronous, self.report = asynchronous, report
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, damaged ones too, the oldest first."""
        names = [NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(found[1]) for found in names if found)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def named(self, path: str | Path) -> Path:
        """`path`. Raises `UsageError` when that is no checkpoint's folder."""
        path = Path(path)
        if not path.is_dir() or not NAME.fullmatch(path.resolve().name):
            raise UsageError(f"{path} is no checkpoint; name a folder such as {self.path(120)}")
        return path

    def wait(self, timeout_s: float = PATIENCE_S) -> bool:
        """Wait until nothing is being written; False when something still is."""
        if self._writer is not None:
            self._writer.join(timeout_s)
            if self._writer.is_alive():
                return False
            self._writer = None
        if (failure := self._failure) is not None:
            self._failure = None
            raise failure
        return True

    def _apart(self, write: Callable[[], object]) -> None:
        """Have a thread write; what it raises is raised where the next save, wait or close is."""

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._failure = error

        self._writer = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._writer.start()

    def _delete_old(self, saved: int) -> None:
        """Keep the newest of those up to the step just saved; later ones are another run's."""
        steps = self.steps()
        if later := [step for step in steps if step > saved]:
            self.report(f"checkpoint of step {saved} saved, yet {self.path(later[-1])} is newer")
        for step in [step for step in steps if step <= saved][: -self.keep]:
            doomed = self._temporary(step)
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(self.path(step), doomed)  # half-deleted under its own name is damaged
            shutil.rmtree(doomed, ignore_errors=True)

    def _remove_left(self) -> None:
        """Remove what a killed writer left, when nobody writes."""
        for left in self.folder.glob(".step_*"):
            if found := NAME.match(left.name[1:]):
                self._mend(int(found[1]))
                shutil.rmtree(left, ignore_errors=True)

    def _mend(self, step: int) -> None:
        """Give the checkpoint that was put aside its name back, unless the new one has it."""
        aside = self._aside(step)
        if aside.exists() and not self.path(step).exists():
            os.rename(aside, self.path(step))
        shutil.rmtree(aside, ignore_errors=True)

    def _temporary(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.tmp"

    def _aside(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.old"
