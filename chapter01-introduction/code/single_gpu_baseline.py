"""A training baseline on one device: how fast, how much memory, how well used, and does it learn.

Every later chapter divides this job over several devices, and is judged by these numbers. The
model is trained until its loss is below the entropy of the token frequencies, the best that a model
without context can do: below it, it has learnt something about sequences.

Run:
    python chapter01-introduction/code/single_gpu_baseline.py
    python chapter01-introduction/code/single_gpu_baseline.py --compare
    python chapter01-introduction/code/single_gpu_baseline.py --compile --dtype bfloat16

You should see: tokens/s, model FLOPs utilization (MFU) and memory beside their predictions, the
loss falling through the unigram entropy, and with --compare what bfloat16 (and, with --compile,
what torch.compile) does to a step here. On a CPU compiling takes most of a minute.
"""

import contextlib
import copy
import functools
import math
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distlab import data, hardware, measure, runtime, script
from distlab.model import Llama, ModelConfig, add_model_flags, config_from_args
from distlab.runtime import Runtime
from distlab.script import Run, RunError, UsageError
from intro.baseline import (
    WARMUP_STEPS,
    Training,
    activation_peak,
    report_loss,
    report_memory,
    report_speed,
    show_sample,
)
from intro.trainer import StepClock

PRESETS = {
    "smoke": {"model": "smoke", "seq_len": 64, "batch_size": 16, "corpus_mb": 1.0, "steps": 100,
              "learning_rate": 1e-2},
    "laptop": {"model": "laptop", "seq_len": 64, "batch_size": 8, "corpus_mb": 4.0, "steps": 120,
               "learning_rate": 1e-3},
    "gpu": {"model": "gpu", "seq_len": 1024, "batch_size": 32, "steps": 300,
            "learning_rate": 6e-4, "dtype": "bfloat16"},
}  # fmt: skip
VALIDATION_BATCHES = 8

Step = Callable[[Tensor, Tensor], Tensor]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(seed=args.seed, device=args.device) as job,
        memory_errors_in_one_line(),
    ):
        config = config_from_args(args)
        tokens = data.prepare_from_args(args, config.vocab_size, workers=hardware.machine().cores)
        torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it; no change on a CPU
        model = new_model(args, config, job)
        if args.compare:
            compare_variants(run, args, tokens, model, job)
        else:
            training = train(run, args, model, tokens, job)
            report_speed(run, args, config, training, job)
            report_memory(run, args, config, training)
            held_out = validation_loss(args, model, tokens.validation, job)
            report_loss(run, tokens, training, held_out)
            show_sample(run, model, tokens)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--steps", type=script.positive_int)
    optimisation.add_argument("--learning-rate", type=script.positive_float, metavar="LR")
    optimisation.add_argument("--weight-decay", type=float, default=0.1)
    optimisation.add_argument("--seed", type=script.seed, default=0)
    execution = parser.add_argument_group("execution")
    execution.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    execution.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    execution.add_argument("--compile", action="store_true", help="torch.compile the model")
    execution.add_argument("--gradient-checkpointing", action="store_true")
    execution.add_argument(
        "--loss-chunks", type=script.positive_int, default=1, metavar="N",
        help="compute the loss in N pieces, keeping one piece's logits",
    )  # fmt: skip
    execution.add_argument(
        "--repeats", type=script.positive_int, default=5, help="timed steps of --compare"
    )
    execution.add_argument(
        "--compare", action="store_true",
        help="time float32 against bfloat16, with --compile eager against compiled too",
    )  # fmt: skip
    args = parser.parse_args(argv)
    config_from_args(args)  # a wrong shape is told before anything starts
    if args.steps <= 2 * WARMUP_STEPS:
        raise UsageError(f"--steps {args.steps} is too few to measure; use {2 * WARMUP_STEPS + 1}")
    if args.repeats < 3:
        raise UsageError(f"--repeats {args.repeats} gives no median; use at least 3")
    if args.compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise UsageError("--compile needs a C++ compiler and there is none; install g++")
    return args


