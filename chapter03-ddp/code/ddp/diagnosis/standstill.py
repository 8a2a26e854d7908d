"""The first collective that is not the same on all ranks: another order, shape, or one's own.

Two sources tell it. The flight recorder has every collective, those of DDP too, but dies with its
process. The black box has the last few that Python called, and outlives it.
"""

import ast
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from _diagnose_verdict import Verdict, shown
from _diagnose_watch import Call, Place, Rank, as_place

GO_WITH_THE_OTHERS = (
    "Let every rank call it, in the same order: take it out of what only some ranks do."
)
OF_ONE_RANK = ("rank", "is_main", "master", "coordinator")  # in the test of an `if`


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
