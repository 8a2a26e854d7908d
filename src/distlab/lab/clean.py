"""`lab clean [NAME …] [--yes]`: what takes room here and is not needed; --yes removes it.

Without a name: environments whose pins have changed or that were never finished, what the lab does
not know in their folder, and the downloads that were kept. With names: these environments, built or
not. The environment core, which the lab itself runs in, `build/` with your runs, and the user's own
cache of uv stay.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distlab.display import text_table
from distlab.environments import recipes
from distlab.errors import RunError, UsageError
from distlab.script import OneLineParser

KEPT = {"uv", "torch-build.txt"}  # small, and wanted again by the next build
DOWNLOADS = {"cache": "downloads, fetched again when needed"}


@dataclass(frozen=True)
class Unneeded:
    """A file or folder that may go, and why."""

    path: Path
    why: str

    @property
    def bytes(self) -> int:
        """Of its own: what is linked from elsewhere, as uv does, frees nothing when it goes."""
        paths = [self.path] if self.path.is_file() else list(self.path.rglob("*"))
        stats = [path.lstat() for path in paths if path.is_symlink() or path.is_file()]
        return sum(one.st_size for one in stats if one.st_nlink == 1)


def main(argv: list[str]) -> int:
    args = _parse(argv)
    found = list(named(args.names) if args.names else unneeded())
    if not found:
        print("nothing to remove")
        return 0
    rows = [[str(one.path), one.bytes / 1e6, one.why] for one in found]
    print(text_table(["path", "MB of its own", "why"], rows))
    if not args.yes:
        print("nothing was removed; add --yes to remove these")
        return 0
    for one in found:
        remove(one.path)
    print(f"removed {len(found)}")
    return 0


def named(names: list[str]) -> Iterator[Unneeded]:
    """These environments with their logs. Raises `UsageError` for core and for an unknown one."""
    known = recipes.names()
    for name in names:
        if name not in known or name == "core":
            others = ", ".join(other for other in known if other != "core")
            raise UsageError(f"{name} is not to be removed; name one or more of: {others}")
        for path in (recipes.FOLDER / name, recipes.FOLDER / f"{name}.log"):
            if path.exists():
                yield Unneeded(path, "named")


def unneeded() -> Iterator[Unneeded]:
    """What stands beside the environments that are up to date."""
    if not recipes.FOLDER.is_dir():
        return
    known, build = recipes.names(), recipes.torch_build()
    for path in sorted(recipes.FOLDER.iterdir()):
        name = path.name.split(".")[0]
        if path.name in KEPT or path == _running_in() or path.suffix == ".lock":
            continue
        if path.name in DOWNLOADS:
            yield Unneeded(path, DOWNLOADS[path.name])
        elif name not in known:
            if path.is_dir() and (path / "pyvenv.cfg").is_file():
                yield Unneeded(path, "an environment that the lab no longer knows")
        elif path.is_dir() and not recipes.read(name, build).is_ready():
            yield Unneeded(path, "its pins have changed, or it was never finished")


def _running_in() -> Path:
    return Path(sys.prefix).absolute()


def remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise RunError(f"{path} could not be removed: {error.strerror}") from error


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("lab clean", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="environments to remove")
    parser.add_argument("--yes", action="store_true", help="remove what is named")
    return parser.parse_args(argv)
