"""Judges of a job that stands still: who waits where, and for whom."""

import re
import time

from _diagnose_difference import GO_WITH_THE_OTHERS, first_difference
from _diagnose_verdict import Verdict, shown, source
from _diagnose_watch import Call, Place, Rank, as_place

LOCKS = re.compile(r"\.acquire\(|\bwith\b.*lock\b", re.IGNORECASE)


def stalled_since(ranks: list[Rank], stall_after: float) -> float | None:
    """When the last rank began to wait, if all have waited for `stall_after` seconds.

    None while one works, or while none is in a collective; and while a rank has not told for half
    of that time that it waits: it may be one that cannot tell anything.
    """
    world = ranks[0].hello["world"] if ranks else 0
    if len(ranks) < world or not any(rank.pulse.get("pending") for rank in ranks):
        return None
    moments = [rank.stuck_since() for rank in ranks]
    known = [moment for moment in moments if moment is not None]
    if len(known) < len(moments) or time.time() - max(known) <= stall_after:
        return None
    living = [rank for rank in ranks if rank.lives]
    told = min((rank.pulse["t"] for rank in living), default=time.time())
    return max(known) if told - max(known) > stall_after / 2 else None


def judge_stall(ranks: list[Rank]) -> Verdict | None:
    """Why a job of which every rank waits does not go on."""
    return (
        lock_held(ranks)
        or batches_ran_out(ranks)
        or first_difference(ranks)
        or somebody_does_not_come(ranks)
        or nothing_comes_through(ranks)
    )


def lock_held(ranks: list[Rank]) -> Verdict | None:
    """A thread waits for a lock, another of the same process is in a collective."""
    held: list[tuple[Rank, Call, Place | None]] = []
    told = []
    for rank in ranks:
        waiting = {call.thread: call for call in rank.pending()}
        threads = rank.told("report")[-1]["threads"] if rank.told("report") else []
        blocked = [t for t in threads if LOCKS.search(source(as_place(t["own"][0])))]
        holders = [t for t in threads if t["ident"] in waiting and t not in blocked]
        if blocked and holders:
            call, lock = waiting[holders[0]["ident"]], as_place(blocked[0]["own"][0])
            place = call.place or as_place(holders[0]["own"][0])
            held.append((rank, call, place))
            told.append(
                f"on {rank.name} {holders[0]['name']} is in {call.op} at {shown(place)} while "
                f"{blocked[0]['name']} waits for a lock at {shown(lock)}"
            )
    if not held:
        return None
    rank, call, place = held[0]
    evidence = "; ".join(told)
    return Verdict(
        "lock_deadlock", rank.number, place, f"{evidence[0].upper()}{evidence[1:]}.",
        "Hold no lock while waiting for other ranks: copy under the lock, let go of it, then "
        "communicate.",
        str(call),
    )  # fmt: skip


def batches_ran_out(ranks: list[Rank]) -> Verdict | None:
    """A rank's loader has come to its end, another has drawn one more batch of it."""
    ended = {rank.number: rank.told("exhausted")[-1] for rank in ranks if rank.told("exhausted")}
    for rank in ranks:
        last = ended.get(rank.number)
        drawn = rank.pulse.get("counts", {})
        for other in ranks:
            theirs = ended.get(other.number)
            if theirs is None or theirs is last or theirs["loader"] is None:
                continue
            more = drawn.get(f"loader{theirs['loader']}", 0)
            passes = len(rank.told("exhausted")), len(other.told("exhausted"))
            if passes[0] < passes[1] and more > theirs["drawn"]:
                return Verdict(
                    "uneven_last_batch", rank.number, as_place(theirs["place"]),
                    f"{rank.name.capitalize()} has drawn batch {more}, but {other.name} had only "
                    f"{theirs['drawn']} and has left the loop: nobody answers {rank.name}.",
                    "Give every rank as many batches (DistributedSampler, drop_last), or train "
                    "within `with Join([model]):`.",
                    _waits_in(rank),
                )  # fmt: skip
    return None


def _waits_in(rank: Rank) -> str | None:
    return str(rank.pending()[0]) if rank.pending() else None


def somebody_does_not_come(ranks: list[Rank]) -> Verdict | None:
    """Some ranks wait in a collective that another, which is elsewhere, has not called."""
    waiting = [rank for rank in ranks if rank.pending()]
    absent = [rank for rank in ranks if not rank.pending()]
    if not waiting or not absent:
        return None
    call, missing = waiting[0].pending()[0], absent[0]
    if missing.exit is not None:
        where = "has ended"
    else:
        where = f"stays at {shown(missing.place)}, `{source(missing.place)}`"
    return Verdict(
        "rank_only_collective", waiting[0].number, call.place,
        f"{waiting[0].name.capitalize()} waits in {call} at {shown(call.place)}; {missing.name} "
        f"has not called it and {where}.",
        GO_WITH_THE_OTHERS, str(call),
    )  # fmt: skip


def nothing_comes_through(ranks: list[Rank]) -> Verdict | None:
    """All ranks are in the same collective: then it is not the program that stops them."""
    calls = {rank.number: rank.pending()[0] for rank in ranks if rank.pending()}
    if len(calls) < len(ranks) or len({(c.group, c.seq) for c in calls.values()}) != 1:
        return None
    call = calls[ranks[0].number]
    unanswered = {
        rank.number: sorted(set(rank.told("report")[-1]["unanswered"]))
        for rank in ranks
        if rank.told("report") and rank.told("report")[-1]["unanswered"]
    }
    proof = "; ".join(
        f"what rank {number} on {ranks[number].host} sent to {', '.join(peers)} was never answered"
        for number, peers in unanswered.items()
    )
    return Verdict(
        "dead_link", min(unanswered, default=None), call.place,
        f"All {len(ranks)} ranks are in collective {call.seq}, {call}, at {shown(call.place)}"
        + (f"; {proof}." if proof else "; their hosts are " + hosts(ranks) + "."),
        "Look at the network between these hosts: cable, switch, firewall, the interface that "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names. The program is right.",
        str(call),
    )  # fmt: skip


def hosts(ranks: list[Rank]) -> str:
    return ", ".join(f"{rank.host} ({rank.name})" for rank in ranks)
