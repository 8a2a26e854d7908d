"""Task 6, diagnose-hang: from what every rank has recorded, why a job stands still."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HEALTHY = "healthy"
MISSING_RANK = "missing rank"  # its process is gone: it has left no dump
STRAGGLER = "straggler"  # it is still computing, while all others wait for it
RANK_ONLY = "rank-only collective"  # it calls a collective that no other rank calls anywhere
ORDER_SWAP = "order swap"  # it calls what the others call, but in another order
MISMATCH = "mismatch"  # it makes the others' call, with another shape or dtype


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a job."""

    cause: str  # one of the six above
    rank: int | None = None  # the one to blame; None of a healthy job
    seq: int | None = None  # the first collective that it does otherwise, or has not come to;
    # None of a healthy job and of a missing rank, of which nobody knows how far it came


def diagnose(dumps: Sequence[dict[str, Any]], world_size: int) -> Diagnosis:
    """What the ranks' dumps, taken at one moment, in any order, say of their job.

    A dump is {"rank": 1, "entries": [...], "stack": [...]}: what torch's flight recorder holds, the
    oldest first, and where the main thread is. An entry is {"seq": 6, "op": "all_reduce",
    "shape": [64, 8], "dtype": "Float", "stack": [...]}: seq counts the collectives of a process
    group on each rank, from 1; stack is the place of the call. The recorder is a ring: the oldest
    entries are overwritten, so dumps of one job may begin at different numbers. A stack is a list
    of {"function": "train", "file": "train.py", "line": 91}, the innermost first. A main thread
    that waits for a collective is in a function called wait.

    At least three ranks are in a job, and at most one has a fault; what the majority does is right.
    Two calls are the same when they stand at the same place: the file and line of their innermost
    frame; by which way a rank came there does not matter. After the first wrong collective the
    later ones are wrong too; they are consequences. Two shapes differ also where they have as many
    elements.

    A straggler is not in wait and has called fewer collectives than each of the others, perhaps
    none yet, and all of these are in wait. In a healthy job, too, some ranks may be further than
    others, as long as not all the others wait for one. The dumps are not changed.
    """
    raise NotImplementedError("diagnose_hang.diagnose is yours to write")
