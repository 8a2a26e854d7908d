"""Trains small models here and compares memory and FLOPs with the formulas of distlab.predict."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from distlab import predict
from distlab.hardware import default_device, has_cuda
from distlab.measure import LiveBytes, PeakMemory, tensor_bytes
from distlab.model import SIZES, Llama, ModelConfig
from distlab.predict.activations import Recompute
from distlab.run import Run

BATCH = 2
SEQ_LEN = {"smoke": 128, "laptop": 64, "gpu": 1024}
LIMITS = {  # percent; the state is exact but for a step counter per parameter tensor
    "model state": 1.0,
    "saved activations": 15.0,
    "peak activations": 15.0,
    "allocator's peak": 15.0,
    "FLOPs per step": 3.0,
}


@dataclass(frozen=True)
class Compared:
    """A quantity of one step, predicted and measured."""

    name: str
    predicted: float
    measured: float
    unit: str = "B"


@dataclass(frozen=True)
class Case:
    """One training step to predict and to measure."""

    shape: str
    config: ModelConfig
    precision: str
    checkpointing: bool
    seq_len: int

    @property
    def recompute(self) -> Recompute:
        return "full" if self.checkpointing else "none"


def verify(run: Run, size: str) -> None:
    """Compare every quantity of every case: the errors in a table, the worst of each as a check."""
    cases = _cases(size)
    compared = [list(_compared(case)) for case in run.progress(cases, "verifying")]
    rows = [
        [
            case.shape,
            case.precision,
            "recomputed" if case.checkpointing else "kept",
            *(f"{_error(each):+.2f} %" for each in quantities),
        ]
        for case, quantities in zip(cases, compared, strict=True)
    ]
    names = [each.name for each in compared[0]]
    caption = "error of the prediction, one training step here"
    run.table("verification", ["shape", "precision", "activations", *names], rows, caption)
    for name, quantities in zip(names, zip(*compared, strict=True), strict=True):
        worst = max(quantities, key=lambda each: abs(_error(each)))
        run.compare(f"{name}, worst case", worst.predicted, worst.measured, worst.unit)
        of = f"{name}: largest error in {len(cases)} steps"
        run.check_below(of, abs(_error(worst)), LIMITS[name], "%")


def _cases(size: str) -> list[Case]:
    base = SIZES[size]
    heads = base.num_attention_heads
    shapes = {
        "grouped heads, tied": base,
        "all heads, untied": replace(base, num_key_value_heads=heads, tie_word_embeddings=False),
        "twice as deep": replace(base, num_hidden_layers=2 * base.num_hidden_layers),
    }
    full = "bf16" if has_cuda() else "fp32"  # CUDA's fused attention kernels want 16 bits
    runs = [(name, full) for name in shapes] + [("grouped heads, tied", "autocast")]
    return [
        Case(name, shapes[name], precision, checkpointing, SEQ_LEN[size])
        for (name, precision), checkpointing in product(runs, (False, True))
    ]


def _compared(case: Case) -> Iterator[Compared]:
    a, precision, seq_len = case.config.architecture, case.precision, case.seq_len
    step = Step(case)
    flops = predict.training_flops_per_token(a, seq_len, case.recompute) * BATCH * seq_len
    yield Compared("FLOPs per step", flops, step.count_flops(), "FLOP")

    step.optimizer.step()
    state = predict.model_state(predict.total_parameters(a), precision, "adamw")
    yield Compared("model state", state.total, tensor_bytes(step.state()))

    with LiveBytes() as live:
        loss = step.forward()
        saved = live.bytes
        loss.backward()
    sizes = (a, precision, seq_len, BATCH, case.recompute)
    yield Compared("saved activations", predict.saved_activations(*sizes), saved)
    yield Compared("peak activations", predict.peak_activations(*sizes), live.peak)
    if step.device.type == "cuda":
        with PeakMemory(step.device) as peak:
            step.forward().backward()
        yield Compared("allocator's peak", predict.peak_activations(*sizes), peak.bytes)


def _error(compared: Compared) -> float:
    """Percent of what was measured."""
    return 100 * (compared.predicted / compared.measured - 1)


class Step:
    """A model, its optimizer and a batch; gradients, once there, are added to in place."""

    def __init__(self, case: Case) -> None:
        self.device = torch.device(default_device())
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        self.autocast = case.precision == "autocast"
        self.model = Llama(case.config).to(self.device, dtype)
        self.model.gradient_checkpointing = case.checkpointing
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        shape = (BATCH, case.seq_len)
        self.tokens = torch.randint(case.config.vocab_size, shape, device=self.device)

    def forward(self) -> torch.Tensor:
        narrow = torch.autocast(self.device.type, torch.bfloat16)
        with narrow if self.autocast else nullcontext():
            return self.model.loss(self.tokens, self.tokens)

    def state(self) -> list[torch.Tensor]:
        """Weights, gradients and the optimizer's moments."""
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*parameters, *gradients, *moments]

    def count_flops(self) -> int:
        """FLOPs of forward and backward as torch counts its matrix products.

        Attention runs unfused, since no formula is registered for the CPU's fused kernel; a
        recomputed layer runs to its end, which torch cuts short before the last matrix.
        """
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False):
            self.forward().backward()
        return counter.get_total_flops()
