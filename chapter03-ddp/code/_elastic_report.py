"""What `elastic_train.py` says of a job, and of the disturbances that it rehearsed."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from _elastic_log import History, generations, history, read_log

from distlab.data import Loader, Tokens
from distlab.run import Run

TOLERANCE = 1e-5  # float32: fewer ranks sum the same gradients in another order
EVENTS = {"worker killed": 1, "node off": 2, "node back": 3}


@dataclass(frozen=True)
class Event:
    """Something that happened to a job, and how it went on; seconds since it happened."""

    what: str
    ranks: int  # that went on
    noticed: float  # node0's worker of before has ended
    again: float  # the next generation has trained its first step
    repeated: int  # steps
    said: str  # by node0's worker


@dataclass(frozen=True)
class Outcome:
    """A disturbed run that came to its end."""

    all_ranks: bool  # were there in each generation
    events: list[Event]
    past: History


def global_batches(args: Namespace, tokens: Tokens) -> Callable[[int], list[int]]:
    """The windows of a step, in order, as one process reads them."""
    alone = Loader(tokens, args.seq_len, args.batch_size, seed=args.seed)
    return lambda step: alone.window_indices(step * args.batch_size).tolist()


def report_job(run: Run, args: Namespace, tokens: Tokens) -> None:
    """The job's own proof, from its log, that nothing was skipped and nothing kept twice."""
    lines = read_log(args.folder)
    past = history(lines, args.steps, global_batches(args, tokens))
    run.metric("generations", len(generations(lines)))
    run.metric("steps_repeated", sum(past.repeated.values()))
    run.metric("final_loss", past.losses[-1] if past.losses else None, "nats")
    run.check_equal("steps whose global batch was not trained exactly once", len(past.wrong), 0)


def report_rehearsal(
    run: Run, args: Namespace, expected: History, outcomes: Sequence[Outcome], missing: int
) -> None:
    """A row for each disturbance, and the checks over all of them."""
    rows = []
    for outcome in outcomes:
        apart = largest_difference([outcome], expected)
        for event in outcome.events:
            said = event.said.partition(" This is typically")[0]  # gloo's advice
            run.print(
                f"trace: {event.what}; after {event.noticed:.1f} s node0's worker said: {said}"
            )
            rows.append([
                EVENTS[event.what], event.ranks, event.noticed, event.again, event.repeated,
                outcome.past.losses[-1], expected.losses[-1], apart,
            ])  # fmt: skip
    names = ", ".join(f"{number} {what}" for what, number in EVENTS.items())
    run.table(
        "disturbances",
        ["event", "ranks after", "noticed (s)", "training again (s)", "steps repeated",
         "final loss", "undisturbed", "difference in any step"],
        rows,
        caption=f"Events: {names}; seconds since the event",
    )  # fmt: skip
    run.check_equal("disturbed runs that did not come to their end", missing, 0)
    wrong = sum(len(past.wrong) for past in [expected, *(outcome.past for outcome in outcomes)])
    run.check_equal("global batches not trained exactly once", wrong, 0)
    repeated = [event.repeated for outcome in outcomes for event in outcome.events]
    # The newest checkpoint may still have been on its way to the disk; the one before was there.
    run.check_below(
        "steps repeated after an event", max(repeated, default=0), 2 * args.checkpoint_every
    )
    if args.nodes == 2 and any(outcome.all_ranks for outcome in outcomes):
        run.check_equal(
            "where all ranks came back, losses are the undisturbed job's to the last bit",
            largest_difference([o for o in outcomes if o.all_ranks], expected) == 0.0,
            True,
        )
    run.check_below(
        "difference of any loss to the undisturbed job's",
        largest_difference(outcomes, expected),
        TOLERANCE,
    )


def largest_difference(outcomes: Sequence[Outcome], expected: History) -> float:
    """Of the losses on the final paths; infinite when one lacks a step."""
    if any(len(outcome.past.losses) != len(expected.losses) for outcome in outcomes):
        return float("inf")
    losses = np.array([outcome.past.losses for outcome in outcomes])
    return float(np.abs(losses - np.array(expected.losses)).max(initial=0.0))
