"""What surrounds attention over all ranks' tokens: whose tokens are where, and what is sent."""

from argparse import Namespace
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distlab import predict
from distlab.launch import detect_launch
from distlab.layers import Attention, rope_tables, rotate
from distlab.model import (
    Llama,
    config_from_args,
    num_parameters,
)
from distlab.ranks import gathered
from distlab.run import Run
from parallelism.problem import FLOAT, Problem, check_degree, check_shares, gradients_of, mean_loss
from parallelism.traffic import Traffic


class ParallelAttend(Protocol):
    """Attention of this rank's queries to the tokens of all ranks, counted in `traffic`."""

    zigzag: bool
    traffic: Traffic

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class ParallelAttention(nn.Module):
    """The layer's attention with the same weights, and `attend` where torch's kernel was."""

    def __init__(self, whole: Attention, attend: ParallelAttend) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = whole.q_proj, whole.k_proj, whole.v_proj
        self.o_proj, self.head_dim, self.attend = whole.o_proj, whole.head_dim, attend

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: None = None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [batch, heads, seq/K, head_dim]
        attended = self.attend(rotate(q, rope), rotate(k, rope), v)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


def step(
    problem: Problem, attend: ParallelAttend
) -> tuple[Tensor, dict[str, Tensor], list[Traffic]]:
    """The loss and the gradients of all tokens, of which this rank computes its own.

    And what it sent for that: in the forward pass, in the backward pass, for the weights.
    """
    model, forward, backward, weights = problem.new_model(), attend.traffic, Traffic(), Traffic()
    alone = [module for module in model.modules() if isinstance(module, Attention)]
    for layer, attention in zip(model.model.layers, alone, strict=True):
        layer.self_attn = ParallelAttention(attention, attend)
    seq_len, x = problem.input_ids.shape[1], model.lm_head.weight
    cosines, sines = rope_tables(model.config, 0, seq_len, x.device, x.dtype)
    own = positions_of_rank(forward.rank, forward.world_size, seq_len, attend.zigzag)
    loss = loss_at(
        model, problem.input_ids[:, own], problem.targets[:, own], (cosines[own], sines[own])
    )
    attend.traffic = backward
    loss.backward()
    gradients = gradients_of(model)
    average(gradients.values(), weights)
    return mean_loss(loss), gradients, [forward, backward, weights]


def average(gradients: Iterable[Tensor], traffic: Traffic) -> None:
    """The mean over the ranks, in place."""
    for gradient in gradients:
        traffic.all_reduce(gradient).div_(traffic.world_size)


def positions_of_rank(rank: int, workers: int, seq_len: int, zigzag: bool) -> Tensor:
    chunks = torch.arange(seq_len).chunk(2 * workers)
    return torch.cat([chunks[i] for i in chunks_of_rank(rank, workers, zigzag)])


def chunks_of_rank(rank: int, workers: int, zigzag: bool) -> list[int]:
    """The two of the sequence's 2·K chunks that `rank` has."""
    return [rank, 2 * workers - 1 - rank] if zigzag else [2 * rank, 2 * rank + 1]


def check_context(args: Namespace) -> None:
    """Raise `UsageError` where the ranks cannot share the tokens, or Ulysses the heads."""
    workers = detect_launch().world_size
    chunks = f"chunks, two for each of {workers} ranks"
    check_shares("--seq-len", args.seq_len, 2 * workers, chunks)
    config = config_from_args(args)
    heads = {"heads": config.num_attention_heads, "key-value heads": config.num_key_value_heads}
    if args.method != "ring":
        check_degree(workers, heads, ", or --method ring")


def report_bytes(run: Run, form: str, args: Namespace, sent: list[Traffic]) -> None:
    """Bytes by formula, for the b·s/K tokens of a rank, beside those counted.

    ring      keys and values, K - 1 times forward; backward again, and K times their gradients
    Ulysses   (K - 1)/K of queries, keys, values and outputs; the same backward
    """
    config, workers = config_from_args(args), sent[0].world_size
    tokens = args.batch_size * args.seq_len // workers
    of_a_head = FLOAT * tokens * config.dim_per_head * config.num_hidden_layers
    keys_and_values = 2 * config.num_key_value_heads * of_a_head
    queries_and_outputs = 2 * config.num_attention_heads * of_a_head
    if form == "ulysses":
        forward = (workers - 1) / workers * (queries_and_outputs + keys_and_values)
        backward = forward
    else:
        forward = (workers - 1) * keys_and_values
        backward = forward + (workers * keys_and_values if workers > 1 else 0)
    weights = predict.data_parallel_bytes(FLOAT * num_parameters(config), workers)
    passes = {"forward": forward, "backward": backward, "gradients of the weights": weights}
    for (name, predicted), traffic in zip(passes.items(), sent, strict=True):
        run.compare(f"{form}: {name}, bytes", predicted, traffic.total, "B")


def report_blocks(run: Run, form: str, args: Namespace, computed: int) -> None:
    """Of a layer's K·(2·K + 1) blocks rank r has 4·r + 3 in order, and each 2·K + 1 in zigzag."""
    workers, layers = dist.get_world_size(), config_from_args(args).num_hidden_layers
    every = gathered(computed)
    busiest = 2 * workers + 1 if "zigzag" in form else 4 * workers - 1
    run.compare(f"{form}: blocks of the busiest rank in a layer", busiest, max(every) / layers)
    run.metric(f"{form}: blocks of a rank on average", sum(every) / workers / layers)


def loss_at(
    model: Llama, input_ids: Tensor, targets: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """`model.loss` of tokens that stand at the positions of the tables `rope`, not at 0, 1, 2 …"""
    x = model.model.embed_tokens(input_ids)
    for layer in model.model.layers:
        x = layer(x, rope)
    logits = model.lm_head(model.model.norm(x))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
