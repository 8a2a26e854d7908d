"""What `train_ddp.py` says of a run: who takes part, how fast it was, and what it learnt."""

import math
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from _replicas import distinct
from _train_held_out import DTYPES, HeldOut
from _train_progress import Progress
from _train_sample import report_sample

from distlab import hardware, predict
from distlab.data import Tokens
from distlab.model import Llama, num_parameters
from distlab.run import Run
from distlab.runtime import Runtime

BELOW_UNIGRAM = 0.1  # nats: a margin that chance does not give
PEAK_LIMIT_S = {"smoke": 0.05, "laptop": 0.5, "gpu": 0.5}  # of measuring one size of product


def say_what_runs(run: Run, args: Namespace, job: Runtime, model: Llama, tokens: Tokens) -> None:
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
    run: Run, args: Namespace, job: Runtime, trainer: Any, tokens: Tokens,
    progress: Progress, held_out: HeldOut,
) -> None:  # fmt: skip
    """Evaluate the trained model, which all ranks do together, and tell what became of the run."""
    model = trainer.model
    progress.tell(args.steps, held_out.loss(model))
    models, peak = distinct(model), peak_of_all(args, job)
    if not job.is_main:
        return
    report_losses(run, progress, held_out, model, tokens)
    if args.dtype == "float16":
        taken = int(next(iter(trainer.optimizer.state.values()))["step"])
        run.metric("steps_left_out", args.steps - taken, "", "their gradients overflowed")
    report_speed(run, args, model, progress, peak)
    run.check_equal("every held-out window counts once", held_out.counted, held_out.count)
    run.check_equal("all ranks end with the same weights, bit for bit", models, 1)
    report_sample(run, args.preset, model, tokens)


def report_verdict(run: Run, progress: Progress) -> None:
    loss, speed = progress.last_held_out, progress.tokens_per_second()
    told = "no step was left to do" if speed is None else f"{speed:,.0f} tok/s"
    run.print(f"verdict: held-out loss {loss:.3f} nats, perplexity {math.exp(loss):.1f}, {told}")


def report_losses(
    run: Run, progress: Progress, held_out: HeldOut, model: Llama, tokens: Tokens
) -> None:
    losses, unigram = progress.losses(), tokens.unigram_entropy()
    reached = progress.last_held_out
    if losses and progress.first_step == 0:
        untrained = math.log(model.config.vocab_size)
        run.compare("first loss: ln(vocabulary)", untrained, losses[0], "nats")
    run.metric("last_loss", losses[-1] if losses else None, "nats")
    run.metric("unigram_entropy", unigram, "nats", "the best loss without context")
    run.metric("held_out_loss", reached, "nats")
    bits = reached / math.log(2) / held_out.bytes_per_token()
    run.metric("bits_per_byte", bits, "", "of held-out text, comparable between vocabularies")
    first = progress.first_step
    run.figure(
        "losses", kind="line", title="The loss falls below the unigram entropy",
        x_label="step", y_label="loss (nats per token)",
        series=[
            {"label": "training", "x": [first + i + 1 for i in range(len(losses))], "y": losses},
            {"label": "held-out", "x": list(progress.held_out),
             "y": list(progress.held_out.values())},
        ],
        lines=[{"label": "unigram entropy", "y": unigram}],
    )  # fmt: skip
    run.check_below(
        f"the held-out loss is {BELOW_UNIGRAM} nats below the unigram entropy",
        reached, unigram - BELOW_UNIGRAM, "nats",
    )  # fmt: skip


def report_speed(
    run: Run, args: Namespace, model: Llama, progress: Progress, peak: float | None
) -> None:
    """Tokens/s, and MFU where the peak of the devices is known."""
    speed = progress.tokens_per_second()
    run.metric("tokens_per_second", speed, "tok/s", "of all ranks together, in the median step")
    flops = predict.training_flops_per_token(model.config.architecture, args.seq_len)
    run.metric("model_flops", flops, "FLOP", "for each token, forward and backward")
    run.metric("peak_of_matrix_products", peak, "FLOP/s", "of all devices together")
    if speed is None or peak is None:
        run.print("MFU: unknown, without a step that was measured and a peak that is known")
        return
    run.metric("mfu", 100 * predict.mfu(speed, flops, peak), "%")


def peak_of_all(args: Namespace, job: Runtime) -> float | None:
    """The peak of the job's devices in FLOP/s: GPUs' specified one, CPUs' as they measure it now.

    None where a GPU's data sheet is not known. Every rank calls it.
    """
    arithmetic = DTYPES[args.dtype]
    if job.device.type == "cuda":
        gpus = min(job.local_world_size, torch.cuda.device_count())  # ranks may share one
        one = hardware.peak_flops(job.device, arithmetic)
        return None if one is None else one * gpus * job.world_size / job.local_world_size
    job.barrier()  # the ranks' cores are busy at the same time, as they are in a step
    own = hardware.measured_peak_flops(job.device, arithmetic, PEAK_LIMIT_S[args.preset])
    peak = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(peak)
    return peak.item()
