"""The training script to start from: real text, DDP, and what a run needs that is left alone.

Each rank takes its share of the global batch in --accumulate micro-batches. `no_sync` keeps DDP
quiet in all but the last, in whose backward pass it averages the gradients: they are sent once for
each optimizer step. The rest makes a run of it: mixed precision, clipping, warm-up and cosine,
evaluation sharded over the ranks, checkpoints, and SIGUSR1 or SIGTERM as the request to save and
stop.

Run:
    python chapter03-ddp/code/train_ddp.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/train_ddp.py --export build/python-lm
    torchrun --nproc_per_node=2 chapter03-ddp/code/train_ddp.py --checkpoint-dir build/checkpoints
    sbatch chapter03-ddp/configs/train_ddp.sbatch

You should see: the held-out loss far below the entropy of the token frequencies, tokens/s and MFU,
samples that look like Python, the same weights on all ranks, and, with --export, that transformers
computes from the exported folder what this model computes. Stop a run that has a --checkpoint-dir
by `kill -USR1`, start it again, and it goes on as if nothing had been.
"""

import contextlib
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.training_state import Saver, settle_buckets
from distlab import data, hardware, runtime, script
from distlab.model import Llama, config_from_args, model_from_args, num_parameters
from distlab.ranks import distinct
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.training.flags import add_training_flags, refuse, refuse_for, take_shape
from distlab.training.held_out import HeldOut, autocast
from distlab.training.outcome import (
    export,
    peak_of_all,
    report_losses,
    report_sample,
    report_speed,
)
from distlab.training.progress import Progress, StopRequest, warmup_cosine

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": None, "corpus_mb": 1.0, "seq_len": 32, "batch_size": 8, "steps": 150,
              "learning_rate": 1e-2, "eval_every": 50, "eval_windows": 64},
    "laptop": {"model": None, "corpus_mb": 2.0, "seq_len": 128, "batch_size": 4, "steps": 800,
               "learning_rate": 6e-3, "eval_every": 200, "eval_windows": 128},
    "gpu": {"model": "gpu", "seq_len": 1024, "batch_size": 32, "steps": 300,
            "learning_rate": 6e-4, "dtype": "bfloat16", "compile": True, "eval_every": 100,
            "eval_windows": 256},
}  # fmt: skip
# Without --model, which names sizes of its own: so small that it has read enough within seconds.
SHAPES = {
    "smoke": {"vocab_size": 320},
    "laptop": {"vocab_size": 1024, "hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2},
}
# What is asked of the samples, different keywords and readable lines in units of chance's: smoke's
# run is long enough for words, and too short for syntax.
SAMPLED = {"smoke": (1, None), "laptop": (10, 2.0), "gpu": (10, 2.0)}
PEAK_LIMIT_S = {"smoke": 0.05, "laptop": 0.5, "gpu": 0.5}  # of measuring one size of product
SAME_LOSS = 1e-5  # nats: float32 sums in another order, carried through the proof's steps


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
    args = parser.parse_args(argv)
    if args.model is None:
        take_shape(args, args.preset, SHAPES[args.preset])
    refuse(args)
    return args


def train_and_report(run: Run, args: Namespace, job: Runtime, stop: StopRequest) -> None:
    refuse_for(args, job)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it; no change on a CPU
    config, cores = config_from_args(args), hardware.machine().cores
    tokens = data.prepare_from_args(args, config.vocab_size, workers=cores)
    with Trainer(args, job, tokens) as trainer, Saver(run, args, job) as saver:
        say_what_runs(run, args, job, trainer.model, tokens)
        held_out = HeldOut(
            tokens.validation, job, windows=args.eval_windows, seq_len=args.seq_len,
            batch_size=args.batch_size, dtype=args.dtype,
        )  # fmt: skip
        first_step = saver.resume(trainer)
        progress = Progress(run, job, args.steps, args.batch_size * args.seq_len, first_step)
        if train(args, trainer, held_out, saver, progress, stop):
            report_training(run, args, job, trainer, tokens, progress, held_out)
            if args.prove:
                prove(run, args, job, tokens, progress)
            if args.export and job.is_main:
                export(run, trainer.model.cpu(), args.export, tokens)
            report_verdict(run, progress)


def train(
    args: Namespace,
    trainer: "Trainer",
    held_out: HeldOut,
    saver: Saver,
    progress: Progress,
    stop: StopRequest,
) -> bool:
    """Train up to step --steps; whether it got there, instead of being asked to stop."""
    for step in progress.steps():
        loss = trainer.step(step)
        if progress.share(step, loss, stop.is_asked):
            saver.save_and_stop(step + 1, trainer)
            return False
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            saver.save(step + 1, trainer)
        if (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            progress.tell(step + 1, held_out.loss(trainer.model))
    return True


class Trainer:
    """This rank's replica of the model, with its optimizer, its scaler and its batches."""

    def __init__(
        self,
        args: Namespace,
        job: Runtime,
        tokens: data.Tokens,
        group: ProcessGroup | None = None,
    ) -> None:
        self.args, self.device = args, job.device
        self.model = model_from_args(args, job.device)
        self.ddp = DDP(self.model, process_group=group, gradient_as_bucket_view=True)
        self.forward = torch.compile(self.ddp) if args.compile else self.ddp
        self.optimizer = new_optimizer(args, self.model)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=args.dtype == "float16")
        self.batches = data.Loader(
            tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed, job.device,
            prefetch=2 if job.device.type == "cuda" else 0,
        )  # fmt: skip
        self.settle_buckets(self.batches.local_batch_size // args.accumulate)

    def settle_buckets(self, sequences: int) -> None:
        """Give DDP its order of buckets, on a batch of nothing. Compilation happens here too."""
        nothing = torch.zeros(sequences, self.args.seq_len, dtype=torch.int64, device=self.device)
        settle_buckets(self.ddp, lambda: self.loss(nothing, nothing))

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.batches.close()

    def step(self, step: int) -> Tensor:
        """One optimizer step on the next global batch; this rank's mean loss, not waited for."""
        losses = []
        for micro_batch, is_last in self.micro_batches():
            with contextlib.nullcontext() if is_last else self.ddp.no_sync():
                loss = self.loss(*micro_batch) / self.args.accumulate
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)  # the norm to clip is that of the real gradients
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * warmup_cosine(
                step, self.args.steps, self.args.warmup
            )
        self.scaler.step(self.optimizer)  # leaves it out where a gradient is infinite or NaN
        self.scaler.update()
        self.optimizer.zero_grad()
        return torch.stack(losses).sum()

    def micro_batches(self) -> Iterator[tuple[tuple[Tensor, Tensor], bool]]:
        """The rank's share of the next global batch in equal pieces, and which is the last."""
        inputs, targets = next(self.batches)  # [batch / ranks, seq] each
        count = self.args.accumulate
        pieces = zip(inputs.chunk(count), targets.chunk(count), strict=True)
        for number, piece in enumerate(pieces, start=1):
            yield piece, number == count

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats: products in --dtype, weights and their gradients float32."""
        with autocast(self.device, self.args.dtype):
            return self.forward(input_ids, targets=targets)


def new_optimizer(args: Namespace, model: Llama) -> torch.optim.AdamW:
    """AdamW with the usual settings of language models; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def say_what_runs(
    run: Run, args: Namespace, job: Runtime, model: Llama, tokens: data.Tokens
) -> None:
    sequences = args.batch_size // (job.world_size * args.accumulate)
    run.print(
        f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}, {args.dtype}; "
        f"{num_parameters(model):,} parameters; {len(tokens):,} tokens of text"
    )
    run.print(
        f"job: a batch of {args.batch_size} is {job.world_size} rank(s) x {args.accumulate} "
        f"micro-batch(es) x {sequences} sequence(s) of {args.seq_len} tokens"
    )


