"""Real text: the standard library's sources (no download), a folder, or a Hugging Face data set."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from distlab.errors import RunError, UsageError
from distlab.launch import own_rank

VALIDATION_SHARE = 0.05
SHOWN = 3  # of the names of files that are left out for one reason
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def read_corpus(corpus: str = "stdlib", max_bytes: int | None = None) -> list[str]:
    """The documents of `corpus`, in an order that does not depend on the machine.

    `corpus` is `stdlib` (the .py files of this Python, without its tests and installed packages),
    a folder of text files (read recursively through linked folders, each folder once; hidden files
    left out), or `hf:NAME[:CONFIG]`, the train split of a Hugging Face data set. Files come sorted
    by relative path. The first `max_bytes` bytes are kept, the last document cut at a line's end.
    What of a folder cannot be read as UTF-8 is left out, and rank 0 says so on standard error.

    Raises `UsageError` when the corpus is missing, empty, or not readable here.
    """
    left_out = LeftOut()
    if corpus == "stdlib":
        found = _read_files(_standard_library(), left_out, only_suffix=".py")
    elif corpus.startswith("hf:"):
        found = _hugging_face(corpus)
    elif Path(corpus).is_dir():
        found = _read_files(Path(corpus), left_out)
    else:
        raise UsageError(
            f"--corpus {corpus} is not a folder; use a folder of text files, stdlib, or hf:NAME"
        )
    documents = list(_first_bytes(found, max_bytes))
    if not documents:
        raise UsageError(
            f"--corpus {corpus} holds no text files{f' ({left_out})' if left_out.found else ''}; "
            "use a folder with UTF-8 text, or stdlib"
        )
    if left_out.found and own_rank() == 0:
        print(f"note: --corpus {corpus}: {left_out}", file=sys.stderr)
    return documents


class LeftOut:
    """What of a folder was not read, by the reason."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, reason: str, path: Path) -> None:
        self.found.setdefault(reason, []).append(path.as_posix())

    def __str__(self) -> str:
        parts = []
        for reason, paths in sorted(self.found.items()):
            names = ", ".join(sorted(paths)[:SHOWN])
            more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
            parts.append(f"{len(paths)} {reason}: {names}{more}")
        return f"left out: {'; '.join(parts)}"


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into training and validation, about 5 % of the bytes, by whole documents.

    A document's hash decides, so copies of one document stay on one side and nothing leaks. In
    hash order documents go to validation until it holds 5 %; one that would take it past 10 % is
    passed over. A corpus of one document is cut in two. Both splits keep the corpus's order.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[_digest(document)] = sizes.get(_digest(document), 0) + len(document.encode())
    if len(sizes) == 1:
        return _cut(documents[0])
    total = sum(sizes.values())
    chosen: set[str] = set()
    held = 0
    for name in sorted(sizes):
        if held < VALIDATION_SHARE * total and held + sizes[name] <= 2 * VALIDATION_SHARE * total:
            chosen.add(name)
            held += sizes[name]
    if not chosen:
        chosen.add(min(sizes, key=lambda name: (sizes[name], name)))
    training = [document for document in documents if _digest(document) not in chosen]
    return training, [document for document in documents if _digest(document) in chosen]


def corpus_digest(documents: Iterable[str]) -> str:
    """SHA-256 of the documents and of where each ends."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(bytes.fromhex(_digest(document)))
    return whole.hexdigest()


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _read_files(root: Path, left_out: LeftOut, only_suffix: str = "") -> Iterator[str]:
    for name in sorted(_files(root, left_out, only_suffix), key=Path.as_posix):
        try:
            content = (root / name).read_bytes()
        except OSError as error:
            left_out.add(f"not readable ({error.strerror})", name)
            continue
        if only_suffix or _is_text(content):
            yield content.decode("utf-8", errors="replace")
        else:
            left_out.add("binary" if b"\0" in content else "not UTF-8", name)


def _files(root: Path, left_out: LeftOut, only_suffix: str) -> Iterator[Path]:
    """The files below `root`, relative to it. A folder that several links lead to is read once,
    where it really is if that is below `root`: so links in a circle have an end."""
    unwanted = _NOT_LIBRARY if only_suffix else set()
    seen: set[tuple[int, int]] = set()
    starts = [root]
    for start in starts:  # grows: after each folder the folders that links in it lead to
        links = []
        if start != root and _identity(start) in seen:
            left_out.add("links to folders that are read already", start.relative_to(root))
            continue
        for folder, subfolders, names in os.walk(start, onerror=_told(left_out, root)):
            seen.add(_identity(Path(folder)))
            below = [Path(folder, s) for s in subfolders if s not in unwanted and s[0] != "."]
            links += [path for path in below if path.is_symlink()]
            subfolders[:] = [path.name for path in below if _identity(path) not in seen]
            for path in (Path(folder, name) for name in names if _is_wanted(name, only_suffix)):
                if path.is_file():
                    yield path.relative_to(root)
                else:
                    reason = "broken links" if path.is_symlink() else "no regular files"
                    left_out.add(reason, path.relative_to(root))
        starts += sorted(links)


def _is_wanted(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not name.startswith(".")


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _told(left_out: LeftOut, root: Path) -> Callable[[OSError], None]:
    """For `os.walk`, which passes over a folder that it cannot list."""
    return lambda error: left_out.add(
        f"not readable ({error.strerror})", Path(error.filename).relative_to(root)
    )


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _hugging_face(corpus: str) -> Iterator[str]:
    name, _, config = corpus.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(
            f"--corpus {corpus} needs the datasets library; run: pip install datasets"
        ) from None
    try:
        rows = load_dataset(name, config or None, split="train", streaming=True)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--corpus {corpus} cannot be loaded: {error}") from error
    except OSError as error:
        raise RunError(f"--corpus {corpus} cannot be downloaded: {error}") from error
    for row in rows:
        texts = [row["text"]] if "text" in row else [v for v in row.values() if isinstance(v, str)]
        if not texts:
            raise UsageError(f"--corpus {corpus} has no column of text: {', '.join(row)}")
        yield texts[0]


def _first_bytes(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    left = max_bytes
    for document in documents:
        if left is not None and len(document.encode()) > left:
            start = document.encode()[:left].decode(errors="ignore")
            document, left = start[: start.rfind("\n") + 1] or start, 0
        elif left is not None:
            left -= len(document.encode())
        if document:
            yield document
        if left == 0:
            return


def _cut(document: str) -> tuple[list[str], list[str]]:
    at = int(len(document) * (1 - VALIDATION_SHARE))
    at = document.rfind("\n", 0, at) + 1 or at
    if not 0 < at < len(document):
        raise UsageError("--corpus holds one document, too short to split; use more text")
    return [document[:at]], [document[at:]]


def _digest(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()
