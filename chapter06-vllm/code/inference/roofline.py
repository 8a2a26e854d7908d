"""The most output tokens/s that this machine can give: bytes over bandwidth, FLOPs over peak."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from distlab import hardware
from distlab.measure import compare
from distlab.model import ModelConfig
from distlab.predict import forward_flops_per_token, kv_bytes_per_token, roofline_seconds
from distlab.predict.params import matmul_parameters

NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Roofline:
    """A machine's read bandwidth in bytes/s and the peak FLOP/s of matrix products in a dtype."""

    bandwidth: float
    peak_flops: float

    def decode_seconds(
        self, config: ModelConfig, dtype: str, requests: int, context: float
    ) -> float:
        """The least seconds of a step that gives each of `requests` one token.

        See Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 2.
        """
        moved = decode_bytes(config, dtype, requests, context)
        flops = requests * forward_flops_per_token(config.architecture, context)
        return roofline_seconds(flops, moved, self.peak_flops, self.bandwidth)

    def generate_seconds(
        self, config: ModelConfig, dtype: str, requests: int, prompt: float, new_tokens: float
    ) -> float:
        """The least seconds for `requests` that begin together, each `prompt` tokens long.

        The prompts are computed first, at the peak; then a step for every further token, at the
        mean context.
        """
        prefill = requests * prompt * forward_flops_per_token(config.architecture, prompt / 2)
        step = self.decode_seconds(config, dtype, requests, prompt + new_tokens / 2)
        return prefill / self.peak_flops + (new_tokens - 1) * step


def decode_bytes(config: ModelConfig, dtype: str, requests: int, context: float) -> float:
    """Bytes that such a step reads: the weights once for all, the keys and values of `context`
    tokens for each of `requests`."""
    a, width = config.architecture, getattr(torch, dtype).itemsize
    return width * matmul_parameters(a) + requests * context * kv_bytes_per_token(a, NAMES[dtype])


def measured_roofline(dtype: str) -> Roofline:
    """This machine's, measured: a matrix-vector product that no cache holds, and a square one.

    A narrow type may be widened and multiplied in float32, so its peak is never the lower one: many
    CPUs have no instructions for bfloat16, and torch's own product in it is slow there.
    """
    device = torch.device(hardware.default_device())
    kinds = {torch.float32, getattr(torch, dtype)}
    peak = max(hardware.measured_peak_flops(device, kind) for kind in kinds)
    return Roofline(read_bandwidth(device), peak)


@functools.lru_cache
def read_bandwidth(device: torch.device) -> float:
    """Bytes/s at which float32 numbers beyond the caches are read, by the faster of two readers.

    A product with a vector is what decoding one request does, but some BLAS libraries read it on
    one core; a sum uses all. A copy would not do, as it writes as well as it reads.
    """
    columns = 4096
    rows = hardware.beyond_cache_bytes(device) // (4 * columns)
    matrix = torch.ones(rows, columns, device=device)
    vector, product = torch.ones(columns, device=device), torch.empty(rows, device=device)
    readers: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mv(matrix, vector, out=product),
        "sum": matrix.sum,
    }
    timings = compare(readers, 2, 9, device).values()
    return 4 * rows * columns / min(timing.median for timing in timings)
