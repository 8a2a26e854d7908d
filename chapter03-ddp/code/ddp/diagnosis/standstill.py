"""Judges of a job that stands still: who waits where, for whom, and where the ranks parted.

The first collective that is not the same on all ranks is told by two sources. The flight recorder
has every collective, those of DDP too, but dies with its process. The black box has the last few
that Python called, and outlives it.

A rank that lives and tells nothing has no thread of Python that can run, its agent's neither: so it
is when compiled code keeps Python's lock, the GIL. The stack is asked for by a signal then, which
faulthandler answers from C; on another machine the last line that was heard of must do.
"""

import ast
import os
import re
import signal
import socket
import sysconfig
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ddp.diagnosis.evidence import Call, Place, Rank, Verdict, as_place, shown, source

LOCKS = re.compile(r"\.acquire\(|\bwith\b.*lock\b", re.IGNORECASE)
GO_WITH_THE_OTHERS = (
    "Let every rank call it, in the same order: take it out of what only some ranks do."
)
OF_ONE_RANK = ("rank", "is_main", "master", "coordinator")  # in the test of an `if`
PATIENCE = 2.0  # times the stall: a busy machine may keep a thread from running for a moment
ANSWER_S = 0.5
FRAME = re.compile(r'File "(.+)", line (\d+) in (.+)')


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


def first_difference(ranks: list[Rank]) -> Verdict | None:
    """By the flight recorders: operation, shapes and dtypes, call by call."""
    table: dict[tuple[str, int], dict[int, Call]] = defaultdict(dict)
    for rank in ranks:
        for key, call in rank.calls.items():
            table[key][rank.number] = call
    return _first(ranks, table)


def box_difference(ranks: list[Rank]) -> Verdict | None:
    """By the black boxes of ranks that have died."""
    table: dict[tuple[str, int], dict[int, Call]] = defaultdict(dict)
    for rank in ranks:
        for note in rank.box:
            call = Call(
                "python", note["call"], note["op"], _list(note["shapes"]), _list(note["dtypes"]),
                note["t"], None, as_place(note["place"]),
            )  # fmt: skip
            table["python", call.seq][rank.number] = call
    return _first(ranks, table)


def _list(values: list[object]) -> str:
    return ", ".join(str(value) for value in values)


def _first(ranks: list[Rank], table: dict[tuple[str, int], dict[int, Call]]) -> Verdict | None:
    for key in sorted(table, key=lambda key: min(c.created for c in table[key].values())):
        calls = table[key]
        if len({call.signature for call in calls.values()}) > 1:
            history = [other for other in table if other[0] == key[0] and other[1] < key[1]]
            before = {
                rank.number: [table[k][rank.number] for k in history if rank.number in table[k]]
                for rank in ranks
            }
            return _judge(calls, before)
    return None


@dataclass(frozen=True)
class Pair:
    """Two ranks' different calls at the same point, and whether the other has made them before."""

    one: Call
    other: Call
    one_is_known: bool
    other_is_known: bool


def _judge(calls: dict[int, Call], before: dict[int, list[Call]]) -> Verdict:
    """An order, a call that only some make, or a shape: by what each has called before."""
    one, other = _two_kinds(calls)
    pair = Pair(
        calls[one], calls[other], _made(before[other], calls[one]), _made(before[one], calls[other])
    )
    told = (
        f"At the same point, rank {one} calls {pair.one} ({shown(pair.one.place)}) and "
        f"rank {other} {pair.other} ({shown(pair.other.place)})."
    )
    if pair.one_is_known and pair.other_is_known:
        return Verdict(
            "collective_order", one, pair.one.place,
            f"{told} Both have called both before, in the same order.",
            "Make the order the same everywhere: by sorted names, never by a rank's own data, nor "
            "by a set's order.",
            str(pair.one),
        )  # fmt: skip
    if pair.one.op == pair.other.op and _same_line(pair.one, pair.other):
        odd = other if pair.one_is_known else one if pair.other_is_known else max(one, other)
        return Verdict(
            "shape_mismatch", odd, calls[odd].place, told,
            "Bring the same shape and dtype on every rank: pad, or agree on the sizes first. "
            "TORCH_DISTRIBUTED_DEBUG=DETAIL checks each call before it is made, at a cost.",
            str(calls[odd]),
        )  # fmt: skip
    extra = other if _is_extra(pair) else one
    return Verdict(
        "rank_only_collective", extra, calls[extra].place,
        f"{told} Rank {other if extra == one else one} does not make the call at "
        f"{shown(calls[extra].place)}.",
        GO_WITH_THE_OTHERS,
        str(calls[extra]),
    )  # fmt: skip


def _two_kinds(calls: dict[int, Call]) -> tuple[int, int]:
    """A rank of the rarest kind, or the lowest, and one of another kind."""
    groups: dict[object, list[int]] = defaultdict(list)
    for number, call in sorted(calls.items()):
        groups[call.signature].append(number)
    rarest = min(groups.values(), key=lambda numbers: (len(numbers), numbers))
    other = next(numbers for numbers in groups.values() if numbers is not rarest)
    return rarest[0], other[0]


def _made(before: list[Call], call: Call) -> bool:
    """Whether such a call is among those made before, from the same line where that is known."""
    return any(old.signature == call.signature and _same_line(old, call) for old in before)


def _same_line(one: Call, other: Call) -> bool:
    return one.place is None or other.place is None or one.place[:2] == other.place[:2]


def _is_extra(pair: Pair) -> bool:
    """Whether the second call is the one that only its rank makes."""
    if pair.one_is_known != pair.other_is_known:
        return pair.one_is_known
    return for_some_ranks(pair.other.place) and not for_some_ranks(pair.one.place)


def for_some_ranks(place: Place | None) -> bool:
    """Whether a line stands under an `if` that asks for the rank."""
    return place is not None and any(
        begin <= place[1] <= end for begin, end in _lines_for_some_ranks(place[0])
    )


@cache
def _lines_for_some_ranks(file: str) -> list[tuple[int, int]]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return []
    ranges = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and any(w in ast.unparse(node.test) for w in OF_ONE_RANK):
            ranges.append((node.body[0].lineno, node.body[-1].end_lineno or node.body[0].lineno))
    return ranges


def silent_rank(ranks: list[Rank], stall_after: float) -> Verdict | None:
    for rank in ranks:
        lives = rank.died is None and rank.exit is None
        quiet = time.time() - rank.heard
        if lives and quiet > PATIENCE * stall_after:
            place = asked(rank) or rank.place
            return Verdict(
                "silent_rank", rank.number, place,
                f"{rank.name.capitalize()} lives, but has told nothing for {quiet:.1f} s: no "
                f"thread of its Python can run. It is at {shown(place)}.",
                "Compiled code there keeps the GIL: a C extension, a lock in one, a debugger, or "
                "a process that was stopped.",
            )  # fmt: skip
    return None


def asked(rank: Rank) -> Place | None:
    """The main thread's own line, by a signal to a process of this machine."""
    if rank.host != socket.gethostname():
        return None
    with suppress(ProcessLookupError, PermissionError):
        os.kill(rank.hello["pid"], signal.SIGUSR2)
        time.sleep(ANSWER_S)
    main_thread = (
        rank.crash_file.read_text(errors="replace", encoding="utf-8").rstrip().rpartition("\n\n")[2]
    )
    libraries = ("<", sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    for file, line, function in FRAME.findall(main_thread):
        if not file.startswith(libraries):
            return file, int(line), function
    return None
