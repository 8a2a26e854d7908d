"""Which bytes a training step holds, operator by operator, in every mode of sharding; and why.

DDP, and `fully_shard` in the ways that differ in memory: units freed after forward (full), kept
whole until backward (grad), resharded to 2 of 4 ranks (partial), the root wrapped alone, and units
under activation checkpointing. Each mode makes one step under a recorder that sees every storage
when it is made and when it is freed. Weights, optimizer state, gradients, gathered units and
activations are stacked over the step; the dashed lines are what the formulas predict.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/memory_profile.py --figures build/figures
    torchrun --nproc_per_node=4 chapter04-fsdp/code/memory_profile.py --modes full partial grad

You should see: a row for each mode, predicted within 10 %, with the moment of its peak and the
cause. With the root wrapped alone sharding saves state and nothing else: the whole model is
gathered at once, in a buffer and in the parameters.
"""

from argparse import Namespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import runtime, script
from distlab.display import side_by_side
from distlab.errors import UsageError
from distlab.model import Llama, add_model_flags, model_from_args
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp.memory_timeline import (
    KINDS,
    MemoryTimeline,
    Moment,
    Plan,
    Sharding,
    gather_buffers,
    gradient_buffers,
)

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "layers": 4, "batch_size": 2, "seq_len": 32},
    "laptop": {"model": "laptop", "layers": 8, "hidden_size": 128, "vocab_size": 512,
               "batch_size": 1, "seq_len": 64},
    "gpu": {"model": "gpu", "batch_size": 4, "seq_len": 1024},
}  # fmt: skip
MODES = ("ddp", "root", "grad", "partial", "full", "checkpointing")
TOLERANCE = 0.1  # of a mode's predicted peak
POINTS = 240  # of a figure's area: each is the highest of those that it stands for
COLUMNS = ("mode", "peak predicted, MB", "peak measured, MB", "error, %", *KINDS, "when", "cause")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        profile(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--modes", nargs="+", choices=MODES, metavar="MODE", help=", ".join(MODES))
    add("--batch-size", type=script.positive_int, help="of a rank, sequences")
    add("--seq-len", type=script.positive_int, help="tokens")
    return parser.parse_args(argv)


def profile(run: Run, args: Namespace, job: Runtime) -> None:
    if job.world_size == 1:
        raise UsageError("one rank has nobody to shard with; use torchrun --nproc_per_node=2")
    modes = args.modes or [mode for mode in MODES if mode != "partial" or job.world_size == 4]
    if "partial" in modes and (job.world_size % 2 or job.world_size < 4):
        raise UsageError(
            f"--modes partial reshards to 2 ranks, and the job has {job.world_size}; "
            "use torchrun --nproc_per_node=4"
        )
    rows, errors = [], {}
    for mode in run.progress(modes, "modes"):
        timeline, plan = record_step(args, job, mode)
        held = timeline.by_kind()
        total = np.sum(list(held.values()), axis=0)
        highest = max(gathered(int(total.max())))  # of all ranks
        peak = plan.peak()
        errors[mode] = abs(peak.total - highest) / highest
        shares = [held[kind][total.argmax()] / 1e6 for kind in KINDS]
        phase = timeline.phase(int(total.argmax()))
        rows.append([mode, *side_by_side(peak.total, highest, 1e-6), *shares, phase, peak.cause])
        draw(run, mode, timeline, held, peak, plan)
    run.table("peaks", COLUMNS, rows, "MB of rank 0 by kind at the peak, measured")
    worst = max(errors, key=errors.__getitem__)
    run.check_below(f"error of a predicted peak, the worst ({worst})", errors[worst], TOLERANCE)


def record_step(args: Namespace, job: Runtime, mode: str) -> tuple[MemoryTimeline, Plan]:
    """One step of `mode`, recorded after two that made the optimizer's state and all buffers."""
    runtime.seed_everything(args.seed)
    model = model_from_args(args, job.device)
    plan = plan_of(args, job, mode, model)
    wrapped = wrap(model, mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)  # without temporaries
    draw = torch.Generator().manual_seed(args.seed + job.rank)
    size = (args.batch_size, args.seq_len + 1)
    tokens = torch.randint(model.config.vocab_size, size, generator=draw).to(job.device)

    def step(timeline: MemoryTimeline | None = None) -> None:
        loss = wrapped(tokens[:, :-1], targets=tokens[:, 1:])
        mark(timeline, "forward")
        loss.backward()
        mark(timeline, "backward")
        optimizer.step()
        mark(timeline, "optimizer")

    step()
    optimizer.zero_grad()
    buffers = {"gathered": gather_buffers(model, step)}
    if mode == "ddp":
        buffers["gradients"] = gradient_buffers(model)
    optimizer.zero_grad()
    with MemoryTimeline(model, optimizer, buffers) as timeline:
        step(timeline)
    return timeline, plan


def mark(timeline: MemoryTimeline | None, phase: str) -> None:
    if timeline is not None:
        timeline.mark(phase)


def wrap(model: Llama, mode: str) -> nn.Module:
    """The model as `mode` divides it: the one difference between the rows."""
    if mode == "ddp":
        return DDP(model, gradient_as_bucket_view=True)
    reshard: bool | int = {"grad": False, "partial": 2}.get(mode, True)
    if mode != "root":
        for layer in model.model.layers:
            fully_shard(layer, reshard_after_forward=reshard)
    model.gradient_checkpointing = mode == "checkpointing"
    fully_shard(model)
    return model


def plan_of(args: Namespace, job: Runtime, mode: str, model: Llama) -> Plan:
    kept = {"grad": 1.0, "partial": 1 / 2}.get(mode, 0.0)
    units = {"ddp": "none", "root": "root"}.get(mode, "blocks")
    layer = parameter_bytes(model.model.layers[0])
    return Plan(
        model.config.architecture,
        Sharding(job.world_size, units, kept, mode == "checkpointing"),
        root=parameter_bytes(model) - len(model.model.layers) * layer,
        layer=layer,
        batch=args.batch_size,
        seq_len=args.seq_len,
    )


def parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def draw(
    run: Run,
    mode: str,
    timeline: MemoryTimeline,
    held: dict[str, np.ndarray],
    peak: Moment,
    plan: Plan,
) -> None:
    """The kinds stacked over the step, with lines for the predicted peak and state."""
    total = np.sum(list(held.values()), axis=0)
    bins = np.array_split(np.arange(timeline.now), min(POINTS, timeline.now))
    shown = [int(one[0] + total[one].argmax()) for one in bins]
    series: list[dict[str, Any]] = [
        {"label": kind, "x": shown, "y": [held[kind][i] / 1e6 for i in shown]} for kind in KINDS
    ]
    state = peak.bytes["weights"] + peak.bytes["optimizer"]
    lines: list[dict[str, Any]] = [
        {"label": "predicted: weights and optimizer", "y": state / 1e6},
        {"label": f"predicted: peak ({peak.name})", "y": peak.total / 1e6},
        *({"label": f"end of {phase}", "x": end} for phase, end in timeline.marks.items()),
    ]
    run.figure(
        mode, kind="area", title=f"One step, {mode}, on {plan.sharding.ranks} ranks",
        x_label="operators since the step began", y_label="MB of rank 0", series=series,
        lines=lines,
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
