"""ZeRO's stages from scratch: each trains as DeepSpeed's does, and keeps what the paper says.

The mechanism, whole, is zero/stages.py: partitions of flat buffers, a reduce-scatter, an all-gather
and, in stage 3, hooks that make a layer's weights whole while it computes. This script trains every
stage beside DeepSpeed's and beside one process, counts the bytes that a rank keeps, and, on nodes
of a cluster, those that it sends.

Run:
    torchrun --nproc_per_node=2 chapter05-deepspeed-zero/code/zero_from_scratch.py
    torchrun --nproc_per_node=4 chapter05-deepspeed-zero/code/zero_from_scratch.py
    python3 scripts/lab.py cluster --nodes 2 --rate 1gbit -- \\
        torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=node0:29500 chapter05-deepspeed-zero/code/zero_from_scratch.py

You should see: losses, gradients and weights equal to DeepSpeed's and to one process's to 1e-5 in
every stage; 16, 4 + 12/K, 2 + 14/K and 16/K bytes for each parameter in mixed precision, as in the
paper, and how much more DeepSpeed keeps; and on the wire, in models times (K-1)/K, two in stages 0
to 2, and three in stage 3, less once what is in no layer.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distlab import predict, runtime, script
from distlab.errors import UsageError
from distlab.launch import detect_launch
from distlab.measure import tensor_bytes
from distlab.model import Llama, add_model_flags, config_from_args, model_from_args, num_parameters
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.traffic import bytes_sent
from zero import engine
from zero.stages import Zero

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 12, "seq_len": 16, "steps": 5},
    "laptop": {"model": "laptop", "batch_size": 12, "seq_len": 64, "steps": 10},
    "gpu": {"model": "gpu", "batch_size": 24, "seq_len": 512, "steps": 10},
}  # fmt: skip
STAGES = (0, 1, 2, 3)
TOLERANCE = 1e-5  # float32: the sums over ranks are the same, their order is not
LEARNING_RATE, MOMENTUM = 0.03, 0.9  # SGD: Adam divides rounding by its own size
STATE = 0.01  # of the bytes that the formula gives: padding
FLOAT = 4  # bytes
WIRE = 0.01  # of the bytes sent: messages of the rendezvous, and padding
FRUGAL: dict[int, dict[str, Any]] = {  # by default it all-reduces in 1 and 2, and frees late in 3
    0: {},
    1: {"use_multi_rank_bucket_allreduce": False},
    2: {"use_multi_rank_bucket_allreduce": False},
    3: {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0},
}  # fmt: skip
PRECISIONS = {"mixed": torch.bfloat16, "fp32": None}
Batch = tuple[Tensor, Tensor]
Trained = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]  # losses, gradients, weights


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        prove_equal(run, args, job)
        count_state(run, args, job)
        if job.local_world_size < job.world_size:
            count_wire(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--batch-size", type=script.positive_int, help="sequences of all ranks")
    parser.add_argument("--seq-len", type=script.positive_int)
    parser.add_argument("--steps", type=script.positive_int, help="of each proof")
    args = parser.parse_args(argv)
    ranks = detect_launch().world_size
    if args.batch_size % ranks:
        raise UsageError(
            f"--batch-size {args.batch_size} is not divisible by {ranks} ranks; "
            f"use {-(-args.batch_size // ranks) * ranks}"
        )
    return args


def prove_equal(run: Run, args: Namespace, job: Runtime) -> None:
    """Every stage three times: from scratch, DeepSpeed's, and one process with the whole batch."""
    alone = train_alone(args, job)
    rows: list[list[Any]] = []
    for stage in run.progress(STAGES, "stages"):
        ours, theirs = train(args, job, stage), train_deepspeed(args, job, stage)
        rows.append([stage, *differences(ours, theirs), max(differences(ours, alone))])
    run.table(
        "parity", ["stage", "losses", "gradients", "weights", "all, to one process"], rows,
        caption=f"largest difference to DeepSpeed in {args.steps} steps, and to one process",
    )  # fmt: skip
    worst = max(value for _, *values in rows for value in values)
    run.check_below("the largest of these differences", worst, TOLERANCE)


