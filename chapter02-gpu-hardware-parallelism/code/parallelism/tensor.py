"""Tensor parallelism: which part of which matrix a rank keeps, and what stands around the blocks.

The operators f and g, and their collectives, are those of `tensor_parallel.py`'s table. Sources:
Shoeybi et al. 2019 (arXiv 1909.08053), section 3, with "fuse the output of the parallel GEMM with
the cross entropy loss"; Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from distlab import predict
from distlab.layers import Attention, FeedForward
from distlab.model import ModelConfig
from parallelism.problem import (
    FLOAT,
    gradient_of,
)
from parallelism.traffic import Traffic

A = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # a part of the outputs
B = ("o_proj", "down_proj")  # the same part of the inputs
WORDS = ("embed_tokens", "lm_head")  # a part of the vocabulary
OF_THE_LOSS = 3  # all-reduces of one number a token: maximum, sum, and the target's logit

Collective = Callable[[Tensor], Tensor]


class TensorParallel:
    """A Llama, or a stage of one, of which this rank keeps its part.

    All ranks are given the same tokens. What a model returns are then logits [batch, seq, V/K].
    """

    def __init__(self, model: nn.Module, traffic: Traffic, sequence_parallel: bool = False) -> None:
        self.model, self.traffic, self.sequence_parallel = model, traffic, sequence_parallel
        for name, parameter in model.named_parameters():
            parameter.data = self.own_part(name, parameter.data).clone()  # a tied one stays tied
        parts = dict(model.named_modules())
        if embedding := parts.get("model.embed_tokens"):
            own_words = SplitEmbedding(embedding.get_parameter("weight"), traffic.rank)
            parts["model"].embed_tokens = parts["model.embed_tokens"] = own_words
        for name, part in parts.items():
            if isinstance(part, Attention | FeedForward) or name == "lm_head":
                part.register_forward_pre_hook(lambda _, inputs: (self.f(inputs[0]), *inputs[1:]))
            if isinstance(part, Attention | FeedForward | SplitEmbedding):
                part.register_forward_hook(lambda _, inputs, output: self.g(output))

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of the parameter `name`; torch keeps a matrix as [outputs, inputs]."""
        module = name.removesuffix(".weight")
        if not module.endswith(A + B + WORDS):
            return whole
        dim = 1 if module.endswith(B) else 0
        return whole.chunk(self.traffic.world_size, dim)[self.traffic.rank]

    def f(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return Conjugate.apply(x, self.all_gather, self.reduce_scatter)
        return Conjugate.apply(x, nothing, self.all_reduce)

    def g(self, partial: Tensor) -> Tensor:
        if self.sequence_parallel:
            return Conjugate.apply(partial, self.reduce_scatter, self.all_gather)
        return Conjugate.apply(partial, self.all_reduce, nothing)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.traffic.all_reduce(x.clone(memory_format=torch.contiguous_format))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.traffic.all_gather(x), dim=1)  # [batch, seq, hidden]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self.traffic.reduce_scatter(list(x.chunk(self.traffic.world_size, dim=1)))

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        return self.cross_entropy(self.model(input_ids), targets)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return SplitCrossEntropy.apply(logits.flatten(0, 1), targets.flatten(), self.traffic)

    def sum_norm_gradients(self) -> None:
        """With sequence parallelism a rank's norms have seen its own tokens only."""
        for parameter in self.model.parameters():
            if self.sequence_parallel and parameter.dim() == 1:
                self.traffic.all_reduce(gradient_of(parameter))


class Conjugate(Function):
    """A collective in the forward pass, and in the backward pass the one that is its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Collective, back: Collective) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def nothing(x: Tensor) -> Tensor:
    return x


class SplitEmbedding(nn.Module):
    """The embeddings of this rank's words, and zeros for the others'; the ranks' sum is whole."""

    def __init__(self, weight: nn.Parameter, rank: int) -> None:
        super().__init__()
        self.weight, self.rank = weight, rank  # [V/K, hidden]

    def forward(self, input_ids: Tensor) -> Tensor:
        index, mine = own_words(input_ids, len(self.weight), self.rank)
        return F.embedding(index, self.weight) * mine.unsqueeze(-1)


class SplitCrossEntropy(Function):
    """The mean cross-entropy in nats of logits [tokens, V/K], split by words over the ranks.

    Three numbers a token are all-reduced: the largest logit, the sum of the exponentials, and the
    logit of the target, which one rank has. The backward pass needs nobody.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, traffic: Traffic) -> Tensor:
        peak = traffic.all_reduce(logits.amax(-1), dist.ReduceOp.MAX)
        exponentials = (logits - peak.unsqueeze(-1)).exp()
        total = traffic.all_reduce(exponentials.sum(-1))
        index, mine = own_words(targets, logits.shape[-1], traffic.rank)
        own_score = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) * mine
        score = traffic.all_reduce(own_score)
        ctx.save_for_backward(exponentials / total.unsqueeze(-1), index, mine)
        return (total.log() + peak - score).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probabilities, index, mine = ctx.saved_tensors
        target = torch.zeros_like(probabilities)
        target.scatter_(-1, index.unsqueeze(-1), mine.to(target.dtype).unsqueeze(-1))
        return gradient * (probabilities - target) / len(target), None, None


def own_words(words: Tensor, count: int, rank: int) -> tuple[Tensor, Tensor]:
    """Each word's place among this rank's `count`, 0 if it is not there; and whether it is."""
    mine = words // count == rank
    return torch.where(mine, words - rank * count, 0), mine


def parts_of(config: ModelConfig) -> dict[str, int]:
    """What tensor parallelism shares out."""
    return {
        "heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "columns of the MLP": config.intermediate_size,
        "words": config.vocab_size,
    }


def all_reduce_bytes(args: Namespace, workers: int, numbers: int) -> float:
    """What a rank sends in an all-reduce of so many numbers for each token of the batch."""
    ring = predict.BUS_FACTORS["all_reduce"](workers)
    return ring * FLOAT * args.batch_size * args.seq_len * numbers
