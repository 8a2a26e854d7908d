"""Named models and named GPUs, as plain data, each with its source.

A model's sizes are those of the config.json beside its published weights; a test instantiates
transformers' own class from the same sizes and finds the same number of parameters. A GPU's
numbers are its data sheet's: dense peaks, not the doubled ones "with sparsity". Its memory is what
the device reports to programs, some per cent off the round number of the data sheet.
"""

from dataclasses import dataclass, field
from typing import Any

from distlab.predict.architecture import Architecture, Experts, LatentAttention


@dataclass(frozen=True)
class ModelSpec:
    """A published model: its architecture, and where its sizes stand."""

    architecture: Architecture
    source: str


@dataclass(frozen=True)
class GpuSpec:
    """A GPU's peaks. `memory_bytes` are what the driver leaves to programs, as
    torch.cuda.mem_get_info and engines' logs tell it ("79.18 GiB" of an "80 GB" H100).

    `peak_flops` in FLOP/s by arithmetic: fp32 (without tensor cores), tf32, bf16, fp16, fp8, dense,
    accumulated in 32 bits. Bandwidths in bytes/s; `nvlink_bandwidth` (None: it has none) and
    `pcie_bandwidth` count both directions together, as data sheets do: half goes each way.
    `device_names` are what the driver calls it.
    """

    memory_bytes: float
    memory_bandwidth: float
    peak_flops: dict[str, float]
    nvlink_bandwidth: float | None = None
    pcie_bandwidth: float | None = None
    device_names: tuple[str, ...] = field(default=())
    source: str = ""


def find_gpu(device_name: str) -> GpuSpec | None:
    """The GPU that the driver calls `device_name` (torch.cuda.get_device_name), None if unknown.

    The name must match in full: a PCIe card of the same chip has other peaks.
    """
    return next((gpu for gpu in GPUS.values() if device_name in gpu.device_names), None)


Sizes = tuple[int, int, int, int, int, int, int, int]


def _model(source: str, sizes: Sizes, **traits: Any) -> ModelSpec:
    """`sizes` are `Architecture`'s first eight fields, `traits` those of the others that differ."""
    return ModelSpec(Architecture(*sizes, **traits), source)


MODELS = {  # words, hidden, MLP, layers, heads, key-value heads, head, positions
    "gpt2": _model(
        "openai-community/gpt2; Radford et al. 2019, table 2",
        (50257, 768, 3072, 12, 12, 12, 64, 1024),
        tie_word_embeddings=True, qkv_bias=True, output_bias=True, mlp_bias=True,
        layer_norm=True, learned_positions=True, gated_mlp=False,
    ),
    "smollm2-135m": _model(
        "HuggingFaceTB/SmolLM2-135M; arXiv 2502.02737",
        (49152, 576, 1536, 30, 9, 3, 64, 8192), tie_word_embeddings=True,
    ),
    "llama-2-13b": _model(
        "meta-llama/Llama-2-13b-hf; arXiv 2307.09288, table 1",
        (32000, 5120, 13824, 40, 40, 40, 128, 4096),
    ),
    "llama-3-8b": _model(
        "meta-llama/Meta-Llama-3-8B; arXiv 2407.21783, table 3",
        (128256, 4096, 14336, 32, 32, 8, 128, 8192),
    ),
    "llama-3-70b": _model(
        "meta-llama/Meta-Llama-3-70B; arXiv 2407.21783, table 3",
        (128256, 8192, 28672, 80, 64, 8, 128, 8192),
    ),
    "llama-3-405b": _model(
        "meta-llama/Llama-3.1-405B; arXiv 2407.21783, table 3",
        (128256, 16384, 53248, 126, 128, 8, 128, 131072),
    ),
    "qwen3-0.6b": _model(
        "Qwen/Qwen3-0.6B; arXiv 2505.09388, table 1",
        (151936, 1024, 3072, 28, 16, 8, 128, 40960), tie_word_embeddings=True, qk_norm=True,
    ),
    "qwen3-8b": _model(
        "Qwen/Qwen3-8B; arXiv 2505.09388, table 1",
        (151936, 4096, 12288, 36, 32, 8, 128, 40960), qk_norm=True,
    ),
    "qwen3-32b": _model(
        "Qwen/Qwen3-32B; arXiv 2505.09388, table 1",
        (151936, 5120, 25600, 64, 64, 8, 128, 40960), qk_norm=True,
    ),
    "qwen3-30b-a3b": _model(
        "Qwen/Qwen3-30B-A3B; arXiv 2505.09388, table 2",
        (151936, 2048, 6144, 48, 32, 4, 128, 40960), qk_norm=True,
        experts=Experts(num_experts=128, experts_per_token=8, intermediate_size=768),
    ),
    "qwen3-235b-a22b": _model(
        "Qwen/Qwen3-235B-A22B; arXiv 2505.09388, table 2",
        (151936, 4096, 12288, 94, 64, 4, 128, 40960), qk_norm=True,
        experts=Experts(num_experts=128, experts_per_token=8, intermediate_size=1536),
    ),
    "mixtral-8x7b": _model(
        "mistralai/Mixtral-8x7B-v0.1; arXiv 2401.04088, table 1",
        (32000, 4096, 14336, 32, 32, 8, 128, 32768),
        experts=Experts(num_experts=8, experts_per_token=2, intermediate_size=14336),
    ),
    "deepseek-v3": _model(  # without its multi-token-prediction module, which serving leaves out
        "deepseek-ai/DeepSeek-V3; arXiv 2412.19437, section 4.2",
        (129280, 7168, 18432, 61, 128, 128, 192, 163840),
        latent=LatentAttention(
            q_lora_rank=1536, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        ),
        experts=Experts(
            num_experts=256, experts_per_token=8, intermediate_size=2048,
            shared_intermediate_size=2048, first_dense_layers=3,
        ),
    ),
}  # fmt: skip