def train(run: Run, args: Namespace, model: Llama, tokens: data.Tokens, job: Runtime) -> Training:
    """Train for --steps steps. Nothing in the loop waits for the device."""
    batches = data.Loader(
        tokens, args.seq_len, args.batch_size, seed=args.seed, device=job.device, prefetch=2
    )
    clock, losses = StepClock(job.device), torch.empty(args.steps, device=job.device)
    with measure.PeakMemory(job.device) as memory, contextlib.closing(batches):
        optimizer = new_optimizer(args, model)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: schedule_at(s, args.steps)
        )
        step = make_step(model, optimizer, args.dtype, args.compile)
        clock.tick()
        for i in run.progress(range(args.steps), "training"):
            losses[i] = step(*next(batches))
            schedule.step()
            clock.tick()
        seconds = clock.seconds()
    state = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    state += [t for held in optimizer.state.values() for t in held.values() if t.dim() > 0]
    held = measure.tensor_bytes(state)
    if job.device.type == "cuda":
        return Training(losses.tolist(), seconds, memory.bytes, held)
    peak = held + activation_peak(model, next(batches), args.dtype)
    return Training(losses.tolist(), seconds, peak, held, resident_bytes=memory.bytes)


def make_step(model: Llama, optimizer: torch.optim.Optimizer, dtype: str, compiled: bool) -> Step:
    """One optimizer step on (input_ids, targets), [batch, seq] each; gives the loss, unread.

    bfloat16 is mixed precision: weights, gradients and optimizer state stay float32.
    """
    forward = torch.compile(model) if compiled else model
    parameters = list(model.parameters())
    device = parameters[0].device.type

    def step(input_ids: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(input_ids, targets=targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    return step


def new_model(args: Namespace, config: ModelConfig, job: Runtime) -> Llama:
    with job.device:
        model = Llama(config)
    model.gradient_checkpointing = args.gradient_checkpointing
    model.loss_chunks = args.loss_chunks
    return model


def new_optimizer(args: Namespace, model: Llama) -> torch.optim.AdamW:
    """AdamW with the usual settings of language models; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def schedule_at(step: int, steps: int) -> float:
    """The learning rate's factor: a tenth of the steps up to 1, then a cosine down to 0.1."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def validation_loss(args: Namespace, model: Llama, tokens: data.Tokens, job: Runtime) -> float:
    batches = data.Loader(tokens, args.seq_len, args.batch_size, seed=args.seed, device=job.device)
    count = min(VALIDATION_BATCHES, math.ceil(batches.num_windows / args.batch_size))
    with torch.autocast(job.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        losses = [model.loss(*next(batches)) for _ in range(count)]
    return torch.stack(losses).mean().item()


def compare_variants(
    run: Run, args: Namespace, tokens: data.Tokens, model: Llama, job: Runtime
) -> None:
    """The same step in each precision, eager (and compiled), timed in turns on one batch."""
    batches = data.Loader(tokens, args.seq_len, args.batch_size, seed=args.seed, device=job.device)
    batch = next(batches)
    ways = ["eager", "compiled"] if args.compile else ["eager"]
    variants = {f"{way} {dtype}": (way, dtype) for way in ways for dtype in ("float32", "bfloat16")}
    steps: dict[str, Callable[[], Tensor]] = {}
    losses: dict[str, float] = {}
    for name, (way, dtype) in run.progress(variants.items(), "preparing"):
        twin = copy.deepcopy(model)
        step = make_step(twin, new_optimizer(args, twin), dtype, way == "compiled")
        losses[name] = step(*batch).item()  # the first step compiles
        steps[name] = functools.partial(step, *batch)
    timings = measure.compare(steps, warmup=2, repeats=args.repeats, device=job.device)
    first = next(iter(variants))
    baseline = timings[first].median
    rows = [
        [name, 1e3 * taken.median, 1e3 * taken.q1, 1e3 * taken.q3,
         batch[0].numel() / taken.median, baseline / taken.median, losses[name]]
        for name, taken in timings.items()
    ]  # fmt: skip
    run.table(
        "variants",
        ["step", "median ms", "q1", "q3", "tokens/s", "speed-up", "first loss"],
        rows,
        caption="The same step, timed in turns",
    )
    run.check_close(
        "every variant computes the same loss",
        list(losses.values()), [losses[first]] * len(variants), tolerance=0.02,
    )  # fmt: skip


@contextlib.contextmanager
def memory_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the device has too little memory for this step; use a smaller --batch-size or "
            "--seq-len, --gradient-checkpointing or --loss-chunks 8"
        ) from error


if __name__ == "__main__":
    script.exit(main)
