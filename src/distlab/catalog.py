"""Named models and named GPUs, as plain data, each with its source.

A model's sizes are those of the config.json beside its published weights; a test instantiates
transformers' own class from the same sizes and finds the same number of parameters. A GPU's
numbers are its data sheet's: dense peaks, not the doubled ones "with sparsity".
"""

from dataclasses import dataclass, field

from distlab.predict.architecture import Architecture, Experts, LatentAttention


@dataclass(frozen=True)
class ModelSpec:
    """A published model: its architecture, and where its sizes stand."""

    architecture: Architecture
    source: str


@dataclass(frozen=True)
class GpuSpec:
    """A GPU's peaks. Bytes are decimal (1 GB = 1e9 bytes), the smaller reading of a data sheet.

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


MODELS = {
    "gpt2": ModelSpec(
        Architecture(
            50257, 768, 3072, 12, 12, 12, 64, 1024,
            tie_word_embeddings=True, qkv_bias=True, output_bias=True, mlp_bias=True,
            layer_norm=True, learned_positions=True, gated_mlp=False,
        ),
        "openai-community/gpt2; Radford et al. 2019, table 2",
    ),
    "smollm2-135m": ModelSpec(
        Architecture(49152, 576, 1536, 30, 9, 3, 64, 8192, tie_word_embeddings=True),
        "HuggingFaceTB/SmolLM2-135M; arXiv 2502.02737",
    ),
    "llama-3-8b": ModelSpec(
        Architecture(128256, 4096, 14336, 32, 32, 8, 128, 8192),
        "meta-llama/Meta-Llama-3-8B; arXiv 2407.21783, table 3",
    ),
    "llama-3-70b": ModelSpec(
        Architecture(128256, 8192, 28672, 80, 64, 8, 128, 8192),
        "meta-llama/Meta-Llama-3-70B; arXiv 2407.21783, table 3",
    ),
    "llama-3-405b": ModelSpec(
        Architecture(128256, 16384, 53248, 126, 128, 8, 128, 131072),
        "meta-llama/Llama-3.1-405B; arXiv 2407.21783, table 3",
    ),
    "qwen3-0.6b": ModelSpec(
        Architecture(
            151936, 1024, 3072, 28, 16, 8, 128, 40960, tie_word_embeddings=True, qk_norm=True
        ),
        "Qwen/Qwen3-0.6B; arXiv 2505.09388, table 1",
    ),
    "qwen3-8b": ModelSpec(
        Architecture(151936, 4096, 12288, 36, 32, 8, 128, 40960, qk_norm=True),
        "Qwen/Qwen3-8B; arXiv 2505.09388, table 1",
    ),
    "qwen3-32b": ModelSpec(
        Architecture(151936, 5120, 25600, 64, 64, 8, 128, 40960, qk_norm=True),
        "Qwen/Qwen3-32B; arXiv 2505.09388, table 1",
    ),
    "mixtral-8x7b": ModelSpec(
        Architecture(
            32000, 4096, 14336, 32, 32, 8, 128, 32768,
            experts=Experts(num_experts=8, experts_per_token=2, intermediate_size=14336),
        ),
        "mistralai/Mixtral-8x7B-v0.1; arXiv 2401.04088, table 1",
    ),
    "deepseek-v3": ModelSpec(  # without its multi-token-prediction module, which serving leaves out
        Architecture(
            129280, 7168, 18432, 61, 128, 128, 192, 163840,
            latent=LatentAttention(
                q_lora_rank=1536, kv_lora_rank=512,
                qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            ),
            experts=Experts(
                num_experts=256, experts_per_token=8, intermediate_size=2048,
                shared_intermediate_size=2048, first_dense_layers=3,
            ),
        ),
        "deepseek-ai/DeepSeek-V3; arXiv 2412.19437, section 4.2",
    ),
}  # fmt: skip


def _peaks(fp32: float, tf32: float, bf16: float, fp8: float | None = None) -> dict[str, float]:
    """Peaks in FLOP/s of those in TFLOP/s; float16 is as fast as bfloat16 on all of these."""
    peaks = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": bf16}
    if fp8 is not None:
        peaks["fp8"] = fp8
    return {arithmetic: tflops * 1e12 for arithmetic, tflops in peaks.items()}


GPUS = {
    "a100-80gb": GpuSpec(
        memory_bytes=80e9,
        memory_bandwidth=2039e9,
        peak_flops=_peaks(fp32=19.5, tf32=156, bf16=312),
        nvlink_bandwidth=600e9,
        pcie_bandwidth=64e9,
        device_names=("NVIDIA A100-SXM4-80GB",),
        source="NVIDIA A100 Tensor Core GPU data sheet (2021), A100 80GB SXM",
    ),
    "h100": GpuSpec(
        memory_bytes=80e9,
        memory_bandwidth=3350e9,
        peak_flops=_peaks(fp32=67, tf32=494.7, bf16=989.4, fp8=1978.9),
        nvlink_bandwidth=900e9,
        pcie_bandwidth=128e9,
        device_names=("NVIDIA H100 80GB HBM3",),
        source="NVIDIA H100 Tensor Core GPU data sheet (2023), H100 SXM; half of the sparse peaks",
    ),
    "h200": GpuSpec(
        memory_bytes=141e9,
        memory_bandwidth=4800e9,
        peak_flops=_peaks(fp32=67, tf32=494.7, bf16=989.4, fp8=1978.9),
        nvlink_bandwidth=900e9,
        pcie_bandwidth=128e9,
        device_names=("NVIDIA H200",),
        source="NVIDIA H200 Tensor Core GPU data sheet (2024), H200 SXM; half of the sparse peaks",
    ),
    "b200": GpuSpec(
        memory_bytes=180e9,
        memory_bandwidth=8000e9,
        peak_flops=_peaks(fp32=75, tf32=1100, bf16=2250, fp8=4500),
        nvlink_bandwidth=1800e9,
        pcie_bandwidth=128e9,
        device_names=("NVIDIA B200",),
        source="NVIDIA HGX B200 and DGX B200 data sheets (2025), per GPU; half of the sparse peaks",
    ),
    "l4": GpuSpec(
        memory_bytes=24e9,
        memory_bandwidth=300e9,
        peak_flops=_peaks(fp32=30.3, tf32=60, bf16=121, fp8=242.5),
        pcie_bandwidth=64e9,
        device_names=("NVIDIA L4",),
        source="NVIDIA L4 Tensor Core GPU data sheet (2023); half of the sparse peaks",
    ),
    "rtx-4090": GpuSpec(
        memory_bytes=24e9,
        memory_bandwidth=1008e9,
        peak_flops=_peaks(fp32=82.6, tf32=82.6, bf16=165.2, fp8=330.3),
        pcie_bandwidth=64e9,
        device_names=("NVIDIA GeForce RTX 4090",),
        source="NVIDIA Ada GPU Architecture white paper (2023), appendix A, 32-bit accumulation",
    ),
}
