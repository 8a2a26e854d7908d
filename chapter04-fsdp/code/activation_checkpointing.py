"""Activation checkpointing: which activations to keep, what it saves, and what it costs.

Backward needs what forward computed. It can be kept, or computed again from less. Four policies:
keep all (none); keep each layer's input (full); that in every second layer (half); keep what is
dear to compute and drop what is cheap (products): the results of matrix products and of attention
stay, and norms, rotations, gates and sums, which are most of the bytes, are computed again. Every
policy runs the same kernels on the same numbers, so loss and gradients are equal bit for bit.

Run:
    python chapter04-fsdp/code/activation_checkpointing.py --figures build/figures
    torchrun --nproc_per_node=2 chapter04-fsdp/code/activation_checkpointing.py

The second shards the layers with `fully_shard` besides: they are gathered once more to be computed
again. You should see: bytes as predicted; full checkpointing costs about a third of a step, a
layer's forward again; keeping the products costs a fraction of that.

Sources: Chen et al., "Training deep nets with sublinear memory cost" (arXiv 1604.06174);
Korthikanti et al., "Reducing activation recomputation" (arXiv 2205.05198), section 5.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from distlab import measure, runtime, script
from distlab.display import side_by_side
from distlab.measure import Timing
from distlab.model import Llama, add_model_flags, config_from_args, model_from_args
from distlab.ranks import digest, slowest
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp.memory_timeline import MemoryTimeline, gather_buffers
from fsdp.recomputation import Costs

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 2, "seq_len": 32, "repeats": 3},
    "laptop": {"model": "laptop", "layers": 8, "vocab_size": 512, "batch_size": 2, "seq_len": 128,
               "repeats": 9},
    "gpu": {"model": "gpu", "batch_size": 4, "seq_len": 1024, "repeats": 15},
}  # fmt: skip
TOLERANCE, TIME_TOLERANCE = 0.1, 0.25  # of predicted bytes; of a step's predicted time
COLUMNS = (
    "kept", "activations predicted, MB", "activations measured, MB", "error, %",
    "step predicted, ms", "step measured, ms", "error, %", "equal to none",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        compare_policies(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="of a rank, sequences")
    add("--seq-len", type=script.positive_int, help="tokens")
    add("--repeats", type=script.positive_int, help="timed steps of each policy, 3 or more")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    return args


MUST_SAVE = CheckpointPolicy.MUST_SAVE
DEAR = (  # operators whose results the policy "products" keeps
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def keep_dear(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Of each operator in forward: keep its result, or compute it again."""
    if operator in DEAR:
        return MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def recompute(layer: nn.Module, **options: Any) -> None:
    """Have `layer` keep its inputs, and compute the rest again in backward.

    Within the module's own forward: `fully_shard`'s hooks stand around it, so that a sharded layer
    is gathered before it is computed again.
    """
    forward = layer.forward
    options |= {"use_reentrant": False, "preserve_rng_state": False}  # no dropout: nothing random
    layer.forward = lambda *args: checkpoint(forward, *args, **options)  # type: ignore[method-assign]


def keep_all(layers: Sequence[nn.Module]) -> None:
    """The policy "none"."""


