"""What a training run is measured by: speed and MFU, memory, and the loss it reached."""

from argparse import Namespace
from dataclasses import dataclass

import torch

from distlab import data, hardware, measure, predict
from distlab.model import Llama, ModelConfig
from distlab.predict.activations import Recompute
from distlab.runtime import Runtime
from distlab.script import Run

WARMUP_STEPS = 5
BELOW_UNIGRAM = 0.1  # nats: a margin that chance does not give


@dataclass
class Training:
    """What a training run left: losses in nats, its steps' seconds, memory in bytes."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int
    state_bytes: int
    resident_bytes: int | None = None  # by which the process grew, on a CPU

    @property
    def step_seconds(self) -> float:
        """The median step, warm-up left out."""
        steady = self.seconds[WARMUP_STEPS:]
        return sorted(steady)[len(steady) // 2]


def report_speed(
    run: Run, args: Namespace, config: ModelConfig, training: Training, job: Runtime
) -> None:
    """Tokens/s and MFU: on a GPU of its specified peak, on a CPU of the measured one."""
    tokens = args.batch_size * args.seq_len
    flops = predict.training_flops_per_token(config.architecture, args.seq_len)
    speed = tokens / training.step_seconds
    run.metric("tokens_per_second", speed, "tok/s", f"median of {args.steps - WARMUP_STEPS} steps")
    if args.compile:
        run.metric("compile_time", training.seconds[0] - training.step_seconds, "s")
    arithmetic = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    if job.device.type == "cuda":
        peak = hardware.peak_flops(job.device, arithmetic)
    else:
        peak = hardware.measured_peak_flops(job.device, arithmetic)
    run.metric("peak_of_matrix_products", peak, "FLOP/s")
    if peak is None:
        run.print("MFU: unknown, since no data sheet of this GPU is known")
        return
    run.metric("mfu", 100 * predict.mfu(speed, flops, peak), "%")
    run.compare("step time at the peak", tokens * flops / peak, training.step_seconds, "s")


def report_memory(run: Run, args: Namespace, config: ModelConfig, training: Training) -> None:
    """The model's state, and the peak, which adds activations.

    The formula is that of the eager model: torch.compile fuses, and keeps fewer activations.
    """
    a = config.architecture
    precision = "autocast" if args.dtype == "bfloat16" else "fp32"
    state = predict.model_state(predict.total_parameters(a), precision, "adamw").total
    recompute: Recompute = "full" if args.gradient_checkpointing else "none"
    activations = predict.peak_activations(a, precision, args.seq_len, args.batch_size, recompute)
    logits = 12 * a.vocab_size * args.batch_size * args.seq_len
    activations -= logits * (1 - 1 / args.loss_chunks)
    run.compare("weights, gradients and optimizer", state, training.state_bytes, "B")
    run.compare("peak memory of training", state + activations, training.peak_bytes, "B")
    if training.resident_bytes is not None:
        grown = training.resident_bytes
        run.metric("growth_of_the_process", grown, "B", "with what the C library keeps in reserve")
    run.check_close(
        "state is 16 bytes a parameter", training.state_bytes, state, tolerance=0.01, relative=True
    )


def activation_peak(model: Llama, batch: tuple[torch.Tensor, torch.Tensor], dtype: str) -> int:
    """Bytes that one more forward and backward need beside the state, counted tensor by tensor.

    A CPU has no allocator to ask: what the process grew by has the C library's reserves in it.
    """
    with measure.LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model.loss(*batch)
        loss.backward()
    return live.peak


def report_loss(run: Run, tokens: data.Tokens, training: Training, held_out: float) -> None:
    """The loss on held-out text must be below what token frequencies alone can give."""
    unigram = tokens.unigram_entropy()
    run.metric("unigram_entropy", unigram, "nats")
    run.metric("first_loss", training.losses[0], "nats")
    run.metric("last_loss", training.losses[-1], "nats")
    run.metric("validation_loss", held_out, "nats")
    steps = list(range(1, len(training.losses) + 1))
    run.figure(
        "baseline_loss", kind="line", title="The loss falls below the unigram entropy",
        x_label="step", y_label="loss (nats per token)",
        series=[{"label": "training", "x": steps, "y": training.losses}],
        lines=[{"label": "unigram entropy", "y": unigram},
               {"label": "validation, at the end", "y": held_out}],
    )  # fmt: skip
    run.check_below(
        f"validation loss is {BELOW_UNIGRAM} nats below the unigram entropy",
        held_out, unigram - BELOW_UNIGRAM, "nats",
    )  # fmt: skip


def show_sample(run: Run, model: Llama, tokens: data.Tokens, prompt: str = "import os\n") -> None:
    """What the model has learnt, in its own words: it differs from machine to machine."""
    device = model.lm_head.weight.device
    start = torch.tensor([tokens.tokenizer.encode(prompt).ids], device=device)
    generator = torch.Generator(device).manual_seed(0)
    written = model.generate(start, 40, temperature=0.8, generator=generator)
    run.print(f"sample: {prompt!r} goes on as {tokens.tokenizer.decode(written[0].tolist())!r}")