def _gpu(
    device_name: str, source: str, gibibytes: float, bandwidth: float, nvlink: float | None,
    pcie: float, *, fp32: float, tf32: float, bf16: float, fp8: float | None = None,
) -> GpuSpec:  # fmt: skip
    """GiB as the device reports; as a data sheet has it GB/s and TFLOP/s; float16 is as fast as
    bfloat16 on all."""
    peaks = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": bf16, "fp8": fp8}
    return GpuSpec(
        memory_bytes=gibibytes * 2**30,
        memory_bandwidth=bandwidth * 1e9,
        peak_flops={arithmetic: peak * 1e12 for arithmetic, peak in peaks.items() if peak},
        nvlink_bandwidth=None if nvlink is None else nvlink * 1e9,
        pcie_bandwidth=pcie * 1e9,
        device_names=(device_name,),
        source=source,
    )


GPUS = {  # memory: GiB as torch's errors and engines' logs give it, and GB/s; NVLink, PCIe: GB/s
    "a100-80gb": _gpu(
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 Tensor Core GPU data sheet (2021), A100 80GB SXM",
        79.25, 2039, 600, 64, fp32=19.5, tf32=156, bf16=312,
    ),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 Tensor Core GPU data sheet (2023), H100 SXM; half of the sparse peaks",
        79.18, 3350, 900, 128, fp32=67, tf32=494.7, bf16=989.4, fp8=1978.9,
    ),
    "h200": _gpu(
        "NVIDIA H200",
        "NVIDIA H200 Tensor Core GPU data sheet (2024), H200 SXM; half of the sparse peaks",
        139.81, 4800, 900, 128, fp32=67, tf32=494.7, bf16=989.4, fp8=1978.9,
    ),
    "b200": _gpu(
        "NVIDIA B200",
        "NVIDIA HGX B200 and DGX B200 data sheets (2025), per GPU; half of the sparse peaks",
        178.35, 8000, 1800, 128, fp32=75, tf32=1100, bf16=2250, fp8=4500,
    ),
    "l4": _gpu(
        "NVIDIA L4",
        "NVIDIA L4 Tensor Core GPU data sheet (2023); half of the sparse peaks",
        22.03, 300, None, 64, fp32=30.3, tf32=60, bf16=121, fp8=242.5,
    ),
    "rtx-4090": _gpu(
        "NVIDIA GeForce RTX 4090",
        "NVIDIA Ada GPU Architecture white paper (2023), appendix A, 32-bit accumulation",
        23.64, 1008, None, 64, fp32=82.6, tf32=82.6, bf16=165.2, fp8=330.3,
    ),
}  # fmt: skip