def report_training(
    run: Run, args: Namespace, job: Runtime, trainer: Trainer, tokens: data.Tokens,
    progress: Progress, held_out: HeldOut,
) -> None:  # fmt: skip
    """Evaluate the trained model, which all ranks do together, and tell what became of the run."""
    model = trainer.model
    progress.tell(args.steps, held_out.loss(model))
    models = distinct(model.parameters())
    peak = peak_of_all(job, args.dtype, PEAK_LIMIT_S[args.preset])
    if not job.is_main:
        return
    report_losses(run, progress, held_out, model, tokens)
    if args.dtype == "float16":
        taken = int(next(iter(trainer.optimizer.state.values()))["step"])
        run.metric("steps_left_out", args.steps - taken, "", "their gradients overflowed")
    report_speed(run, model, args.seq_len, progress, peak)
    run.check_equal("every held-out window counts once", held_out.counted, held_out.count)
    run.check_equal("all ranks end with the same weights, bit for bit", models, 1)
    report_sample(run, model, tokens, *SAMPLED[args.preset])


def prove(run: Run, args: Namespace, job: Runtime, tokens: data.Tokens, progress: Progress) -> None:
    """Compare the first losses with those of one process, which rank 0 is now; all ranks call."""
    if progress.first_step > 0:
        run.print("proof: left out, since this run was resumed and has no first steps")
        return
    steps = min(args.prove, args.steps)
    alone = dist.new_group([0])
    if job.is_main:
        torch.manual_seed(args.seed)  # as the job began
        with Trainer(args, replace(job, world_size=1), tokens, group=alone) as trainer:
            losses = [trainer.step(step).item() for step in range(steps)]
        worst = max(abs(a - b) for a, b in zip(losses, progress.losses(), strict=False))
        run.check_below("first losses differ from one process's by", worst, SAME_LOSS, "nats")
    job.barrier()


def report_verdict(run: Run, progress: Progress) -> None:
    loss, speed = progress.last_held_out, progress.tokens_per_second()
    told = "no step was left to do" if speed is None else f"{speed:,.0f} tok/s"
    run.print(f"verdict: held-out loss {loss:.3f} nats, perplexity {math.exp(loss):.1f}, {told}")


if __name__ == "__main__":
    script.exit(main)
