"""Token shards: text written once as memory-mapped files of token ids, by any number of workers.

A folder of shards holds `tokenizer.json`, `train_00000.bin` … and `validation_00000.bin` … (raw
little-endian ids, each document followed by the end-of-text token), and `index.json`, which names
every finished shard with its count and SHA-256. What the folder holds does not depend on how many
workers wrote it, nor on how often they were interrupted.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from distlab.data.corpus import corpus_digest, split_documents
from distlab.data.worker import Job, Pool
from distlab.errors import RunError, UsageError
from distlab.files import write_text

FORMAT = 1
INDEX, TOKENIZER = "index.json", "tokenizer.json"
SHARD_BYTES = 1 << 19  # of text; a shard holds whole documents, so a long one makes a longer shard
SPLITS = ("train", "validation")
_LOCK_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Written:
    """What a call of `write_shards` did: the shards it made, and those it found whole and kept."""

    made: list[str]
    kept: list[str]
    start_seconds: float  # until the workers were up
    seconds: float  # of tokenizing and writing, after that


def write_shards(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    vocab_size: int,
    directory: str | Path,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    on_shard: Callable[[str], None] = lambda file: None,
) -> Written:
    """Tokenize `documents` into the shards of `directory`, on `workers` processes.

    Shards that are there and whole are kept, so an interrupted or damaged folder is finished by
    calling again. Ids are uint16 where `vocab_size` fits, else uint32. One process writes at a
    time, others wait for it. `on_shard` is told of each shard that is done.

    Raises `UsageError` when the folder holds other shards, `RunError` when it cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{directory} is a file; name a folder for the shards") from None
    plan = _plan(documents, directory, shard_bytes)
    with _lock(directory):
        index = _begin(directory, documents, tokenizer, vocab_size, shard_bytes, plan)
        kept = {name for name, entry in index["shards"].items() if is_whole(directory, entry)}
        index["shards"] = {name: index["shards"][name] for name in sorted(kept)}
        missing = [job for job in plan if Path(job.path).name not in kept]
        workers = max(1, min(workers, len(missing)))
        begun = time.perf_counter()
        try:
            with Pool(directory / TOKENIZER, index["dtype"], workers) as pool:
                ready = time.perf_counter()
                for entry in pool.write(missing):
                    index["shards"][entry["file"]] = entry
                    _write_index(directory, index)
                    on_shard(entry["file"])
                done = time.perf_counter()
        except BaseException:
            _remove_partial(directory)  # a process that was killed while it wrote left its file
            raise
        made = [Path(job.path).name for job in missing]
        return Written(made, sorted(kept), ready - begun, done - ready)


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a folder of shards. Raises `RunError` when there is none, or a damaged one."""
    path = directory / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise RunError(f"{path} has format {index['format']}, not {FORMAT}; write it again")
        return index
    except FileNotFoundError:
        raise RunError(f"there are no token shards in {directory}: {INDEX} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged; delete it and write the shards again") from error


def damage(directory: Path, entry: dict[str, Any], item_bytes: int) -> str | None:
    """What is wrong with a shard's length: missing or truncated; None when nothing is."""
    path = directory / entry["file"]
    if not path.exists():
        return "is missing"
    size, expected = path.stat().st_size, entry["tokens"] * item_bytes
    return None if size == expected else f"has {size} bytes instead of {expected}"


def is_whole(directory: Path, entry: dict[str, Any]) -> bool:
    """The shard is there and its SHA-256 is the index's."""
    path = directory / entry["file"]
    if not path.is_file():
        return False
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == entry["sha256"]


def _plan(documents: Sequence[str], directory: Path, shard_bytes: int) -> list[Job]:
    """Consecutive documents of each split, cut into shards of about `shard_bytes` of text."""
    jobs = []
    for split, texts in zip(SPLITS, split_documents(documents), strict=True):
        groups: list[list[str]] = [[]]
        held = 0
        for text in texts:
            if held >= shard_bytes:
                groups.append([])
                held = 0
            groups[-1].append(text)
            held += len(text.encode())
        jobs += [
            Job(str(directory / f"{split}_{number:05d}.bin"), group)
            for number, group in enumerate(groups)
        ]
    return jobs


def _begin(
    directory: Path,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    vocab_size: int,
    shard_bytes: int,
    plan: Sequence[Job],
) -> dict[str, Any]:
    """The index to go on from; what an interrupted writer left under temporary names is removed."""
    begun = {
        "format": FORMAT,
        "corpus_sha256": corpus_digest(documents),
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "vocab_size": vocab_size,
        "shard_bytes": shard_bytes,
        "dtype": "<u2" if vocab_size <= 1 << 16 else "<u4",
        "files": [Path(job.path).name for job in plan],
        "shards": {},
    }
    _remove_partial(directory)
    if (directory / INDEX).exists():
        index = read_index(directory)
        if {**index, "shards": {}} != begun:
            raise UsageError(
                f"{directory} holds the shards of another text, vocabulary or shard size; "
                "name another folder, or delete it"
            )
        begun = index
    write_text(directory / TOKENIZER, tokenizer.to_str())
    _write_index(directory, begun)
    return begun


def _remove_partial(directory: Path) -> None:
    for temporary in directory.glob(".*.bin"):
        temporary.unlink()


def _write_index(directory: Path, index: dict[str, Any]) -> None:
    index["shards"] = dict(sorted(index["shards"].items()))
    write_text(directory / INDEX, json.dumps(index, indent=1) + "\n")


def _lock(directory: Path) -> AbstractContextManager[object]:
    try:
        return FileLock(directory / ".lock").acquire(timeout=_LOCK_TIMEOUT_S)
    except Timeout:
        raise RunError(
            f"another process has been writing {directory} for {_LOCK_TIMEOUT_S // 60} minutes; "
            "end it and run again"
        ) from None
