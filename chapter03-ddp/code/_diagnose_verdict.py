"""A verdict: what is wrong, which rank, which collective, which line, and what to do about it."""

import linecache
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _diagnose_watch import Place, Rank

CAUSES = {
    "rank_only_collective": "a collective that not every rank calls",
    "collective_order": "the ranks call collectives in different orders",
    "shape_mismatch": "the ranks bring different shapes or types to one collective",
    "lock_deadlock": "a lock is held while its holder waits in a collective",
    "uneven_last_batch": "a rank has more batches than another",
    "dead_link": "all ranks are in the same collective, and no data comes through",
    "killed_rank": "a rank was killed from outside",
    "crashed_rank": "a rank crashed below Python",
    "silent_rank": "a rank no longer answers: its interpreter is blocked",
    "same_device": "ranks share a device while others are free",
    "forgotten_set_device": "no rank has chosen its device, so all use the first",
    "unsynced_parameters": "the ranks train different models",
    "unsynced_buffers": "the ranks hold different buffers",
    "nan_on_one_rank": "one rank's loss became not finite, and spread",
    "straggler": "the other ranks wait for one that is slow",
    "forgotten_set_epoch": "every epoch has the same order of examples",
}


@dataclass(frozen=True)
class Verdict:
    """The finding of one judge."""

    cause: str  # a key of CAUSES
    rank: int | None  # the culprit, where there is one
    place: Place | None
    what: str  # the evidence, in a sentence or two
    remedy: str
    collective: str | None = None

    def __post_init__(self) -> None:
        assert self.cause in CAUSES

    @property
    def where(self) -> str:
        return shown(self.place)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "where": self.where, "source": source(self.place)}

    def text(self, seconds: float) -> str:
        """The verdict as it is printed; `seconds` is how long it took since the trouble began."""
        rows = [
            ("cause", f"{self.cause}: {CAUSES[self.cause]}"),
            ("rank", "-" if self.rank is None else str(self.rank)),
            ("collective", self.collective or "-"),
            ("line", f"{self.where}: {source(self.place)}" if self.place else "unknown"),
            ("evidence", self.what),
            ("remedy", self.remedy),
            ("found after", f"{seconds:.1f} s"),
        ]
        wide = " " * len("diagnose: found after  ")
        return "\n".join(
            textwrap.fill(
                text, 100, initial_indent=f"diagnose: {name:<11}  ", subsequent_indent=wide
            )
            for name, text in rows
        )


def shown(place: Place | None) -> str:
    return f"{Path(place[0]).name}:{place[1]}" if place else "an unknown line"


def source(place: Place | None) -> str:
    return linecache.getline(place[0], place[1]).strip() if place else ""


def names(ranks: list[Rank]) -> str:
    """`rank 1`, or `ranks 0 and 2`."""
    numbers = [str(rank.number) for rank in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"
