"""What a policy of activation checkpointing keeps, and what computing the rest again takes."""

import torch
from torch import nn

from distlab import measure, predict
from distlab.predict.activations import layer_activations, saved_activations
from distlab.predict.architecture import Architecture


class Costs:
    """What each policy should keep, and what computing the rest again should take.

    `seconds` is a step that keeps all, `asked` one whose policy is asked for each operator and
    keeps all: Python's time, which compiling or large operators hide. A product takes its FLOPs at
    that step's rate; what is computed element by element takes its bytes, read once and written
    once, at the rate of such a kernel.
    """

    def __init__(
        self, a: Architecture, batch: int, seq_len: int, seconds: float, asked: float,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.a, self.batch, self.seq_len = a, batch, seq_len
        self.seconds, self.asked = seconds, asked
        self.tokens = batch * seq_len
        whole = predict.training_flops_per_token(a, seq_len)
        again = predict.training_flops_per_token(a, seq_len, "full")
        self.full_share = (again - whole) / whole  # of the step, to compute all layers again
        self.per_byte = element_wise(round(self.tokens * self._layer()), device)

    def kept(self, policy: str) -> float:
        """Bytes at the end of forward."""
        a, seq_len, batch = self.a, self.seq_len, self.batch
        if policy == "none":
            return saved_activations(a, "fp32", seq_len, batch)
        inputs = saved_activations(a, "fp32", seq_len, batch, "full")
        if policy == "half":  # of an odd number of layers the larger half keeps all
            return inputs + self.tokens * (self._layer() - 4 * a.hidden_size) * (self._layers(1))
        return inputs + self.tokens * self._products() * a.num_hidden_layers * (policy != "full")

    def step(self, policy: str) -> float:
        """Seconds."""
        if policy == "products":
            dropped = self._layer() - self._products() - 4 * self.a.hidden_size
            again = self.tokens * dropped * self.a.num_hidden_layers
            return self.asked + 2 * again * self.per_byte
        share = {"none": 0.0, "half": self._layers(0) / self.a.num_hidden_layers, "full": 1.0}
        return self.seconds * (1 + share[policy] * self.full_share)

    def _layers(self, rounded_up: int) -> int:
        return (self.a.num_hidden_layers + rounded_up) // 2

    def _layer(self) -> float:
        return layer_activations(self.a, 0, "fp32").total

    def _products(self) -> float:
        """Bytes per token: q, k, v, attention with its log-sum-exp, its output, the three of the
        feed-forward network."""
        a = self.a
        widths = 2 * a.query_size + 2 * a.key_value_size + 2 * a.hidden_size
        return 4 * (widths + 2 * a.intermediate_size + a.num_attention_heads)


def element_wise(size: int, device: torch.device) -> float:
    """Seconds per byte that a kernel reads or writes, of one that does both, on `size` bytes."""
    values = torch.ones(max(1, size // 4), device=device)
    seconds = measure.measure(lambda: nn.functional.silu(values), device=device).median
    return seconds / (2 * values.nbytes)
