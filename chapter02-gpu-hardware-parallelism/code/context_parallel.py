"""Context parallelism from scratch: ring attention and Ulysses, with 1/K of the tokens a rank.

A decoder works token by token, but for attention, where a token sees all those before it.
    ring      Keys and values travel around the ring in K - 1 steps. A rank's queries stay; they
              attend to the block that is there, and online softmax adds the blocks up. Backward
              the blocks travel again, and their gradients with them, one step further: home.
    Ulysses   An all-to-all turns all heads of my tokens into all tokens of my heads; any attention
              runs; another turns it back. K has to divide the key-value heads.
A block that lies in the future is skipped. With the tokens in order the last rank then has most of
the work; in zigzag rank r has the chunks r and 2K - 1 - r of 2K, and all ranks have the same. The
weights are replicated: their gradients are averaged as in data parallelism. Sources: Liu et al.
2023 (arXiv 2310.01889), Jacobs et al. 2023 (arXiv 2309.14509), Llama 3 (arXiv 2407.21783), 3.3.2.

Run:
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/context_parallel.py

You should see: every gradient equal to one process's, and a busiest rank with tokens in order.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from distlab import runtime, script
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.context import check_context, chunks_of_rank, report_blocks, report_bytes, step
from parallelism.problem import check_equal, one_process, parser
from parallelism.tensor import Conjugate
from parallelism.traffic import Traffic

FORMS = {"ring": ["ring in order", "ring in zigzag"], "ulysses": ["ulysses"]}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    made = parser(__doc__)
    made.add_argument("--method", choices=[*FORMS, "both"], default="both")
    args = made.parse_args(argv)
    check_context(args)
    return args


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    problem = one_process(run, args, job)
    for form in FORMS.get(args.method) or sum(FORMS.values(), []):
        attend = Ulysses() if form == "ulysses" else Ring(zigzag="zigzag" in form)
        loss, gradients, sent = step(problem, attend)
        check_equal(run, form, loss, gradients, problem)
        report_bytes(run, form, args, sent)
        if isinstance(attend, Ring):
            report_blocks(run, form, args, attend.blocks)


class Ring:
    """Attention of this rank's queries to the keys and values that travel past it."""

    def __init__(self, zigzag: bool) -> None:
        self.traffic, self.zigzag = Traffic(), zigzag
        self.rank, self.workers = self.traffic.rank, self.traffic.world_size
        self.blocks = 0  # pairs of chunks that this rank computed

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [batch, heads, seq/K, head_dim], keys and values [batch, kv_heads, …]."""
        q = q.unflatten(1, (k.shape[1], -1))  # beside each key head, the query heads that share it
        return RingAttention.apply(q, k.unsqueeze(2), v.unsqueeze(2), self).flatten(1, 2)

    def travel(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The blocks that come past, this rank's own first, each with the rank it belongs to."""
        yield self.rank, block
        for hop in range(1, self.workers):
            block = self.pass_on(block)
            yield (self.rank - hop) % self.workers, block

    def pass_on(self, block: Tensor) -> Tensor:
        before, after = (self.rank - 1) % self.workers, (self.rank + 1) % self.workers
        return self.traffic.exchange(block, to=after, source=before)

    def seen(self, owner: int, length: int) -> Iterator[tuple[tuple, tuple, bool]]:
        """Own rows and `owner`'s columns, chunk by chunk; True where they are the same chunk."""
        for i, row in enumerate(chunks_of_rank(self.rank, self.workers, self.zigzag)):
            for j, column in enumerate(chunks_of_rank(owner, self.workers, self.zigzag)):
                if column <= row:  # else it lies in the future
                    yield half(i, length), half(j, length), column == row


def half(index: int, length: int) -> tuple:
    """Selects the first or second of a rank's chunks from [..., length, head_dim]."""
    return ..., slice(index * length // 2, (index + 1) * length // 2), slice(None)


class RingAttention(Function):
    """q [batch, kv_heads, heads / kv_heads, seq/K, head_dim], k and v [batch, kv_heads, 1, …]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        peak = q.new_full((*q.shape[:-1], 1), -torch.inf)
        total, out = torch.zeros_like(peak), torch.zeros_like(q)
        for owner, (k_here, v_here) in ring.travel(torch.stack([k, v])):
            for rows, columns, diagonal in ring.seen(owner, q.shape[-2]):
                scores = attention_scores(q[rows], k_here[columns], diagonal)
                higher = torch.maximum(peak[rows], scores.amax(-1, keepdim=True))
                weights, shrink = (scores - higher).exp(), (peak[rows] - higher).exp()
                total[rows] = total[rows] * shrink + weights.sum(-1, keepdim=True)
                out[rows] = out[rows] * shrink + weights @ v_here[columns]
                peak[rows] = higher
                ring.blocks += 1
        out /= total
        ctx.save_for_backward(q, k, v, out, peak + total.log())
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_total = ctx.saved_tensors
        d_q, travelling = torch.zeros_like(q), torch.stack([k, v]).zero_()
        mean = (d_out * out).sum(-1, keepdim=True)  # of d_out · v, by the attention weights
        for owner, (k_here, v_here) in ctx.ring.travel(torch.stack([k, v])):
            d_k, d_v = travelling
            for rows, columns, diagonal in ctx.ring.seen(owner, q.shape[-2]):
                scores = attention_scores(q[rows], k_here[columns], diagonal)
                weights = (scores - log_total[rows]).exp()
                d_scores = weights * (d_out[rows] @ v_here[columns].mT - mean[rows])
                d_scores /= q.shape[-1] ** 0.5
                d_q[rows] += d_scores @ k_here[columns]
                d_k[columns] += (d_scores.mT @ q[rows]).sum(2, keepdim=True)
                d_v[columns] += (weights.mT @ d_out[rows]).sum(2, keepdim=True)
            travelling = ctx.ring.pass_on(travelling)  # stays with its block, and ends at home
        return d_q, *travelling, None


def attention_scores(q: Tensor, k: Tensor, diagonal: bool) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores + torch.full_like(scores[0, 0, 0], -torch.inf).triu(1) if diagonal else scores


class Ulysses:
    """Attention over the ranks' tokens [batch, heads, seq/K, head_dim], which stand in order."""

    zigzag = False

    def __init__(self) -> None:
        self.traffic = Traffic()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.exchange(x, split=1, join=2) for x in (q, k, v))  # [.., heads/K, seq, ..]
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.exchange(out, split=2, join=1)

    def exchange(self, x: Tensor, split: int, join: int) -> Tensor:
        """Split dimension `split` over the ranks, and have all of `join`; backward the reverse."""
        return Conjugate.apply(x, partial(self.swap, split, join), partial(self.swap, join, split))

    def swap(self, split: int, join: int, x: Tensor) -> Tensor:
        parts = torch.stack(x.chunk(self.traffic.world_size, split))  # one for each rank
        return torch.cat(self.traffic.all_to_all(parts).unbind(), join)


if __name__ == "__main__":
    script.exit(main)