def full(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        recompute(layer)


def half(layers: Sequence[nn.Module]) -> None:
    full(layers[1::2])


def products(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        recompute(layer, context_fn=partial(create_selective_checkpoint_contexts, keep_dear))


def asked(layers: Sequence[nn.Module]) -> None:
    """Keep all, but be asked for each operator, in Python: what a policy costs by itself."""
    keep_each = partial(create_selective_checkpoint_contexts, lambda *_, **__: MUST_SAVE)
    for layer in layers:
        recompute(layer, context_fn=keep_each)


POLICIES: dict[str, Callable[[Sequence[nn.Module]], None]]
POLICIES = {"none": keep_all, "products": products, "half": half, "full": full}


@dataclass
class Trained:
    """What one policy did: bytes kept when forward ends, loss and gradients' digest, its step."""

    kept: int
    loss: float
    gradients: str
    step: Callable[[], Tensor]


def compare_policies(run: Run, args: Namespace, job: Runtime) -> None:
    trained = {name: train(args, job, policy) for name, policy in POLICIES.items()}
    steps = {name: one.step for name, one in trained.items()}
    timings = measure.compare(
        {**steps, "asked": train(args, job, asked).step},
        warmup=1, repeats=args.repeats, device=job.device, before=job.barrier,
    )  # fmt: skip
    timings = {name: slowest(timing) for name, timing in timings.items()}
    shape = config_from_args(args).architecture
    seconds = timings["none"].median, timings["asked"].median
    plan = Costs(shape, args.batch_size, args.seq_len, *seconds, job.device)
    run.metric("asking", seconds[1] / seconds[0] - 1, "", "a step more by a policy that keeps all")
    report(run, args, plan, trained, timings)


def train(args: Namespace, job: Runtime, policy: Callable[[Sequence[nn.Module]], None]) -> Trained:
    """A forward and a backward pass under `policy`, from the same seed on the same tokens."""
    runtime.seed_everything(args.seed)
    model = model_from_args(args, job.device)
    policy(list(model.model.layers))
    if job.world_size > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    draw = torch.Generator().manual_seed(args.seed + job.rank)
    size = (args.batch_size, args.seq_len + 1)
    tokens = torch.randint(model.config.vocab_size, size, generator=draw).to(job.device)

    def step(timeline: MemoryTimeline | None = None) -> Tensor:
        model.zero_grad()
        loss: Tensor = model(tokens[:, :-1], targets=tokens[:, 1:])
        if timeline is not None:
            timeline.mark("forward")
        loss.backward()
        return loss

    buffers = gather_buffers(model, step)
    without_state = torch.optim.SGD(model.parameters())
    with MemoryTimeline(model, without_state, {"gathered": buffers}) as timeline:
        loss = step(timeline)
    kept = timeline.by_kind()["activations"][timeline.marks["forward"]]  # as backward begins
    return Trained(int(kept), loss.item(), digest(own_gradients(model)), step)


def own_gradients(model: Llama) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found]


def report(
    run: Run, args: Namespace, plan: Costs, trained: dict[str, Trained], timings: dict[str, Timing]
) -> None:
    none, rows, errors = trained["none"], [], {}
    ratios: dict[str, list[float]] = {}
    for name, one in trained.items():
        equal = (one.loss, one.gradients) == (none.loss, none.gradients)
        size, seconds = plan.kept(name), plan.step(name)
        errors[name] = abs(size - one.kept) / one.kept
        measured = timings[name].ratios(timings["none"])
        ratios[name] = [seconds / plan.seconds / ratio for ratio in measured]
        cells = side_by_side(size, one.kept, 1e-6), side_by_side(seconds, timings[name].median, 1e3)
        rows.append([name, *cells[0], *cells[1], "bit for bit" if equal else "NO"])
    run.table("policies", COLUMNS, rows, "activations kept when forward ends; steps in turns")
    series = [
        {"label": name, "x": [row[2]], "y": [row[5]]}
        for name, row in zip(trained, rows, strict=True)
    ]
    expected = {"label": "predicted", "x": [row[1] for row in rows], "y": [row[4] for row in rows]}
    run.figure(
        "frontier", kind="scatter", title="Memory against time", x_label="activations kept (MB)",
        y_label="a step (ms)", series=[*series, expected],
    )  # fmt: skip
    same = {name: (one.loss, one.gradients) for name, one in trained.items()}
    run.check_equal("loss and gradients are none's", same, dict.fromkeys(same, same["none"]))
    worst = max(errors, key=errors.__getitem__)
    run.check_below(f"error of predicted bytes, the worst ({worst})", errors[worst], TOLERANCE)
    run.check_within(
        "predicted to measured time", ratios, limit=1 + TIME_TOLERANCE, at_least=1 - TIME_TOLERANCE
    )


if __name__ == "__main__":
    script.exit(main)
