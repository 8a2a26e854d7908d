"""Train under a DeepSpeed config: the training of chapters 3 and 4, divided as the file says.

The script makes the model, the batches and the loss; the config decides what is divided over the
ranks, what is offloaded, and how gradients travel. Six of them stand in configs/. Where one says
"auto", the script's flags fill it in, as Hugging Face's Trainer does.

Run:
    torchrun --nproc_per_node=2 chapter05-deepspeed-zero/code/train_deepspeed.py
    torchrun --nproc_per_node=2 chapter05-deepspeed-zero/code/train_deepspeed.py \\
        --config chapter05-deepspeed-zero/configs/deepspeed_stage3_config.json
    deepspeed --num_accelerators 2 chapter05-deepspeed-zero/code/train_deepspeed.py
    sbatch chapter05-deepspeed-zero/configs/train_deepspeed.sbatch

You should see: the first losses equal to one process's (--prove), the held-out loss far below the
entropy of the token frequencies, the bytes that a rank keeps by kind, a resumed run that goes on
with the same losses, and with --export a folder that transformers reads.
"""

import contextlib
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlab import data, hardware, runtime, script
from distlab.errors import UsageError
from distlab.model import Llama, config_from_args, num_parameters
from distlab.model_config import config_to_json
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.training.flags import add_training_flags, refuse, refuse_for, take_shape
from distlab.training.held_out import HeldOut
from distlab.training.outcome import export, peak_of_all, report_losses, report_speed
from distlab.training.progress import Progress, StopRequest, warmup_cosine
from zero import engine, resuming
from zero.config_check import Plan, check
from zero.engine import fill, read_config

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": None, "corpus_mb": 1.0, "seq_len": 32, "batch_size": 8, "steps": 150,
              "learning_rate": 1e-2, "eval_every": 50, "eval_windows": 64},
    "laptop": {"model": None, "corpus_mb": 2.0, "seq_len": 128, "batch_size": 8, "steps": 200,
               "learning_rate": 6e-3, "eval_every": 100, "eval_windows": 64},
    "gpu": {"model": "gpu", "seq_len": 1024, "batch_size": 32, "steps": 300,
            "learning_rate": 6e-4, "dtype": "bfloat16", "eval_every": 100, "eval_windows": 256},
}  # fmt: skip
SHAPES = {
    "smoke": {"vocab_size": 320},
    "laptop": {"vocab_size": 1024, "hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2},
}
PEAK_LIMIT_S = {"smoke": 0.05, "laptop": 0.5, "gpu": 0.5}  # of measuring one size of product
SAME_LOSS = 1e-5  # nats: float32 sums in another order, carried through the proof's steps
CONFIG = engine.CONFIGS / "deepspeed_stage2_config.json"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        StopRequest() as stop,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        train_and_report(run, args, job, stop)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_training_flags(parser)
    parser.add_argument(
        "--config", "--deepspeed_config", type=Path, default=CONFIG, metavar="FILE",
        help="DeepSpeed's (default: configs/deepspeed_stage2_config.json)",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not needed")
    args = parser.parse_args(argv)
    if args.model is None:
        take_shape(args, args.preset, SHAPES[args.preset])
    refuse(args)
    if args.compile:
        raise UsageError("--compile is not for this script; leave it out")
    return args


def train_and_report(run: Run, args: Namespace, job: Runtime, stop: StopRequest) -> None:
    config = config_from_args(args)
    refuse_for(args, job)
    settings = fill(read_config(args.config), args, job)
    refuse_config(args, settings, job)
    tokens = data.prepare_from_args(args, config.vocab_size, workers=hardware.machine().cores)
    with Trainer(args, settings, job, tokens) as trainer:
        say_what_runs(run, args, job, trainer)
        progress = train(run, args, job, trainer, stop)
        if progress is None:
            return
        if args.prove:
            prove(run, args, job, tokens, progress)
        if args.export:
            weights = engine.whole_weights(trainer.engine)  # all ranks together
            if job.is_main:
                model = Llama(config)
                model.load_state_dict(weights, strict=False)
                export(run, model, args.export, tokens)
        run.print(
            f"verdict: held-out loss {progress.last_held_out:.3f} nats, "
            f"perplexity {math.exp(progress.last_held_out):.1f}"
        )


def refuse_config(args: Namespace, settings: dict[str, Any], job: Runtime) -> None:
    """Raise `UsageError` for what check_config.py finds: DeepSpeed ignores much of it, or hangs."""
    remedy = f"give numbers; this script fills in {', '.join(engine.FILLED)}"
    plan = Plan(settings, job.world_size, job.device.type, remedy_of_auto=remedy)
    if found := check(plan):
        raise UsageError(f"--config {args.config}: {'; '.join(map(str, found))}")


class Trainer:
    """DeepSpeed's engine around the model, and this rank's batches."""

    def __init__(
        self, args: Namespace, settings: dict[str, Any], job: Runtime, tokens: data.Tokens
    ) -> None:
        self.args, self.settings, self.job, self.tokens = args, settings, job, tokens
        self.shape = config_to_json(config_from_args(args))  # of the model, in each checkpoint
        self.held: dict[str, int] = {}  # bytes by kind, before the last step
        self.stage: int = settings["zero_optimization"]["stage"]
        with engine.refusing("--config", args.config):
            model = engine.new_model(args, settings, job)
            self.engine = engine.begin(model, settings, job, parameter_groups(args, model))
        self.batches = data.Loader(
            tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed, job.device,
            prefetch=2 if job.device.type == "cuda" else 0,
        )  # fmt: skip

    @property
    def model(self) -> Llama:
        return self.engine.module

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.batches.close()
        self.engine.destroy()

    def step(self, step: int) -> Tensor:
        """One optimizer step on the next global batch; this rank's mean loss, not waited for.

        The engine counts micro-batches: it divides the loss by their number, and its `step` does
        nothing until the last. Clipping is its own too.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * warmup_cosine(
                step, self.args.steps, self.args.warmup
            )
        losses = []
        for inputs, targets in self.micro_batches():
            loss = self.engine(inputs, targets=targets)
            self.engine.backward(loss)
            if step + 1 == self.args.steps:
                self.held = engine.held(self.engine)
            self.engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rank's share of the next global batch in equal pieces."""
        inputs, targets = next(self.batches)  # [batch / ranks, seq] each
        count = self.args.accumulate
        return zip(inputs.chunk(count), targets.chunk(count), strict=True)

    def save(self, step: int) -> None:
        """Every rank writes its part; one that alone called this would wait for the others."""
        state = {"loader": self.batches.state_dict(), "config": self.shape}
        resuming.save(self.engine, Path(self.args.checkpoint_dir), step, self.args.keep, state)

    def resume(self, report: Callable[[str], object] = print) -> int:
        """From --resume's checkpoint, or the newest of --checkpoint-dir; the step to go on from."""
        args, flag = self.args, "--checkpoint-dir"
        tag = None
        if args.resume not in ("auto", "none"):
            tag, flag = Path(args.resume).resolve(), "--resume"
        elif args.checkpoint_dir and args.resume == "auto":
            tag = resuming.checkpoint_in(Path(args.checkpoint_dir), report)
        if tag is None:
            return 0
        state = resuming.take_up(self.engine, tag, flag, self.settings, self.shape, self.job)
        if "loader" in state:
            self.batches.load_state_dict(state["loader"])
        report(f"job: resumed at step {self.engine.global_steps}")
        return self.engine.global_steps


def parameter_groups(args: Namespace, model: Llama) -> list[dict[str, Any]]:
    """Norms are not decayed; in stage 3 a parameter's own shape is [0], and `ds_shape` the real."""
    sizes = {p: len(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
    return [
        {
            "params": [p for p, size in sizes.items() if size == 2],
            "weight_decay": args.weight_decay,
        },
        {"params": [p for p, size in sizes.items() if size < 2], "weight_decay": 0.0},
    ]


def say_what_runs(run: Run, args: Namespace, job: Runtime, trainer: Trainer) -> None:
    sequences = args.batch_size // (job.world_size * args.accumulate)
    run.print(
        f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}, {args.dtype}; "
        f"{num_parameters(config_from_args(args)):,} parameters; stage {trainer.stage} by "
        f"{args.config.name}; a batch of {args.batch_size} is {job.world_size} x "
        f"{args.accumulate} x {sequences} sequence(s)"
    )


def train(
    run: Run, args: Namespace, job: Runtime, trainer: Trainer, stop: StopRequest
) -> Progress | None:
    """Train up to step --steps and report; None where the run was asked to stop before."""
    held_out = HeldOut(
        trainer.tokens.validation, job, windows=args.eval_windows, seq_len=args.seq_len,
        batch_size=args.batch_size,
    )  # fmt: skip
    first_step = trainer.resume(run.print)
    if first_step >= args.steps:
        run.print(f"job: no step is left to do up to --steps {args.steps}; give more to go on")
    progress = Progress(run, job, args.steps, args.batch_size * args.seq_len, first_step)
    for step in progress.steps():
        stopped = progress.share(step, trainer.step(step), stop.is_asked)
        last = step + 1 == args.steps
        if args.checkpoint_dir and (stopped or last or (step + 1) % args.checkpoint_every == 0):
            trainer.save(step + 1)
        if stopped:
            saved = f"checkpoint at step {step + 1}" if args.checkpoint_dir else "nothing is saved"
            run.print(f"preempted: {saved}")
            return None
        if last or (step + 1) % args.eval_every == 0:
            progress.tell(step + 1, held_out.loss(trainer.model))
    if not progress.held_out:  # no step was left to do
        progress.tell(args.steps, held_out.loss(trainer.model))
    report_training(run, args, job, trainer, progress, held_out)
    return progress


def report_training(
    run: Run, args: Namespace, job: Runtime, trainer: Trainer, progress: Progress, held_out: HeldOut
) -> None:
    for kind, size in trainer.held.items():
        run.metric(f"{kind} kept by rank 0", size, "B", "before the last step")
    peak = peak_of_all(job, args.dtype, PEAK_LIMIT_S[args.preset])
    if job.is_main:
        report_losses(run, progress, held_out, trainer.model, trainer.tokens)
        report_speed(run, trainer.model, args.seq_len, progress, peak)
        run.check_equal("every held-out window counts once", held_out.counted, held_out.count)


def prove(run: Run, args: Namespace, job: Runtime, tokens: data.Tokens, progress: Progress) -> None:
    """Compare the first losses with those of one process without DeepSpeed, which rank 0 is now."""
    if progress.first_step > 0:
        run.print("proof: left out, since this run was resumed and has no first steps")
        return
    steps = min(args.prove, args.steps)
    with contextlib.ExitStack() as stack:
        if job.is_main:
            losses = alone(args, replace(job, world_size=1), tokens, steps, stack)
            worst = max(abs(a - b) for a, b in zip(losses, progress.losses(), strict=False))
            run.check_below("first losses differ from one process's by", worst, SAME_LOSS, "nats")
    job.barrier()


def alone(
    args: Namespace, job: Runtime, tokens: data.Tokens, steps: int, stack: contextlib.ExitStack
) -> list[float]:
    torch.manual_seed(args.seed)
    model = Llama(config_from_args(args)).to(job.device)
    optimizer = torch.optim.AdamW(
        parameter_groups(args, model), lr=args.learning_rate, betas=(0.9, 0.95)
    )
    batches = data.Loader(tokens, args.seq_len, args.batch_size, 0, 1, args.seed, job.device)
    stack.callback(batches.close)
    losses = []
    for step in range(steps):
        inputs, targets = next(batches)
        loss = model(inputs, targets=targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warmup_cosine(step, args.steps, args.warmup)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    script.exit(main)
