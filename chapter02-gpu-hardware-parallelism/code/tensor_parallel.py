"""Tensor parallelism from scratch: each rank holds a part of every matrix (Megatron-LM).

Attention and MLP are both a product with A, then something for each head or column on its own, then
a product with B. A rank takes 1/K of A's columns (whole heads, in attention) and the matching rows
of B; the ranks' outputs need only be summed. Two operators do that, around each block:

                          forward                       backward
    f, into a block       nothing | all-gather          all-reduce | reduce-scatter
    g, out of a block     all-reduce | reduce-scatter   nothing | all-gather

So a layer has 2 all-reduces forward and 2 backward, of 4·b·s·h bytes each. Right of the bar stands
sequence parallelism: between the blocks a rank keeps 1/K of the tokens. It sends no more bytes,
since a reduce-scatter and an all-gather make an all-reduce. The vocabulary is split too: a rank
looks up and scores its own V/K words, and the loss exchanges 3 numbers a token, not V logits.
Sources: Shoeybi et al. 2019 (arXiv 1909.08053), section 3; Korthikanti et al. 2022 (arXiv
2205.05198), section 4.2.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/tensor_parallel.py

You should see: loss and every gradient equal to one process's, and the same bytes in both forms.
"""

from argparse import Namespace

import torch
from _parallel import check_degree, check_equal, check_shares, gradients_of, one_process, parser
from _parallel_report import parts_of, report_parameters, report_tensor_traffic
from _parallel_vocabulary import SplitCrossEntropy, SplitEmbedding
from _traffic import Traffic
from torch import Tensor
from torch.autograd import Function

from distlab import runtime, script
from distlab.launch import detect_launch
from distlab.model import Llama, config_from_args
from distlab.run import Run
from distlab.runtime import Runtime

A = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # a part of the outputs
B = ("o_proj", "down_proj")  # the same part of the inputs
WORDS = ("embed_tokens", "lm_head")  # a part of the vocabulary


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    check_degree(detect_launch().world_size, parts_of(config_from_args(args)))
    check_shares("--seq-len", args.seq_len, detect_launch().world_size, "ranks")
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    problem = one_process(run, args, job)
    for form in ("tensor parallel", "with sequence parallel"):
        forward, backward = Traffic(), Traffic()
        split = TensorParallel(problem.new_model(), forward, "sequence" in form)
        loss = split.loss(problem.input_ids, problem.targets)
        split.traffic = backward
        loss.backward()
        split.sum_norm_gradients()
        check_equal(run, form, loss, gradients_of(split.model), problem, split.own_part)
        report_tensor_traffic(run, form, args, job.world_size, forward, backward)
    report_parameters(run, split.model, job.world_size)


class TensorParallel:
    """A Llama of which this rank keeps its part; all ranks are given the same tokens."""

    def __init__(self, model: Llama, traffic: Traffic, sequence_parallel: bool = False) -> None:
        self.model, self.traffic, self.sequence_parallel = model, traffic, sequence_parallel
        for name, parameter in model.named_parameters():
            parameter.data = self.own_part(name, parameter.data).clone()  # a tied one stays tied
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                block.register_forward_pre_hook(lambda _, inputs: (self.f(inputs[0]), *inputs[1:]))
                block.register_forward_hook(lambda _, inputs, output: self.g(output))
        model.model.embed_tokens = SplitEmbedding(model.model.embed_tokens.weight, traffic.rank)
        model.model.embed_tokens.register_forward_hook(lambda _, inputs, output: self.g(output))

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
        logits = self.model.lm_head(self.f(self.model.model(input_ids)))  # [batch, seq, V/K]
        return SplitCrossEntropy.apply(logits.flatten(0, 1), targets.flatten(), self.traffic)

    def sum_norm_gradients(self) -> None:
        """With sequence parallelism a rank's norms have seen its own tokens only."""
        for parameter in self.model.parameters():
            if self.sequence_parallel and parameter.dim() == 1:
                self.traffic.all_reduce(parameter.grad)


class Conjugate(Function):
    """A collective in the forward pass, and in the backward pass the one that is its derivative."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient), None, None


def nothing(x: Tensor) -> Tensor:
    return x


if __name__ == "__main__":
    script.exit(main)
