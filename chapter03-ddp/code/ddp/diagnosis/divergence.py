"""Judges of a job that goes on, and goes wrong: what should be equal on all ranks and is not."""

from collections import Counter
from typing import Any

from _diagnose_devices import shared_device
from _diagnose_straggler import straggler
from _diagnose_verdict import Verdict, shown
from _diagnose_watch import Rank, as_place

NOT_FINITE_FOR = 3  # a scaler of float16 losses skips one step that overflows, not so many


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