def train(args: Namespace, job: Runtime, stage: int) -> Trained:
    """From scratch: the optimizer has this rank's partitions, and its step is `zero.step`."""
    model = new_model(args, job, job.rank)  # differently on every rank: rank 0's weights count
    zero = Zero(model, model.model.layers, stage)
    optimizer = torch.optim.SGD(zero.partitions, lr=LEARNING_RATE, momentum=MOMENTUM)
    losses, gradients = [], {}
    for batch in batches(args, job):
        inputs, targets = (whole.chunk(job.world_size)[job.rank] for whole in batch)
        loss = model(inputs, targets=targets)
        loss.backward()
        zero.reduce()  # which the step would do: the proof looks at what it gives
        losses.append(mean(loss, job))
        gradients = zero.whole(lambda unit: unit.gradient)
        zero.step(optimizer)
    return losses, gradients, zero.whole(lambda unit: unit.partition)


def train_deepspeed(args: Namespace, job: Runtime, stage: int) -> Trained:
    """The same by the library, which makes the optimizer itself."""
    config = engine.stage_config(stage, args.batch_size // job.world_size)
    config["optimizer"] = {"type": "SGD", "params": {"lr": LEARNING_RATE, "momentum": MOMENTUM}}
    config["zero_allow_untested_optimizer"] = True
    losses, gradients = [], {}
    with engine.engine_of(new_model(args, job, job.rank), config, job) as trained:
        for batch in batches(args, job):
            inputs, targets = (whole.chunk(job.world_size)[job.rank] for whole in batch)
            loss = trained(inputs, targets=targets)
            trained.backward(loss)
            losses.append(mean(loss, job))
            gradients = engine.whole_gradients(trained)
            trained.step()
        return losses, gradients, engine.whole_weights(trained)


def train_alone(args: Namespace, job: Runtime) -> Trained:
    model = new_model(args, job)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    losses, gradients = [], {}
    for inputs, targets in batches(args, job):
        loss = model(inputs, targets=targets)
        loss.backward()
        losses.append(loss.item())
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {n: p.detach() for n, p in model.named_parameters()}


def count_state(run: Run, args: Namespace, job: Runtime) -> None:
    """What a rank keeps between backward and the optimizer's step, for each parameter."""
    rows: list[list[Any]] = []
    worst = 0.0
    for precision, dtype in PRECISIONS.items():
        for stage in STAGES:
            model = new_model(args, job)
            parameters = num_parameters(model)
            paper = predict.model_state(1, precision, "adamw", stage, job.world_size).total
            ours = state_from_scratch(model, args, job, stage, dtype) / parameters
            theirs = state_of_deepspeed(args, job, stage, precision)
            kinds = [size / parameters for size in theirs.values()]
            rows.append([precision, stage, paper, ours, sum(kinds), *kinds])
            worst = max(worst, abs(paper / ours - 1))
    run.table(
        "state",
        ["precision", "stage", "predicted", "from scratch", "DeepSpeed", "weights", "gradients",
         "moments", "master"], rows,
        caption=f"bytes for each parameter on one of {job.world_size} ranks, with AdamW, before "
        "its step; the last four columns are DeepSpeed's",
    )  # fmt: skip
    run.check_below("from scratch, the largest error of a prediction", worst, STATE)


def state_from_scratch(
    model: Llama, args: Namespace, job: Runtime, stage: int, dtype: torch.dtype | None
) -> int:
    zero = Zero(model, model.model.layers, stage, dtype)
    optimizer = torch.optim.AdamW(zero.partitions)
    loss_of = step_of(model, args, job)
    for _ in range(2):  # before the first step there are no moments
        loss_of().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        gradients += [unit.gradient for unit in zero.units if unit.gradient is not None]
        moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
        buffers = [
            t for unit in zero.units for t in (unit.flat, unit.shard, unit.partition.detach())
        ]
        held = tensor_bytes([*gradients, *moments, *buffers])
        zero.step(optimizer)
    return held


def state_of_deepspeed(args: Namespace, job: Runtime, stage: int, precision: str) -> dict[str, int]:
    dtype = "bfloat16" if precision == "mixed" else "float32"
    config = engine.stage_config(stage, args.batch_size // job.world_size, dtype=dtype)
    with engine.engine_of(new_model(args, job), config, job) as trained:
        loss_of = step_of(trained, args, job)
        for _ in range(2):
            trained.backward(loss_of())
            held = engine.held(trained)
            trained.step()
    return held


def count_wire(run: Run, args: Namespace, job: Runtime) -> None:
    """What a rank sends in a step, in units of the model's bytes times (K-1)/K.

    A reduce-scatter or an all-gather of the whole is one unit, an all-reduce two. Stage 3 gathers
    twice, but the root once.
    """
    model = new_model(args, job)
    root = 1 - sum(map(num_parameters, model.model.layers)) / num_parameters(model)
    unit = FLOAT * num_parameters(model) * (job.world_size - 1) / job.world_size
    predicted = {0: 2.0, 1: 2.0, 2: 2.0, 3: 3.0 - root}
    rows: list[list[Any]] = []
    for stage in STAGES:
        ours = sent_in_models(stepper(args, job, stage), job, unit)
        plain = sent_in_models(stepper_of_deepspeed(args, job, stage), job, unit)
        frugal = sent_in_models(stepper_of_deepspeed(args, job, stage, **FRUGAL[stage]), job, unit)
        error = 100 * (predicted[stage] - ours) / ours
        rows.append([stage, predicted[stage], ours, error, plain, frugal])
    run.table(
        "wire",
        ["stage", "predicted", "from scratch", "error (%)", "DeepSpeed",
         "DeepSpeed, set to send less"],
        rows,
        caption="sent by a rank in a step, in models: 1 is a model's bytes times (K-1)/K; set to "
        "send less: reduce to each owner alone (stages 1, 2), and free weights after use (stage 3)",
    )  # fmt: skip
    worst = max(abs(row[3]) for row in rows) / 100
    run.check_below("from scratch, the largest error of a prediction of bytes", worst, WIRE)


def sent_in_models(step: Callable[[], None], job: Runtime, unit: float) -> float:
    return max(gathered(bytes_sent(step, job))) / unit


def stepper_of_deepspeed(
    args: Namespace, job: Runtime, stage: int, **zero: Any
) -> Callable[[], None]:
    config = engine.stage_config(stage, args.batch_size // job.world_size, **zero)
    trained = engine.begin(new_model(args, job), config, job)
    loss_of = step_of(trained, args, job)

    def step() -> None:
        trained.backward(loss_of())
        trained.step()

    return step


def stepper(args: Namespace, job: Runtime, stage: int) -> Callable[[], None]:
    model = new_model(args, job)
    zero = Zero(model, model.model.layers, stage)
    optimizer = torch.optim.SGD(zero.partitions, lr=0.0)
    loss_of = step_of(model, args, job)

    def step() -> None:
        loss_of().backward()
        zero.step(optimizer)

    return step


def new_model(args: Namespace, job: Runtime, seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    return model_from_args(args, job.device)


def step_of(model: Any, args: Namespace, job: Runtime) -> Callable[[], Tensor]:
    """A forward pass on the first batch; its loss."""
    inputs, targets = (
        part.chunk(job.world_size)[job.rank] for part in next(iter(batches(args, job)))
    )
    return lambda: model(inputs, targets=targets)


def batches(args: Namespace, job: Runtime) -> list[Batch]:
    """Global ones, the same on every rank: inputs and targets [batch, seq]."""
    random = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, args.seq_len + 1)
    vocabulary = config_from_args(args).vocab_size
    drawn = [torch.randint(vocabulary, shape, generator=random) for _ in range(args.steps)]
    return [(tokens[:, :-1].to(job.device), tokens[:, 1:].to(job.device)) for tokens in drawn]


def mean(loss: Tensor, job: Runtime) -> float:
    total = loss.detach().float().clone()
    dist.all_reduce(total)
    return total.item() / job.world_size


def differences(one: Trained, other: Trained) -> tuple[float, float, float]:
    """Largest, of losses, gradients and weights, over all ranks; a missing one is not equal."""
    own = [max(abs(a - b) for a, b in zip(one[0], other[0], strict=True))]
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        if mine.keys() != theirs.keys():
            own.append(float("inf"))
        else:
            own.append(max((mine[n] - theirs[n]).abs().max().item() for n in mine))
    losses, gradients, weights = (max(values) for values in zip(*gathered(own), strict=True))
    return losses, gradients, weights


if __name__ == "__main__":
    script.exit(main)
