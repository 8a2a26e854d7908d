"""What disks do to checkpoints: full ones, files cut short, bytes changed, files gone."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _checkpoint import Checkpoints
from _checkpoint_files import MANIFEST, TENSORS, TREE

from distlab.errors import RunError
from distlab.run import Run


@contextmanager
def full_disk(file_bytes: int = 100_000) -> Iterator[None]:
    """A limit on the size of files stands for the full disk: a write fails in the middle of one.

    It holds for the whole process.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / TENSORS
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / TENSORS
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        [old] = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([old ^ 0b100]))


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / TREE).unlink()


def copy_half_of_it(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": cut_short,
    "one bit changed": flip_a_byte,
    "a file lost": lose_a_file,
    "copied by half": copy_half_of_it,
}


def damage_one_after_another(run: Run, folder: Path, state: Any) -> None:
    """Damage the newest checkpoint, then the newest that is left, each in its own way."""
    lines: list[str] = []
    newest = len(DAMAGES)
    store = Checkpoints(folder, keep=newest + 1, asynchronous=False, report=lines.append)
    for step in range(newest + 1):
        store.save(step, state)
    for name, damage in DAMAGES.items():
        damage(store.path(newest))
        lines.clear()
        loaded = store.load_newest()
        run.print(f"sample: {lines[-1]}")
        run.check_equal(
            f"newest checkpoint {name}: named, and the one before is used",
            (f"{store.path(newest).name}:" in lines[-1], loaded and loaded.step),
            (True, newest - 1),
        )
        newest -= 1
    cut_short(store.path(0))
    try:
        store.load_newest()
        said = "nothing"
    except RunError as error:
        said = str(error).partition(" in ")[0]
    run.check_equal("with all of them damaged", said, "no checkpoint")
