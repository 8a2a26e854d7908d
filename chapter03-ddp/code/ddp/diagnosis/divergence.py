"""Judges of a job that goes on, and goes wrong: what should be equal on all ranks and is not."""

from collections import Counter
from typing import Any

from ddp.diagnosis.evidence import Place, Rank, Verdict, as_place, shown

NOT_FINITE_FOR = 3  # a scaler of float16 losses skips one step that overflows, not so many
LAG_SHARE = 0.35  # of the time, that the others wait for the slowest
LAST_SHARE = 0.8  # of the meetings, that it is the last to come
MEETINGS = 8
NOTABLE_S = 0.002  # a lag that is none of the scheduler's


def judge_divergence(ranks: list[Rank], window_s: float) -> Verdict | None:
    return (
        nan_on_one_rank(ranks)
        or shared_device(ranks)
        or unsynced_parameters(ranks)
        or unsynced_buffers(ranks)
        or forgotten_set_epoch(ranks)
        or straggler(ranks, window_s)
    )


def unsynced_parameters(ranks: list[Rank]) -> Verdict | None:
    """The first step after which the same optimizer's parameters have different fingerprints."""
    for (optimizer, step), told in sorted(_by_key(ranks, "parameters", "optimizer", "step")):
        if len(told) < 2 or len({str(event["shapes"]) for event in told.values()}) > 1:
            continue  # alone, or shares of one model rather than replicas
        odd, index, count = _odd_one(told)
        if odd is None:
            continue
        event = told[odd]
        name = _parameter_name(ranks, odd, index, event)
        place = as_place(event["built"] if step == 0 else event["place"])
        when = (
            f"already before the first step; the optimizer was built at {shown(place)}"
            if step == 0
            else f"after step {step}, though not before the first; the step is at {shown(place)}"
        )
        remedy = (
            "Broadcast rank 0's parameters and buffers before training, as DDP does when it wraps "
            "the model."
            if step == 0
            else "Average the gradients of all parameters before the step, on all ranks."
        )
        return Verdict(
            "unsynced_parameters", odd, place,
            f"{count} of {len(event['sums'])} tensors of optimizer {optimizer} differ between the "
            f"ranks {when}. The first is {name}.",
            remedy,
        )  # fmt: skip
    return None


def _by_key(
    ranks: list[Rank], kind: str, *keys: str
) -> list[tuple[tuple[Any, ...], dict[int, dict[str, Any]]]]:
    """The events of a kind, by the values of `keys`, then by rank."""
    table: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for rank in ranks:
        for event in rank.told(kind):
            table.setdefault(tuple(event[key] for key in keys), {})[rank.number] = event
    return list(table.items())


def _odd_one(told: dict[int, dict[str, Any]]) -> tuple[int | None, int, int]:
    """The rank whose sums differ from most others', the first sum that does, and how many do."""
    kinds = Counter(tuple(event["sums"]) for event in told.values())
    if len(kinds) == 1:
        return None, 0, 0
    most = max(kinds, key=lambda sums: (kinds[sums], sums == tuple(told[min(told)]["sums"])))
    odd = min(number for number, event in told.items() if tuple(event["sums"]) != most)
    different = [i for i, (a, b) in enumerate(zip(told[odd]["sums"], most, strict=True)) if a != b]
    return odd, different[0], len(different)


def _parameter_name(ranks: list[Rank], number: int, index: int, event: dict[str, Any]) -> str:
    rank = next(rank for rank in ranks if rank.number == number)
    replicas = rank.told("replica")
    if replicas and len(replicas[-1]["names"]) == len(event["sums"]):
        return f"{replicas[-1]['names'][index]} {event['shapes'][index]}"
    return f"parameter {index}, {event['shapes'][index]}"


def unsynced_buffers(ranks: list[Rank]) -> Verdict | None:
    """A step in whose forward pass the replicas' buffers differed."""
    for (step,), told in sorted(_by_key(ranks, "buffers", "step"), key=lambda item: item[0]):
        odd, index, count = _odd_one(told) if len(told) > 1 else (None, 0, 0)
        if odd is not None:
            place = as_place(told[odd]["place"])
            return Verdict(
                "unsynced_buffers", odd, place,
                f"{count} of {len(told[odd]['sums'])} buffers differ between the ranks in the "
                f"forward pass after step {step}. The first is {told[odd]['names'][index]}. The "
                f"model was wrapped at {shown(place)}.",
                "Let DDP broadcast them (broadcast_buffers=True, its default), or compute them of "
                "the whole batch (SyncBatchNorm).",
            )  # fmt: skip
    return None


