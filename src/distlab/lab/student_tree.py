"""`lab student-tree OUT`: the repository without its reference solutions."""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from distlab.errors import RunError, UsageError
from distlab.files import repo_root
from distlab.script import OneLineParser

UNTRACKED_FOLDERS = {"build", "dist", "node_modules", "__pycache__"}
LEAK_LINES = 3  # so many lines of a solution in a row are no coincidence
SHORTEST_LINE = 12  # `return total` and shorter say nothing
IMPORT = re.compile(r"(import|from) ")


def student_tree(argv: list[str]) -> int:
    """Export the tree; 0 when it is there.

    Raises `UsageError` when OUT exists and is not empty, `RunError` when a file that is not
    under exercises/solution/ holds a part of a solution; OUT is not touched then.
    """
    out = Path(parse_args(argv).out).absolute()
    root = repo_root()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"OUT {out} exists and is not empty; name a new folder")
    files = [path for path in repository_files(root) if not is_solution(path)]
    refuse_leaks(root, files)
    copy_atomically(root, files, out)
    print(f"{out}: {len(files)} files, no solutions")
    return 0


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="lab student-tree", description="Export everything but the reference solutions."
    )
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist, or is empty")
    return parser.parse_args(argv)


def repository_files(root: Path) -> list[PurePosixPath]:
    """The files that git tracks, relative to `root`; without git, all but build outputs."""
    names = _tracked(root) or _walked(root)
    return [PurePosixPath(name) for name in sorted(names) if (root / name).is_file()]


def _tracked(root: Path) -> list[str]:
    git = ["git", "-C", str(root)]
    with suppress(FileNotFoundError):
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True)
        folder = Path(os.fsdecode(top.stdout.strip()))
        if top.returncode == 0 and folder.resolve() == root.resolve():
            listed = subprocess.run([*git, "ls-files", "-z"], capture_output=True, check=True)
            return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return []


def _walked(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _is_untracked(name)]
        for name in names:
            yield (Path(folder) / name).relative_to(root).as_posix()


def _is_untracked(folder: str) -> bool:
    hidden = folder.startswith(".") and folder not in (".ci", ".github")
    return hidden or folder in UNTRACKED_FOLDERS or folder.endswith(".egg-info")


def is_solution(path: PurePosixPath) -> bool:
    return "/exercises/solution/" in f"/{path}"


def refuse_leaks(root: Path, files: list[PurePosixPath]) -> None:
    """Raise `RunError` where an exported file holds lines that only a solution should."""
    public = {
        line
        for path in files
        if "/exercises/starter/" in f"/{path}"
        for line in telling_lines(root / path)
    }
    secret = {
        run: solution
        for solution in root.glob("*/exercises/solution/**/*.py")
        for run in line_runs(solution)
        if not public.issuperset(run)
    }
    for path in files:
        for run in line_runs(root / path):
            if run in secret:
                solution = secret[run].relative_to(root)
                raise RunError(f'{path} holds a part of {solution}: "{run[0]}"; take it out')


def line_runs(path: Path) -> Iterator[tuple[str, ...]]:
    """Every `LEAK_LINES` telling lines that follow one another."""
    lines = telling_lines(path)
    return zip(*(lines[start:] for start in range(LEAK_LINES)), strict=False)


def telling_lines(path: Path) -> list[str]:
    """The file's lines without indentation; short ones, imports and binary files left out."""
    with suppress(UnicodeDecodeError):
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if len(line) >= SHORTEST_LINE and not IMPORT.match(line)]
    return []


def copy_atomically(root: Path, files: list[PurePosixPath], out: Path) -> None:
    """Copy into a new folder beside `out`, and rename it when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for path in files:
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / path, target, follow_symlinks=False)
        temporary.chmod(0o755)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
