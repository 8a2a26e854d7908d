"""A whole training plan on G GPUs: what one GPU of it must hold.

Replicas of tp·pp·cp GPUs each train on a sequence; the rest is data parallelism, G / (tp·pp·cp).
Context-parallel ranks hold the same weights, so ZeRO shards over them too; expert parallelism takes
its ranks from those of data parallelism (Megatron-LM's layout).
"""

import math
from dataclasses import dataclass
from typing import Literal

from distlab.errors import UsageError
from distlab.predict.activations import Kernels, Recompute, peak_activations
from distlab.predict.architecture import Architecture
from distlab.predict.memory import PRECISIONS, model_state
from distlab.predict.params import (
    expert_parameters,
    layer_parameters,
    rank_parameters,
    stage_layers,
)


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is trained: degrees, sharding (ZeRO stage; FSDP is 3), precision, batch.

    `chunks` are the layers' groups per pipeline stage (more than one: the interleaved schedule).
    `sequence_parallel` divides over tp what tensor parallelism alone leaves whole on every rank
    (Korthikanti et al., arXiv 2205.05198, section 4.2.2). `recompute` and `kernels`: see
    `activations`. `offload` keeps the optimizer's state in the host's memory and steps there
    (ZeRO-Offload, arXiv 2101.06840), "all" weights and gradients too (FSDP2's CPUOffloadPolicy).
    `replicate` groups of ranks each hold a whole set of shards (hybrid sharding, HSDP).
    Two habits of FSDP under a pipeline, or with accumulation, cost memory and save messages:
    `reshard_after_forward` False leaves a stage's weights gathered from its first forward pass to
    its last backward pass; `reduce_each` False adds up whole gradients and shards them once a step.
    """

    gpus: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    precision: str = "mixed"
    optimizer: str = "adamw"
    seq_len: int = 4096
    micro_batch: int = 1
    accumulation: int = 1
    recompute: Recompute = "none"
    cp: int = 1
    ep: int = 1
    chunks: int = 1
    sequence_parallel: bool = False
    kernels: Kernels = "eager"
    offload: Literal["none", "optimizer", "all"] = "none"
    replicate: int = 1
    reshard_after_forward: bool = True
    reduce_each: bool = True

    @property
    def data_parallel(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def shards(self) -> int:
        """The ranks over which ZeRO shards: of those that hold the same weights one group."""
        return self.data_parallel * self.cp // self.replicate

    @property
    def checkpointing(self) -> bool:
        """Whether whole layers are computed again."""
        return self.recompute == "full"

    @property
    def tokens_per_step(self) -> int:
        return self.data_parallel * self.micro_batch * self.accumulation * self.seq_len


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. `workspace` is what the parallelism itself needs on top of the
    `total`: see `_workspace`. `host`: what offloading puts into the host's memory, for this GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    kv_cache: float
    workspace: float
    stage: int
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum((self.weights, self.gradients, self.optimizer, self.activations, self.kv_cache))

    @property
    def needed(self) -> float:
        return self.total + self.workspace


def training_memory(a: Architecture, plan: TrainingPlan) -> Memory:
    """What training needs on the GPU that needs most, of all pipeline stages.

    Raises `UsageError` as `check_plan`.
    """
    check_plan(a, plan)
    stages = (training_stage_memory(a, plan, stage) for stage in range(plan.pp))
    return max(stages, key=lambda memory: memory.needed)


def training_stage_memory(a: Architecture, plan: TrainingPlan, stage: int) -> Memory:
    """What training needs on a GPU of one pipeline stage."""
    experts = expert_parameters(a, plan.tp, plan.pp, stage)
    shared = rank_parameters(a, plan.tp, plan.pp, stage) - experts
    dense = model_state(shared, plan.precision, plan.optimizer, plan.zero, plan.shards)
    routed = model_state(
        experts / plan.ep, plan.precision, plan.optimizer, plan.zero, max(plan.shards // plan.ep, 1)
    )
    weights = dense.weights + routed.weights
    gradients = dense.gradients + routed.gradients
    optimizer = dense.optimizer + routed.optimizer
    moved = {"none": 0, "optimizer": optimizer, "all": weights + gradients + optimizer}
    activations = peak_activations(
        a, plan.precision, plan.seq_len // plan.cp, plan.micro_batch, plan.recompute,
        plan.tp, plan.pp, stage, plan.accumulation, plan.chunks, plan.sequence_parallel,
        plan.kernels, sharded=_gathers(plan),
    )  # fmt: skip
    return Memory(
        weights=0.0 if plan.offload == "all" else weights,
        gradients=0.0 if plan.offload == "all" else gradients,
        optimizer=0.0 if plan.offload != "none" else optimizer,
        activations=activations,
        kv_cache=0.0,
        workspace=_workspace(a, plan, stage),
        stage=stage,
        host=moved[plan.offload],
    )


def check_plan(a: Architecture, plan: TrainingPlan) -> None:
    """Raise `UsageError`, naming the flag and what would do, where a plan cannot be."""
    check_degrees(a, plan.gpus, plan.tp, plan.pp, plan.cp, plan.ep)
    if plan.chunks > 1:
        _check_interleaving(a, plan)
    if plan.cp > 1 and plan.seq_len % (2 * plan.cp):  # each rank has an early and a late piece
        raise UsageError(
            f"--seq-len {plan.seq_len} is no multiple of 2 x --cp {plan.cp}; use --seq-len "
            f"{math.ceil(plan.seq_len / (2 * plan.cp)) * 2 * plan.cp}"
        )
    if plan.sequence_parallel and plan.tp == 1:
        raise UsageError("--sequence-parallel divides over --tp, which is 1; use --tp 2 or more")
    if plan.sequence_parallel and plan.seq_len // plan.cp % plan.tp:
        raise UsageError(
            f"--sequence-parallel: --tp {plan.tp} does not divide the {plan.seq_len // plan.cp} "
            f"tokens of a rank; use another --seq-len"
        )
    if plan.data_parallel * plan.cp % plan.replicate:
        raise UsageError(
            f"--replicate {plan.replicate} does not divide {plan.data_parallel * plan.cp} ranks "
            f"with the same weights; use {divisors(plan.data_parallel * plan.cp)}"
        )
    if plan.zero == 0 and plan.replicate > 1:
        raise UsageError(
            f"--replicate {plan.replicate} is about groups of shards; add --fsdp or --zero 1"
        )
    if plan.zero < 3:
        given = {
            "--offload all": plan.offload == "all",
            "--no-reshard-after-forward": not plan.reshard_after_forward,
        }
        for flag in (flag for flag, wrong in given.items() if wrong):
            raise UsageError(f"{flag} is about sharded weights; add --fsdp")


def _check_interleaving(a: Architecture, plan: TrainingPlan) -> None:
    if plan.pp == 1:
        raise UsageError(
            f"--virtual-stages {plan.chunks} needs a pipeline; use --pp 2 or more, or leave it out"
        )
    most = a.num_hidden_layers // plan.pp
    if plan.chunks > most:
        raise UsageError(
            f"--virtual-stages {plan.chunks} x --pp {plan.pp} are more chunks than the model's "
            f"{a.num_hidden_layers} layers; use --virtual-stages {most} or fewer"
        )
    if plan.accumulation % plan.pp:
        raise UsageError(
            f"--virtual-stages: --accumulation {plan.accumulation} is no multiple of --pp "
            f"{plan.pp}; use --accumulation {math.ceil(plan.accumulation / plan.pp) * plan.pp}"
        )


def _gathers(plan: TrainingPlan) -> bool:
    return plan.zero == 3 and plan.shards > 1


def check_degrees(a: Architecture, gpus: int, tp: int, pp: int, cp: int = 1, ep: int = 1) -> None:
    """Raise `UsageError`, naming the flag and what would do, where a degree cannot be."""
    parts = {
        "heads": a.num_attention_heads,
        "key-value heads": a.num_attention_heads if a.latent else a.num_key_value_heads,
        "columns of the MLP": a.intermediate_size,
    }
    for name, count in parts.items():
        if count % tp:
            usable = divisors(math.gcd(*parts.values()))
            raise UsageError(f"--tp {tp} does not divide {count} {name}; use {usable}")
    if pp > a.num_hidden_layers:
        raise UsageError(
            f"--pp {pp} is more than the model's {a.num_hidden_layers} layers; "
            f"use {a.num_hidden_layers} or fewer"
        )
    replica = tp * pp * cp
    if gpus % replica:
        degrees = f"--tp {tp} x --pp {pp}" + (f" x --cp {cp}" if cp > 1 else "")
        raise UsageError(
            f"--gpus {gpus} is no multiple of {degrees} = {replica}; "
            f"use --gpus {math.ceil(gpus / replica) * replica} or smaller degrees"
        )
    experts = a.experts.num_experts if a.experts else 1
    most = math.gcd(experts, gpus // replica)
    if most % ep:
        raise UsageError(
            f"--ep {ep} does not divide {experts} experts and {gpus // replica} data-parallel "
            f"ranks; use {divisors(most)}"
        )


def _workspace(a: Architecture, plan: TrainingPlan, stage: int) -> float:
    """Bytes that the parallelism itself needs: buffers that hold what other ranks have sent.

    ZeRO-3: see `_gathered`. Whole gradients, where they are not sharded at once. Sequence
    parallelism: the gathered hidden vectors of one block and their gradient. Context parallelism:
    the keys and values that arrive while those of the rank before are used. Half-precision logits:
    the caching allocator keeps their block when they are dead, and the float32 vectors that follow
    are too large for it.
    """
    p = PRECISIONS[plan.precision]
    tokens = plan.micro_batch * plan.seq_len / plan.cp
    needed = _gathered(a, plan, stage) if _gathers(plan) else 0.0
    if plan.zero >= 2 and not plan.reduce_each:
        needed += rank_parameters(a, plan.tp, plan.pp, stage) * p.gradient
    if plan.sequence_parallel and plan.tp > 1:
        needed += 2 * tokens * a.hidden_size * p.compute
    if plan.cp > 1:
        width = a.query_size + a.value_size if a.latent else 2 * a.key_value_size
        needed += 2 * tokens * width / plan.tp * p.compute
    if stage == plan.pp - 1 and plan.kernels != "compiled-loss" and p.compute < 4:
        needed += tokens * a.vocab_size / plan.tp * p.compute
    return needed


def _gathered(a: Architecture, plan: TrainingPlan, stage: int) -> float:
    """Bytes of gathered units: each block is a unit, embedding and output another, the root.

    The block at work and the one that is fetched ahead (all of the stage's, if they stay gathered),
    the root from the first forward to the last backward pass, one block's gradient, and its copy
    that the reduce-scatter sends, which is summed in the gradient's precision. Source: Zhao et al.,
    "PyTorch FSDP" (arXiv 2304.11277), sections 3.3 and 4.1; torch.distributed.fsdp.fully_shard.
    """
    p = PRECISIONS[plan.precision]
    layers = stage_layers(a.num_hidden_layers, plan.pp, stage)
    kept = expert_parameters(a, plan.tp, plan.pp, stage) * (1 - 1 / plan.ep)
    blocks = sum(layer_parameters(a, layer).per_rank(plan.tp) for layer in layers)
    root = rank_parameters(a, plan.tp, plan.pp, stage) - blocks
    block = layer_parameters(a, layers[-1]).per_rank(plan.tp) - kept / len(layers)
    gathered = min(len(layers), 2) * block if plan.reshard_after_forward else blocks - kept
    return (gathered + root + block) * p.compute + block * p.gradient


def divisors(count: int) -> str:
    """The numbers that divide `count`, as words: 1, 2, 4 or 8."""
    found = [str(n) for n in range(1, count + 1) if count % n == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]
