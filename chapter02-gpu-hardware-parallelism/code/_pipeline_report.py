"""What `pipeline_parallel.py` says of gradients, bytes, memory and bubble; schedules as text."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _parallel import FLOAT, Problem, check_equal
from _pipeline_stage import BACKWARD, FORWARD, Action, Slots
from _traffic import Traffic
from torch import Tensor

from distlab import predict
from distlab.run import Run
from distlab.runtime import Runtime

COSTS = {FORWARD: 1, BACKWARD: 2}
Span = tuple[Action, int, int]  # what a stage did, from when to when


def simulate(schedules: Sequence[Sequence[Action]]) -> list[list[Span]]:
    """Run the stages' actions in whole units of time, messages in none: each stage's spans.

    A forward waits for the same micro-batch's forward on the stage before, a backward for its
    backward on the stage behind, and both for what their own stage did last. Raises `ValueError`
    where the stages would wait for each other for ever.
    """
    ended: dict[tuple[int, Action], int] = {}
    spans: list[list[Span]] = [[] for _ in schedules]
    while sum(map(len, spans)) < sum(map(len, schedules)):
        before = len(ended)
        for stage, actions in enumerate(schedules):
            for action in actions[len(spans[stage]) :]:
                kind, micro_batch = action
                neighbour = stage - 1 if kind == FORWARD else stage + 1
                needs_message = 0 <= neighbour < len(schedules)
                if needs_message and (neighbour, action) not in ended:
                    break
                own = spans[stage][-1][2] if spans[stage] else 0
                start = max(own, ended.get((neighbour, action), 0))
                ended[stage, action] = start + COSTS[kind]
                spans[stage].append((action, start, start + COSTS[kind]))
        if len(ended) == before:
            raise ValueError("every stage waits for another: the schedules deadlock")
    return spans


def idle_share(spans: Sequence[Sequence[Span]]) -> float:
    """The mean share of the step, from the first start to the last end, that a stage idles."""
    end = max(stage[-1][2] for stage in spans)
    busy = sum(stop - start for stage in spans for _, start, stop in stage)
    return 1 - busy / (end * len(spans))


def draw(spans: Sequence[Span]) -> str:
    """A stage's line: F3 is the forward of micro-batch 3, B3 its backward, twice as long."""
    width = 2 + max(len(str(i)) for (_, i), _, _ in spans)
    line, now = "", 0
    for (kind, i), start, end in spans:
        line += ".".ljust(width) * (start - now)
        line += f"{'F' if kind == FORWARD else 'B'}{i}".ljust(width * (end - start) - 1, "-") + " "
        now = end
    return line.rstrip()


def report_gradients(
    run: Run, job: Runtime, name: str, loss: Tensor, found: dict[str, Tensor], problem: Problem
) -> None:
    """Compare this stage's gradients, and the last one's loss, with the one-process model's."""
    run.print(f"\n{name}")
    dist.broadcast(loss, src=job.world_size - 1)
    everywhere: list[list[str]] = [[] for _ in range(job.world_size)]
    dist.all_gather_object(everywhere, list(found))
    held = {parameter for names in everywhere for parameter in names}
    run.check_equal(f"{name}: every gradient is on a stage", len(held), len(problem.gradients))
    own = {parameter: problem.gradients[parameter] for parameter in found}
    check_equal(run, name, loss, found, replace(problem, gradients=own))


def report_bytes(run: Run, job: Runtime, name: str, pipeline: Any, args: Namespace) -> None:
    """Compare what all stages sent in a step with the formula.

    [B, seq, hidden] crosses each of the p - 1 boundaries, and its gradient comes back, into however
    many micro-batches it is cut. The two ends sum a tied embedding's gradient: each sends its own.
    """
    sent, stage = pipeline.sent, pipeline.stage
    total = torch.tensor(list(sent.values()), dtype=torch.float64, device=job.device)
    dist.all_reduce(total)
    width, config = FLOAT * stage.hidden_size, stage.config
    crossed = (job.world_size - 1) * args.batch_size * args.seq_len * width
    tied = 2 * config.vocab_size * width * config.tie_word_embeddings
    for what, predicted, measured in zip(
        sent, (crossed, crossed, tied), total.tolist(), strict=True
    ):
        run.compare(f"{name}: {what}, sent by all stages", predicted, measured, "B")
    run.check_equal(f"{name}: bytes as predicted", total.tolist(), [crossed, crossed, tied])


def report_schedule(
    run: Run, job: Runtime, name: str, actions: list[Action], pipeline: Any, steps: list[Slots],
    args: Namespace,
) -> None:  # fmt: skip
    """Draw what the stages did, and compare its bubble and its memory with the formulas."""
    p, m = job.world_size, args.micro_batches
    bubble = predict.pipeline_bubble(p, m)
    everywhere: list[list[Action]] = [[] for _ in range(p)]
    dist.all_gather_object(everywhere, actions)
    spans = simulate(everywhere)
    for rank, own in enumerate(spans):
        run.print(f"trace: stage {rank}  {draw(own)}")
    run.check_close(f"{name}: bubble of the drawing", idle_share(spans), bubble, 1e-12)

    alive, layers, busy, window, overruns = best_step(job, pipeline, steps)
    idle = 1 - busy / window[0]  # the first stage begins first and ends last
    rows = [[r, int(layers[r]), int(alive[r]), 1e3 * busy[r], 100 * idle[r]] for r in range(p)]
    columns = ["stage", "layers", "micro-batches alive", "busy, ms", "idle, %"]
    run.table(f"{name}_stages", columns, rows, f"a step of {1e3 * window[0]:.0f} ms")
    run.metric(f"{name}_overruns", int(overruns.sum()), "", "actions longer than their slot")
    expected = [m if name == "gpipe" else min(m, p - r) for r in range(p)]
    run.check_equal(
        f"{name}: most micro-batches alive on each stage", alive.astype(int).tolist(), expected
    )
    measured = float(idle.mean())
    run.compare(f"{name}: bubble", 100 * bubble, 100 * measured, "%")
    off = 100 * abs(measured - bubble) / bubble
    run.check_below(
        f"{name}: the bubble's distance from the formula", off, args.bubble_tolerance, "%"
    )


def best_step(job: Runtime, pipeline: Any, steps: list[Slots]) -> np.ndarray:
    """Of the fastest step: [alive, layers, busy seconds, window seconds, overruns] x [stages].

    What else the machine does can only lengthen a step.
    """
    layers = len(pipeline.stage.own_layers)
    rows = [[pipeline.most_alive, layers, s.busy, s.window, s.overruns] for s in steps]
    own = torch.tensor(rows, dtype=torch.float64, device=job.device)
    fields = torch.stack(Traffic().all_gather(own)).cpu().numpy()  # [stages, steps, fields]
    return fields[:, fields[0, :, 3].argmin()].T
