"""Judges of a job that has lost a rank: who ended first, how, and where it was."""

import re

from _diagnose_difference import GO_WITH_THE_OTHERS, box_difference, first_difference
from _diagnose_verdict import Verdict, shown, source
from _diagnose_watch import Place, Rank, as_place

LOST_PEER = re.compile(r"[Cc]onnection|peer|[Bb]roken pipe|[Tt]imed out|NCCL")
SIZE_MISMATCH = "Received data size doesn't match expected size"  # gloo's words as it aborts


def silent_deaths(ranks: list[Rank]) -> list[Rank]:
    """The ranks that ended without a word, the first first."""
    gone = [rank for rank in ranks if rank.died is not None and rank.exit is None]
    return sorted(gone, key=lambda rank: rank.died or 0.0)


def judge_death(ranks: list[Rank], errors: str) -> Verdict | None:
    """What ended a rank of a job that ended with an error; `errors` is what the job wrote."""
    difference = first_difference(ranks) or box_difference(ranks)
    if difference is not None:
        return difference
    gone = silent_deaths(ranks)
    if not gone or gone[0].died is None:
        return None
    rank = gone[0]
    if any(other.failed and not lost_a_peer(other) for other in ranks):
        return None  # that one failed by itself, and the launcher ended this one
    if rank.crash:
        return crashed(rank, errors)
    return Verdict(
        "killed_rank", rank.number, rank.place,
        f"{rank.name.capitalize()} (process {rank.hello['pid']} on {rank.host}) ended without a "
        f"last word: no exception, no crash. It was last seen at {shown(rank.place)}. The others "
        "lost their connection to it.",
        "Ask the kernel's log (`dmesg`: out of memory?), the scheduler and the host who killed it. "
        "Start from the last checkpoint: torchrun --max-restarts.",
    )  # fmt: skip


def lost_a_peer(rank: Rank) -> bool:
    """Whether a rank that failed says that it was for want of another."""
    words = [str(event["error"]) for kind in ("failed", "exit") for event in rank.told(kind)]
    return any(LOST_PEER.search(text) for text in words)


def crashed(rank: Rank, errors: str) -> Verdict:
    last = rank.box[-1] if rank.box else None
    place: Place | None = as_place(last["place"]) if last else rank.place
    if SIZE_MISMATCH in errors and last is not None:
        return Verdict(
            "rank_only_collective", rank.number, place,
            f"{rank.name.capitalize()} aborted in {last['op']} at {shown(place)}: another rank "
            "sent what does not belong to this call.",
            GO_WITH_THE_OTHERS, last["op"],
        )  # fmt: skip
    first_line = rank.crash.splitlines()[0]
    return Verdict(
        "crashed_rank", rank.number, place,
        f"{rank.name.capitalize()}: {first_line}. It was last seen at {shown(place)}, "
        f"`{source(place)}`.",
        "The fault is in compiled code: look at its own message above the verdict.",
    )  # fmt: skip
