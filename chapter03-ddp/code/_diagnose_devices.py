"""The judge of the map from ranks to devices: GPUs, or the cores that ranks were pinned to."""

from collections import Counter
from typing import Any

from _diagnose_verdict import Verdict, shown
from _diagnose_watch import Rank, as_place


def shared_device(ranks: list[Rank]) -> Verdict | None:
    """Ranks of one host that use one GPU, or were pinned to the same cores, while others idle."""
    for host in {rank.host for rank in ranks}:
        here = [rank for rank in ranks if rank.host == host]
        found = _shared_gpu(here) or _shared_cores(here)
        if found is not None:
            return found
    return None


def _shared_gpu(here: list[Rank]) -> Verdict | None:
    used = {rank.number: _gpu(rank) for rank in here}
    known = {number: gpu for number, gpu in used.items() if gpu is not None}
    taken = Counter(gpu["uuid"] for gpu in known.values())
    if not taken or max(taken.values()) < 2 or len(taken) >= next(iter(known.values()))["count"]:
        return None
    twice = taken.most_common(1)[0][0]
    sharers = sorted(number for number, gpu in known.items() if gpu["uuid"] == twice)
    told = f"Ranks {', '.join(map(str, sharers))} use the same GPU {twice} on {here[0].host}, "
    told += f"where there are {known[sharers[0]]['count']}"
    late = next(rank for rank in here if rank.number == sharers[-1])
    chosen = [event for event in late.told("chosen") if event["what"] == "cuda"]
    remedy = "torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) before anything uses the GPU."
    if chosen:
        place = as_place(chosen[-1]["place"])
        return Verdict("same_device", late.number, place, f"{told}: chosen at {shown(place)}.",
                       remedy)  # fmt: skip
    steps = late.told("parameters")
    place = as_place(steps[0]["built"]) if steps else late.place
    return Verdict("forgotten_set_device", late.number, place,
                   f"{told}; none of them has called set_device.", remedy)  # fmt: skip


def _gpu(rank: Rank) -> dict[str, Any] | None:
    """The GPU of a rank's parameters, or its current one when it ended before its first step."""
    for event in [*rank.told("parameters"), *rank.told("exit")]:
        if event["devices"] is not None:
            return dict(event["devices"])
    return None


def _shared_cores(here: list[Rank]) -> Verdict | None:
    chosen = {
        rank.number: [event for event in rank.told("chosen") if event["what"] == "cores"][-1]
        for rank in here
        if any(event["what"] == "cores" for event in rank.told("chosen"))
    }
    allowed = {core for rank in here for core in rank.hello["cores"]}
    taken = {core for event in chosen.values() for core in event["cores"]}
    if len(chosen) < 2 or len(taken) >= min(len(chosen), len(allowed)):
        return None
    late = max(chosen)
    place = as_place(chosen[late]["place"])
    return Verdict(
        "same_device", late, place,
        f"{len(chosen)} ranks on {here[0].host} run on core {', '.join(map(str, sorted(taken)))} "
        f"alone, of {len(allowed)} that they may use: pinned at {shown(place)}.",
        "Choose by the local rank: core, or GPU, number LOCAL_RANK.",
    )  # fmt: skip
