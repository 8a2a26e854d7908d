"""The two ends of a tensor-parallel model: each rank has the embeddings and logits of its words.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3, "fuse the output of the parallel GEMM
with the cross entropy loss".
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _traffic import Traffic
from torch import Tensor, nn
from torch.autograd import Function


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
    def forward(ctx, logits: Tensor, targets: Tensor, traffic: Traffic) -> Tensor:
        peak = traffic.all_reduce(logits.amax(-1), dist.ReduceOp.MAX)
        exponentials = (logits - peak.unsqueeze(-1)).exp()
        total = traffic.all_reduce(exponentials.sum(-1))
        index, mine = own_words(targets, logits.shape[-1], traffic.rank)
        own_score = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) * mine
        score = traffic.all_reduce(own_score)
        ctx.save_for_backward(exponentials / total.unsqueeze(-1), index, mine)
        return (total.log() + peak - score).mean()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        probabilities, index, mine = ctx.saved_tensors
        target = torch.zeros_like(probabilities)
        target.scatter_(-1, index.unsqueeze(-1), mine.to(target.dtype).unsqueeze(-1))
        return gradient * (probabilities - target) / len(target), None, None


def own_words(words: Tensor, count: int, rank: int) -> tuple[Tensor, Tensor]:
    """Each word's place among this rank's `count`, 0 if it is not there; and whether it is."""
    mine = words // count == rank
    return torch.where(mine, words - rank * count, 0), mine
