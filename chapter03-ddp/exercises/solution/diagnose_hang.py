"""Task 6, diagnose-hang: the reference solution."""

from collections import Counter
from dataclasses import dataclass

HEALTHY, MISSING_RANK, STRAGGLER = "healthy", "missing rank", "straggler"
RANK_ONLY, ORDER_SWAP, MISMATCH = "rank-only collective", "order swap", "mismatch"


@dataclass(frozen=True)
class Diagnosis:
    cause: str
    rank: int | None = None
    seq: int | None = None


def diagnose(dumps, world_size):
    calls = {dump["rank"]: {e["seq"]: e for e in dump["entries"]} for dump in dumps}
    if missing := set(range(world_size)) - calls.keys():
        return Diagnosis(MISSING_RANK, min(missing))
    for seq in sorted(set().union(*calls.values())):
        at_seq = {rank: own[seq] for rank, own in calls.items() if seq in own}
        usual = Counter(map(whole, at_seq.values())).most_common(1)[0][0]
        for rank, call in at_seq.items():
            if whole(call) != usual:
                return Diagnosis(kind(call, usual, rank, calls), rank, seq)
    last = {rank: max(own, default=0) for rank, own in calls.items()}
    slowest = min(last, key=last.__getitem__)
    others = calls.keys() - {slowest}
    waiting = {d["rank"] for d in dumps if d["stack"] and d["stack"][0]["function"] == "wait"}
    if waiting == others and all(last[rank] > last[slowest] for rank in others):
        return Diagnosis(STRAGGLER, slowest, last[slowest] + 1)
    return Diagnosis(HEALTHY)


def kind(call, usual, rank, calls):
    if place(call) == usual[0] and call["op"] == usual[1]:
        return MISMATCH
    elsewhere = (e for other, own in calls.items() if other != rank for e in own.values())
    return ORDER_SWAP if place(call) in map(place, elsewhere) else RANK_ONLY


def whole(call):
    return place(call), call["op"], tuple(call["shape"]), call["dtype"]


def place(call):
    return call["stack"][0]["file"], call["stack"][0]["line"]
