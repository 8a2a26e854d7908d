"""FLOPs, and the time and money that they take."""

from collections.abc import Mapping

from distlab.predict.activations import Recompute
from distlab.predict.architecture import Architecture
from distlab.predict.params import attention_weights, matmul_parameters, mlp_weights


def forward_flops_per_token(a: Architecture, context: float) -> float:
    """2·N + 4·L·H·Q·T floating-point operations for one token that sees `context` tokens.

    N: the elements of the matrices that the token meets (`matmul_parameters`), a multiplication
    and an addition each; L layers, H heads of Q elements, T the context. Training counts T = the
    whole sequence for every token, as the paper does: kernels that skip the masked half do less.
    Where keys and values differ in size (latent attention) 4·H·Q is 2·(H·Q_key + H·Q_value).
    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    attention = 2 * (a.query_size + a.value_size) * context
    return 2 * matmul_parameters(a) + a.num_hidden_layers * attention


def training_flops_per_token(a: Architecture, seq_len: int, recompute: Recompute = "none") -> float:
    """6·N + 12·L·H·Q·T: a forward pass, and a backward pass of twice its operations.

    With full recomputation the layers' forward pass is done twice, 8·N in all (the output
    projection is not in a layer and is not repeated); with selective recomputation the matrix
    products that `activations` does not keep are. MFU never counts that repetition.
    Source: PaLM, appendix B; Korthikanti et al. (arXiv 2205.05198), appendix A.
    """
    forward = forward_flops_per_token(a, seq_len)
    if recompute == "full":
        return 4 * forward - 2 * a.vocab_size * a.hidden_size
    if recompute == "selective":
        return 3 * forward + _flops_repeated(a)
    return 3 * forward


def _flops_repeated(a: Architecture) -> float:
    """2·H·(KV + Q + I) per layer: keys, attention's output and `up` are computed again."""
    repeated = 0.0
    for layer in range(a.num_hidden_layers):
        mlp = mlp_weights(a, layer, active=True).divided
        attention = float(a.hidden_size * (a.key_value_size + a.value_size))
        if a.latent is not None:  # the half of its products
            attention = attention_weights(a).total / 2
        repeated += attention + mlp / (3 if a.gated_mlp else 2)
    return 2 * repeated


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilization: the fraction of the peak FLOP/s (of all GPUs) that the model needs.

    `flops_per_token` without recomputation. Source: PaLM, appendix B.
    """
    return tokens_per_second * flops_per_token / peak_flops


def roofline_seconds(
    flops: float, bytes_moved: float, peak_flops: float, bandwidth: float
) -> float:
    """max(flops / peak, bytes / bandwidth): no kernel is faster than its slower resource.

    Source: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
    """
    return max(flops / peak_flops, bytes_moved / bandwidth)


def pipeline_bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """The fraction of a step in which a stage waits: (p - 1) / (v·m + p - 1).

    p stages, m micro-batches, v model chunks per stage (1: GPipe or 1F1B; more: interleaved).
    Source: GPipe (arXiv 1811.06965), section 2.3; Narayanan et al. (arXiv 2104.04473), section 2.2,
    which gives (p - 1) / (v·m) relative to the time without the bubble.
    """
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def step_seconds(
    flops: float, gpus: int, peak_flops: float, utilization: float, bubble: float = 0.0
) -> float:
    """Seconds of a step of `flops` over all GPUs at `utilization` of their peak.

    With the model's FLOPs and an MFU that is all: what recomputation and the pipeline's bubble take
    is inside of a measured MFU (PaLM, appendix B). With the FLOPs that are executed and the GPUs'
    efficiency while they compute, the bubble is on top: time / (1 - bubble).
    """
    return flops / (gpus * peak_flops * utilization) / (1 - bubble)


def experts_touched(a: Architecture, tokens: float) -> float:
    """How many routed experts of a layer a batch of tokens needs, if the router is uniform.

    E·(1 - (1 - k/E)^tokens): each token leaves an expert out with probability 1 - k/E. It decides
    how many of the weights a decode step must read. 0 for a dense model.
    """
    if a.experts is None:
        return 0.0
    missed = (1 - a.experts.experts_per_token / a.experts.num_experts) ** tokens
    return a.experts.num_experts * (1 - missed)


def decode_tokens_per_second(
    batch: int, weight_bytes: float, cache_bytes: float, bandwidth: float
) -> float:
    """The upper bound that memory sets on generation: each step reads all weights and the cache.

    batch / ((weight_bytes + cache_bytes) / bandwidth), with `cache_bytes` of the whole batch.
    Source: Pope et al., "Efficiently Scaling Transformer Inference" (arXiv 2211.05102), section 2.
    """
    return batch * bandwidth / (weight_bytes + cache_bytes)


def cost_usd(seconds: float, gpus: int, usd_per_gpu_hour: float) -> float:
    """seconds / 3600 · gpus · price."""
    return seconds / 3600 * gpus * usd_per_gpu_hour


def peak_for(peaks: Mapping[str, float], dtype: str) -> float:
    """The peak FLOP/s for weights of `dtype`, of the next wider arithmetic where there is none.

    int8 and int4 weights are widened to bfloat16 before the product (weight-only quantization).
    """
    wider = {"fp8": "bf16", "int8": "bf16", "int4": "bf16", "bf16": "fp32", "tf32": "fp32"}
    while dtype not in peaks:
        dtype = wider[dtype]
    return peaks[dtype]
