"""Pipeline parallelism from scratch: GPipe and 1F1B, with their bubble and memory measured.

Each of p ranks holds a stage: some consecutive layers. A batch is cut into m micro-batches that
flow through the stages; activations go forward, their gradients come back. GPipe (Huang et al.
2019, arXiv 1811.06965) runs all forwards, then all backwards; 1F1B (Narayanan et al. 2021, arXiv
2104.04473) begins a backward as soon as it can. Where a forward takes f and a backward b seconds on
every stage, a step takes (m + p - 1)·(f + b), of which a stage works m·(f + b): it idles for
(p - 1)/(m + p - 1) of the step with either schedule, whatever f and b are. But GPipe keeps the
activations of m micro-batches, 1F1B on stage r those of min(m, p - r).

A forward sleeps until it has lasted --stage-ms, a backward twice that: so the stages cost the same,
as the formula assumes, and overlap even where ranks are more than cores.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/pipeline_parallel.py
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/pipeline_parallel.py

You should see: each schedule drawn, a stage a line; the one-process model's loss and gradients, bit
for bit the same with both schedules; the predicted bytes; the bubble within 10 % of the formula.
"""

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from distlab import data, predict, runtime, script
from distlab.model import add_model_flags, config_from_args
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.pipeline import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    Action,
    Links,
    Pipeline,
    Slots,
    Stage,
    check_cuts,
    report_gradients,
)
from parallelism.problem import FLOAT, gradients_of, one_process
from parallelism.traffic import Traffic

SMOKE = {"model": "smoke", "layers": 4, "corpus_mb": 0.2, "seq_len": 16, "micro_batches": 4}
LAPTOP = {"model": "laptop", "layers": 6, "corpus_mb": 1.0, "seq_len": 32, "micro_batches": 4}
GPU = {"model": "gpu", "corpus_mb": 12.0, "seq_len": 1024, "micro_batches": 8}
PRESETS = {
    "smoke": {**SMOKE, "batch_size": 8, "stage_ms": 10, "bubble_tolerance": 10, "repeats": 3},
    "laptop": {**LAPTOP, "batch_size": 8, "stage_ms": 50, "bubble_tolerance": 10, "repeats": 7},
    "gpu": {**GPU, "batch_size": 8, "stage_ms": 30, "bubble_tolerance": 10, "repeats": 7},
}
COSTS = {FORWARD: 1, BACKWARD: 2}  # of the drawing, in units of time
Span = tuple[Action, int, int]  # what a stage did, from when to when


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--schedule", choices=[*SCHEDULES, "both"], default="both")
    parser.add_argument("--micro-batches", type=int, metavar="M", help="parts of the batch")
    parser.add_argument("--stage-ms", type=script.positive_float, help="of a forward")
    parser.add_argument("--repeats", type=script.positive_int, help="timed steps of each schedule")
    parser.add_argument("--bubble-tolerance", type=script.positive_float, metavar="PERCENT")
    return parser.parse_args(argv)


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    check_cuts(args, job.world_size, config_from_args(args).num_hidden_layers)
    problem = one_process(run, args, job)
    pipeline = Pipeline(Stage(problem.model, job.rank, job.world_size), Links(job, args.timeout))
    found = {}
    for name in SCHEDULES if args.schedule == "both" else [args.schedule]:
        actions = SCHEDULES[name](job.rank, job.world_size, args.micro_batches)
        steps = [Slots(job, args.stage_ms / 1e3) for _ in range(args.repeats)]
        # One step to warm up, in slots of no length.
        for slots in run.progress([Slots(job, 0.0), *steps], name):
            pipeline.stage.zero_grad()
            job.barrier()
            loss = pipeline.step(actions, slots, problem.input_ids, problem.targets)
        found[name] = gradients_of(pipeline.stage)  # the next step's are new tensors
        report_gradients(run, job, name, loss, found[name], problem)
        report_bytes(run, job, name, pipeline, args)
        report_schedule(run, job, name, actions, pipeline, steps, args)
    if len(found) == 2:
        run.check_equal("both schedules' gradients, bit for bit", *found.values())


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


def report_bytes(run: Run, job: Runtime, name: str, pipeline: Pipeline, args: Namespace) -> None:
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
    run: Run,
    job: Runtime,
    name: str,
    actions: list[Action],
    pipeline: Pipeline,
    steps: list[Slots],
    args: Namespace,
) -> None:
    """Draw what the stages did, and compare its bubble and its memory with the formulas."""
    p, m = job.world_size, args.micro_batches
    bubble = predict.pipeline_bubble(p, m)
    spans = simulate(gathered(actions))
    for rank, own in enumerate(spans):
        run.print(f"trace: stage {rank}  {draw(own)}")
    run.check_close(f"{name}: bubble of the drawing", idle_share(spans), bubble, 1e-12)

    fields = every_step(job, pipeline, steps)
    alive, layers, busy, window, overruns = best_step(fields)
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
    bubbles = 1 - fields[:, :, 2].mean(axis=0) / fields[0, :, 3]  # of each step
    off = 100 * (bubbles - bubble) / bubble
    run.check_within(
        f"{name}: the bubble's distance from the formula", off.tolist(),
        args.bubble_tolerance, -args.bubble_tolerance, "%",
    )  # fmt: skip


def every_step(job: Runtime, pipeline: Pipeline, steps: list[Slots]) -> np.ndarray:
    """[stages, steps, fields]: alive, layers, busy seconds, window seconds, overruns."""
    layers = len(pipeline.stage.own_layers)
    rows = [[pipeline.most_alive, layers, s.busy, s.window, s.overruns] for s in steps]
    own = torch.tensor(rows, dtype=torch.float64, device=job.device)
    return torch.stack(Traffic().all_gather(own)).cpu().numpy()


def best_step(fields: np.ndarray) -> np.ndarray:
    """The fields of the fastest step, [fields, stages]: other work can only lengthen a step."""
    return fields[:, fields[0, :, 3].argmin()].T


if __name__ == "__main__":
    script.exit(main)
