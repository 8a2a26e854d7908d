"""One split of a folder of token shards, opened: the windows that a model is trained on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from distlab.data.shards import SPLITS, TOKENIZER, damage, is_whole, read_index
from distlab.data.tokenizer import load_tokenizer
from distlab.errors import RunError, UsageError

REMEDY = "write the shards again: only what is damaged is made anew"


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids, in memory-mapped pieces; `directory` is where they lie, if anywhere.

    `fingerprint` is a hash of the ids and of the tokenizer: two equal ones are the same data.
    """

    shards: tuple[np.ndarray, ...]
    vocab_size: int
    fingerprint: str
    directory: Path | None = None

    def __len__(self) -> int:
        """The number of tokens."""
        return int(self._ends[-1])

    @property
    def validation(self) -> "Tokens":
        """The validation split of the same folder; no document is in both."""
        return open_tokens(self._folder, "validation")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return load_tokenizer(self._folder / TOKENIZER)

    def num_windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` inputs and as many targets there are.

        Window i has the inputs [i·seq_len, (i+1)·seq_len) and the targets one further, so every
        token but the first is a target once (a rest shorter than a window is left out).
        Raises `UsageError` when there is none.
        """
        count = (len(self) - 1) // seq_len
        if count < 1:
            raise UsageError(
                f"--seq-len {seq_len} needs {seq_len + 1} tokens and this split has {len(self)}; "
                f"use --seq-len {max(1, len(self) - 1)} or less, or a larger --corpus-mb"
            )
        return count

    def windows(self, indices: Sequence[int] | np.ndarray, seq_len: int) -> np.ndarray:
        """Windows `indices`, int64 [n, seq_len + 1]: inputs are [:, :-1], targets [:, 1:]."""
        out = np.empty((len(indices), seq_len + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            self._copy(int(index) * seq_len, out[row])
        return out

    def unigram_entropy(self) -> float:
        """Entropy in nats of the token frequencies: the loss of the best model without context."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for shard in self.shards:
            counts += np.bincount(shard, minlength=self.vocab_size)
        shares = counts[counts > 0] / len(self)
        return float(-np.sum(shares * np.log(shares)))

    def verify(self) -> int:
        """Read every shard of the folder back against its SHA-256; returns how many there are.

        Raises `RunError` naming the first that differs.
        """
        entries = read_index(self._folder)["shards"].values()
        for entry in entries:
            if not is_whole(self._folder, entry):
                raise RunError(
                    f"{self._folder / entry['file']} is corrupt: its SHA-256 is not the index's; "
                    f"{REMEDY}"
                )
        return len(entries)

    def _copy(self, start: int, out: np.ndarray) -> None:
        """Copy the len(out) tokens from `start` on, over as many shards as they lie in."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(out):
            offset = start + filled - int(self._ends[shard] - len(self.shards[shard]))
            piece = self.shards[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(shard) for shard in self.shards])

    @property
    def _folder(self) -> Path:
        if self.directory is None:
            raise ValueError("these tokens were not opened from a folder")
        return self.directory


def open_tokens(directory: str | Path, split: str = "train") -> Tokens:
    """Open a split (train or validation) of a folder that `write_shards` made.

    Nothing is read yet but the index, and the length of each file. Raises `RunError` naming the
    file when a shard is missing or truncated; `Tokens.verify` reads the contents too.
    """
    if split not in SPLITS:
        raise ValueError(f"{split} is no split; use {' or '.join(SPLITS)}")
    directory = Path(directory)
    index = read_index(directory)
    dtype = np.dtype(index["dtype"])
    shards = []
    identity = [index["tokenizer_sha256"]]
    for file in (name for name in index["files"] if name.startswith(split)):
        entry = index["shards"].get(file)
        wrong = damage(directory, entry, dtype.itemsize) if entry else "was not finished"
        if entry is None or wrong:
            raise RunError(f"{directory / file} {wrong}; {REMEDY}")
        shards.append(np.memmap(directory / file, dtype=dtype, mode="r"))
        identity.append(entry["sha256"])
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Tokens(tuple(shards), index["vocab_size"], fingerprint, directory)
