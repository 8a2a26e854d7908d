"""The loss on held-out text, each rank computing its share, exact for any number of ranks."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distlab.data import END_OF_TEXT_ID, Tokens
from distlab.model import Llama
from distlab.runtime import Runtime

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Mixed precision, or nothing for float32."""
    narrow = dtype != "float32"
    return torch.autocast(device.type, DTYPES[dtype] if narrow else None, enabled=narrow)


class HeldOut:
    """So many windows of `tokens`, the validation split, from all over it, shared by the ranks.

    `batch_size` is that of all ranks together; products are computed in `dtype`, a name in DTYPES.
    """

    def __init__(
        self,
        tokens: Tokens,
        job: Runtime,
        *,
        windows: int,
        seq_len: int,
        batch_size: int,
        dtype: str = "float32",
    ) -> None:
        self.tokens, self.job, self.seq_len, self.dtype = tokens, job, seq_len, dtype
        self.batch_size = batch_size
        there = tokens.num_windows(seq_len)
        self.count = min(windows, there)
        self.windows = np.linspace(0, there, self.count, endpoint=False).astype(np.int64)
        self.counted = 0  # windows in the last loss, of all ranks

    @torch.no_grad()
    def loss(self, model: Llama) -> float:
        """Mean cross-entropy in nats over all windows.

        Sums and counts are added up, and divided at the end: the ranks may have one window more or
        less than each other, or none, and a mean of their means would be another number. All take
        equally many batches, since the forward pass of a sharded model is a collective: a rank
        that has none left computes the first window again, and counts it 0 times.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.job.device)
        share = self.windows[self.job.rank :: self.job.world_size]
        size = self.batch_size // self.job.world_size
        longest = -(-self.count // self.job.world_size)
        for start in range(0, longest, size):
            own = share[start : start + size]
            inputs, targets = self._batch(own if len(own) else self.windows[:1])
            with autocast(self.job.device, self.dtype):
                mean = model(inputs, targets=targets)
            total += total.new_tensor([len(own) * mean.item(), len(own)])
        dist.all_reduce(total)
        summed, counted = total.tolist()
        self.counted = round(counted)
        return summed / counted

    def bytes_per_token(self) -> float:
        """Of text, on average: a loss divided by it may be compared between vocabularies."""
        _, targets = self._batch(self.windows)
        counts = torch.bincount(targets.flatten(), minlength=self.tokens.vocab_size).cpu()
        written = [self.tokens.tokenizer.id_to_token(i) for i in range(len(counts))]
        lengths = torch.tensor([len(text or "") for text in written])  # a character for each byte
        lengths[END_OF_TEXT_ID] = 0
        return float((counts * lengths).sum() / counts.sum())

    def _batch(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(self.tokens.windows(windows, self.seq_len))
        rows = rows.to(self.job.device)
        return rows[:, :-1], rows[:, 1:]
