"""Batches for each rank: deterministic, disjoint, and resumable to the exact batch.

All ranks agree on one endless stream of windows: a permutation of all of them for each epoch, one
after another. Global batch t is samples [t·B, (t+1)·B) of that stream, and rank r of K takes the
r-th b = B/K of them. So a position in the stream is the whole state, and a job may go on with
another K.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from distlab.data.prefetch import Batch, Prefetcher
from distlab.data.tokens import Tokens
from distlab.errors import UsageError


class Loader:
    """An endless iterator of (input_ids, targets), int64 [b, seq_len] on `device`.

    An epoch's last windows that do not fill a global batch begin the next one, together with the
    first of the next epoch: no window is left out, none comes twice in an epoch. With `prefetch`
    above 0 a thread keeps that many batches ready, and copies them to a CUDA device beside what
    runs there.

    Raises `UsageError` when `batch_size` (global, in sequences) is not a multiple of `world_size`,
    or the tokens are fewer than one window.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        prefetch: int = 0,
    ) -> None:
        if batch_size % world_size:
            below = batch_size // world_size * world_size
            fitting = [str(size) for size in (below, below + world_size) if size]
            raise UsageError(
                f"--batch-size {batch_size} is not divisible by {world_size} ranks; "
                f"use {' or '.join(fitting)}"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.rank = rank
        self.local_batch_size = batch_size // world_size
        self.seed = seed
        self.num_windows = tokens.num_windows(seq_len)
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.samples_consumed = 0
        self._orders: dict[int, np.ndarray] = {}
        self._prefetcher: Prefetcher | None = None

    @property
    def epoch(self) -> float:
        """How often the windows have been gone through, by all ranks together."""
        return self.samples_consumed / self.num_windows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.prefetch and self._prefetcher is None:
            start, step = self.samples_consumed, self.batch_size
            self._prefetcher = Prefetcher(
                lambda count: self._batch(start + count * step), self.device, self.prefetch
            )
        if self._prefetcher is not None:
            batch = next(self._prefetcher)
        else:
            inputs, targets = self._batch(self.samples_consumed)
            batch = inputs.to(self.device), targets.to(self.device)
        self.samples_consumed += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in JSON's types; the same on every rank."""
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "samples_consumed": self.samples_consumed,
            "fingerprint": self.tokens.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was handed out, with any world size and batch size.

        Raises `UsageError` when the state is of other data or another sequence length.
        """
        if state["fingerprint"] != self.tokens.fingerprint:
            raise UsageError(
                "the checkpoint was trained on other data; use the --corpus, --corpus-mb and "
                "--vocab-size it was begun with"
            )
        if state["seq_len"] != self.seq_len:
            raise UsageError(
                f"--seq-len {self.seq_len} is not the checkpoint's; use {state['seq_len']}"
            )
        self.close()
        self._orders.clear()
        self.seed = state["seed"]
        self.samples_consumed = state["samples_consumed"]

    def close(self) -> None:
        """End the prefetching thread; the next batch starts another."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def window_indices(self, position: int) -> np.ndarray:
        """This rank's windows of the global batch that begins at sample `position`, int64 [b]."""
        first = position + self.rank * self.local_batch_size
        samples = np.arange(first, first + self.local_batch_size)
        epochs, places = np.divmod(samples, self.num_windows)
        return np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def _batch(self, position: int) -> Batch:
        windows = torch.from_numpy(self.tokens.windows(self.window_indices(position), self.seq_len))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of the windows in `epoch`; two are kept, since a batch may span them.

        NumPy keeps a bit generator's raw output the same in all versions, but not what
        `Generator.permutation` makes of it (NEP 19): so a resumed run sorts raw numbers itself.
        """
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            self._orders[epoch] = np.argsort(raw.random_raw(self.num_windows), kind="stable")
        return self._orders[epoch]