def nan_on_one_rank(ranks: list[Rank]) -> Verdict | None:
    """A loss that is not finite on some ranks only, and on all of them a little later."""
    bad = {rank.number: {event["number"]: event for event in rank.told("loss")} for rank in ranks}
    firsts = {number: min(events) for number, events in bad.items() if events}
    if not firsts:
        return None
    first = min(firsts.values())
    culprits = [number for number, when in firsts.items() if when == first]
    later = range(first + 1, first + 1 + NOT_FINITE_FOR)
    stays = all(any(when in events for events in bad.values()) for when in later)
    if len(culprits) == len(ranks) or not stays:
        return None
    event = bad[culprits[0]][first]
    source = event["culprit"]
    place = as_place(source["place"] if source else event["place"])
    named = (
        f"the first tensor that is not finite is `{source['name']}`, assigned at {shown(place)}"
        if source
        else f"its backward pass is at {shown(place)}"
    )
    return Verdict(
        "nan_on_one_rank", culprits[0], place,
        f"In backward pass {first} the loss of rank {culprits[0]} alone is not finite; {named}. "
        "The average of the gradients carried it to all ranks.",
        "Guard that computation. Skip a step whose gradients are not finite, on all ranks alike: "
        "all-reduce the decision.",
    )  # fmt: skip


def forgotten_set_epoch(ranks: list[Rank]) -> Verdict | None:
    """A sampler that shuffles, asked twice, with training between, gave one order."""
    for rank in ranks:
        last: dict[int, dict[str, Any]] = {}
        for event in rank.told("epoch"):
            before = last.get(event["sampler"])
            last[event["sampler"]] = event
            if before is None or not event["shuffle"] or event["steps"] == before["steps"]:
                continue
            if event["order"] == before["order"] and event["epoch"] == before["epoch"]:
                place = as_place(event["place"])
                return Verdict(
                    "forgotten_set_epoch", None, place,
                    f"The sampler iterated at {shown(place)} gave the same order twice: its epoch "
                    f"was {event['epoch']} both times.",
                    "Call sampler.set_epoch(epoch) before each epoch's loop.",
                )  # fmt: skip
    return None


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


def straggler(ranks: list[Rank], window_s: float) -> Verdict | None:
    """One rank comes last to almost every collective, and the others wait for it."""
    meetings = _meetings(ranks, window_s)
    if len(meetings) < MEETINGS:
        return None
    span = max(max(m.values()) for m in meetings) - min(min(m.values()) for m in meetings)
    if span < 0.8 * window_s:
        return None
    lags, waited = Counter[int](), 0.0
    until = 0.0
    for arrivals in meetings:
        begin, end = min(arrivals.values()), max(arrivals.values())
        waited += max(0.0, end - max(begin, until))  # meetings may overlap
        until = max(until, end)
        if end - begin > NOTABLE_S:
            lags[max(arrivals, key=lambda number: arrivals[number])] += 1
    if not lags:
        return None
    slow, times = lags.most_common(1)[0]
    if waited < LAG_SHARE * span or times < max(MEETINGS, LAST_SHARE * sum(lags.values())):
        return None
    place = _busier_line(ranks, slow, window_s)
    return Verdict(
        "straggler", slow, place,
        f"Rank {slow} came last to {times} of {sum(lags.values())} meetings in {span:.1f} s; the "
        f"others waited {100 * waited / span:.0f} % of the time. What it does meanwhile and they "
        f"do not is at {shown(place)}.",
        "Take that work off the rank, share it among all, or look at its host: heat, a neighbour, "
        "a slow disk.",
    )  # fmt: skip


def _meetings(ranks: list[Rank], window_s: float) -> list[dict[int, float]]:
    """When each rank came to each collective of the last `window_s`, the oldest first."""
    if len(ranks) < 2:
        return []
    shared = set.intersection(*(set(rank.calls) for rank in ranks))
    arrivals = [{rank.number: rank.calls[key].created for rank in ranks} for key in shared]
    newest = max((max(a.values()) for a in arrivals), default=0.0)
    recent = [a for a in arrivals if max(a.values()) >= newest - window_s]
    return sorted(recent, key=lambda a: min(a.values()))


def _busier_line(ranks: list[Rank], slow: int, window_s: float) -> Place | None:
    """The line of which the slow rank's samples have the most more than the others'."""
    shares = {rank.number: _line_shares(rank, window_s) for rank in ranks}
    others = [share for number, share in shares.items() if number != slow]
    excess = {
        place: share - max(other.get(place, 0.0) for other in others)
        for place, share in shares[slow].items()
    }
    return max(excess, key=lambda place: excess[place]) if excess else None


def _line_shares(rank: Rank, window_s: float) -> dict[Place, float]:
    counts: Counter[Place] = Counter()
    newest = rank.pulse.get("t", 0.0)
    for pulse in rank.pulses:
        if pulse["t"] >= newest - window_s:
            for where, _, count in pulse["samples"]:
                if (place := as_place(where)) is not None:
                    counts[place] += count
    total = sum(counts.values())
    return {place: count / total for place, count in counts.items()}
