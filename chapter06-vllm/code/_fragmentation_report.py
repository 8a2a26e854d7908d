"""fragmentation.py's table and figures."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distlab.script import Run

if TYPE_CHECKING:
    from fragmentation import Usage


@dataclass(frozen=True)
class Row:
    """One allocator's use of `capacity` tokens, and the sequences predicted to fit at once.

    `tokens` are those of all requests, `left` those of the cache that had not come back at the end.
    """

    name: str
    block_size: int  # 0: contiguous
    capacity: int
    usage: "Usage"
    predicted: float
    tokens: int
    left: int

    @property
    def sequences(self) -> float:
        """That run at once, on average."""
        return self.usage.running / self.usage.steps

    @property
    def waste(self) -> float:
        """Tokens that a sequence holds and that no token will use, on average: internal waste.

        A paged sequence's last block counts as waste as far as it is empty at that moment.
        """
        usage = self.usage
        empty = usage.internal + (usage.future if self.block_size else 0)
        return empty / usage.running

    def percent(self, tokens: float) -> float:
        return 100 * tokens / self.usage.steps / self.capacity

    @property
    def shares(self) -> list[float]:
        """Percent of the cache: tokens, reserved for later, never used, given to nobody."""
        held = [self.usage.live, self.usage.future, self.usage.internal]
        parts = [self.percent(tokens) for tokens in held]
        return [*parts, 100 - sum(parts)]


SHARES = ["tokens", "reserved for later", "never used", "not given out"]


def show(run: Run, args: Namespace, rows: Sequence[Row]) -> None:
    run.table(
        "use",
        ["allocator", *(f"{name} %" for name in SHARES), "sequences", "predicted",
         "waste per sequence", "recomputed %"],
        [[row.name, *row.shares, row.sequences, row.predicted, row.waste,
          100 * row.usage.recomputed / row.tokens]
         for row in rows],
        caption=f"Use of a cache of {args.capacity:,} tokens under full load; means over the steps",
    )  # fmt: skip
    reserved, *_ = rows
    paged = [row for row in rows if row.block_size]
    usual = min(paged, key=lambda row: abs(row.block_size - 16))
    for row in (reserved, usual, paged[-1]):
        run.compare(f"sequences at once, {row.name}", row.predicted, row.sequences)
    run.compare(
        f"waste per sequence, {usual.name}, (block size - 1) / 2",
        (usual.block_size - 1) / 2, usual.waste, "tokens",
    )  # fmt: skip
    run.metric(
        "gain", usual.sequences / reserved.sequences, "times as many sequences",
        f"{usual.name} against reservation",
    )  # fmt: skip


def draw(run: Run, rows: Sequence[Row]) -> None:
    run.figure(
        "fragmentation_use", kind="bar",
        title="Where the cache goes", x_label="allocator", y_label="% of the cache",
        series=[{"label": name, "x": [row.name for row in rows],
                 "y": [row.shares[i] for row in rows]} for i, name in enumerate(SHARES)],
    )  # fmt: skip
    paged = [row for row in rows if row.block_size]
    sizes = [row.block_size for row in paged]
    run.figure(
        "fragmentation_sequences", kind="line", log_x=True,
        title="Paging by block size, against contiguous pieces",
        x_label="block size (tokens)", y_label="sequences at once",
        series=[{"label": "paged, measured", "x": sizes, "y": [r.sequences for r in paged]},
                {"label": "predicted", "x": sizes, "y": [r.predicted for r in paged],
                 "dashed": True}],
        lines=[{"label": row.name, "y": row.sequences} for row in rows if not row.block_size],
    )  # fmt: skip
