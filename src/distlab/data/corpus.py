"""Real text: the standard library's sources (no download), a folder, or a Hugging Face data set."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from distlab.errors import RunError, UsageError

VALIDATION_SHARE = 0.05
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def read_corpus(corpus: str = "stdlib", max_bytes: int | None = None) -> list[str]:
    """The documents of `corpus`, in an order that does not depend on the machine.

    `corpus` is `stdlib` (the .py files of this Python, without its tests and installed packages),
    a folder of text files (read recursively, hidden and binary files left out), or
    `hf:NAME[:CONFIG]`, the train split of a Hugging Face data set. Files come sorted by relative
    path. The first `max_bytes` bytes are kept, the last document cut at a line's end.

    Raises `UsageError` when the corpus is missing, empty, or not readable here.
    """
    if corpus == "stdlib":
        found = _read_files(_standard_library(), only_suffix=".py")
    elif corpus.startswith("hf:"):
        found = _hugging_face(corpus)
    elif Path(corpus).is_dir():
        found = _read_files(Path(corpus))
    else:
        raise UsageError(
            f"--corpus {corpus} is not a folder; use a folder of text files, stdlib, or hf:NAME"
        )
    documents = list(_first_bytes(found, max_bytes))
    if not documents:
        raise UsageError(
            f"--corpus {corpus} holds no text files; use a folder with UTF-8 text, or stdlib"
        )
    return documents


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


def _read_files(root: Path, only_suffix: str = "") -> Iterator[str]:
    for path in sorted(_files(root, only_suffix), key=lambda p: p.relative_to(root).as_posix()):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"--corpus: {path} cannot be read: {error.strerror}") from error
        if only_suffix or _is_text(content):
            yield content.decode("utf-8", errors="replace")


def _files(root: Path, only_suffix: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        unwanted = _NOT_LIBRARY if only_suffix else set()
        subfolders[:] = [s for s in subfolders if s not in unwanted and not s.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.endswith(only_suffix) and not name.startswith(".") and path.is_file():
                yield path


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
