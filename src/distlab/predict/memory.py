"""Bytes of a training or serving process that do not depend on the batch, and of the KV cache."""

from dataclasses import dataclass

from distlab.predict.architecture import Architecture


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter of training in one precision, and the arithmetic of its products.

    `moment` are the bytes of one optimizer moment, `master` of the optimizer's own copy of the
    weights, `compute` of an activation element.
    """

    weight: int
    gradient: int
    master: int
    moment: int
    compute: int
    arithmetic: str


PRECISIONS = {
    "fp32": Precision(4, 4, 0, 4, 4, "fp32"),
    "tf32": Precision(4, 4, 0, 4, 4, "tf32"),
    "autocast": Precision(4, 4, 0, 4, 2, "bf16"),
    "mixed": Precision(2, 2, 4, 4, 2, "bf16"),
    "bf16": Precision(2, 2, 0, 2, 2, "bf16"),
    "float8": Precision(4, 4, 0, 4, 2, "fp8"),
}
"""autocast: float32 weights, bfloat16 products (torch.autocast; FSDP2's mixed precision keeps the
same state). mixed: bfloat16 weights and gradients with a float32 master copy in the optimizer, 16
bytes per parameter with AdamW (Rajbhandari et al., section 3.1). bf16: everything in bfloat16.
float8: as autocast, but the products cast their operands to 8 bits on the way, and save them in 16
for the backward pass (torchao.float8, dynamic scaling)."""

MOMENTS = {"adamw": 2, "adamw-8bit": 2, "sgd-momentum": 1, "sgd": 0}
BLOCK_8BIT = 256

DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


def optimizer_bytes_per_parameter(optimizer: str, precision: str) -> float:
    """Master copy and moments: AdamW 12 bytes in `mixed`, 8 in `fp32`; plain SGD none but the copy.

    adamw-8bit: one byte for each moment and a float32 scale per block of 256, as bitsandbytes and
    torchao have it. Source: Rajbhandari et al. (arXiv 1910.02054), section 3.1; Dettmers et al.
    (arXiv 2110.02861), section 2.
    """
    p = PRECISIONS[precision]
    moment = 1 + 4 / BLOCK_8BIT if optimizer == "adamw-8bit" else p.moment
    return p.master + MOMENTS[optimizer] * moment


@dataclass(frozen=True)
class ModelState:
    """Bytes of the model's state on one GPU."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def model_state(
    parameters: float, precision: str, optimizer: str, zero: int = 0, data_parallel: int = 1
) -> ModelState:
    """The state of `parameters` (those of one tensor- and pipeline-parallel rank) on one GPU.

    ZeRO divides over the data-parallel ranks: stage 1 the optimizer's state, 2 the gradients too, 3
    the weights too. FSDP with full sharding is stage 3.
    Source: Rajbhandari et al., "ZeRO" (arXiv 1910.02054), section 5 and figure 1.
    """
    p = PRECISIONS[precision]
    optimizer_bytes = parameters * optimizer_bytes_per_parameter(optimizer, precision)
    return ModelState(
        parameters * p.weight / (data_parallel if zero >= 3 else 1),
        parameters * p.gradient / (data_parallel if zero >= 2 else 1),
        optimizer_bytes / (data_parallel if zero >= 1 else 1),
    )


def kv_bytes_per_token(a: Architecture, dtype: str = "bf16", tp: int = 1, layers: int = 0) -> float:
    """Bytes that one token leaves in the cache of one rank: 2·L·H_kv·Q·b, divided by tp.

    `layers` counts those on this rank (0: all). Latent attention stores the compressed vector and
    the shared rotary key instead, L·(rank + rotary)·b, on every tensor-parallel rank.
    Source: GQA (arXiv 2305.13245); DeepSeek-V2 (arXiv 2405.04434), section 2.1.4 and table 1.
    """
    layers = layers or a.num_hidden_layers
    if a.latent is not None:
        width = float(a.latent.kv_lora_rank + a.latent.qk_rope_head_dim)
    else:
        width = 2 * a.key_value_size / tp
    return layers * width * DTYPE_BYTES[dtype]
