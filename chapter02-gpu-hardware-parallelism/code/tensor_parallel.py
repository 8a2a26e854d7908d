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

from distlab import predict, runtime, script
from distlab.launch import detect_launch
from distlab.model import config_from_args, num_parameters
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.problem import (
    FLOAT,
    check_degree,
    check_equal,
    check_shares,
    gradients_of,
    one_process,
    parser,
)
from parallelism.tensor import OF_THE_LOSS, TensorParallel, all_reduce_bytes, parts_of
from parallelism.traffic import Traffic


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
        report_traffic(run, form, args, forward, backward)
    architecture = problem.model.config.architecture
    predicted = predict.rank_parameters(architecture, tp=job.world_size)
    run.compare("parameters of a rank", predicted, num_parameters(split.model), "params")


def report_traffic(
    run: Run, form: str, args: Namespace, forward: Traffic, backward: Traffic
) -> None:
    """Each of the 2·L blocks, and the vocabulary at its two ends, has an f and a g.

    The two of them send an all-reduce's bytes in each direction.
    """
    config, workers = config_from_args(args), forward.world_size
    pairs = 2 * config.num_hidden_layers + 1
    activations = pairs * all_reduce_bytes(args, workers, config.hidden_size)
    loss = OF_THE_LOSS * all_reduce_bytes(args, workers, 1)
    if "sequence" in form:
        norms, collectives = pairs, 2 * pairs  # a reduce-scatter and an all-gather for each pair
    else:
        norms, collectives = 0, pairs
    of_norms = norms * predict.data_parallel_bytes(FLOAT * config.hidden_size, workers)
    run.compare(f"{form}: forward, bytes", activations + loss, forward.total, "B")
    run.compare(f"{form}: backward, bytes", activations + of_norms, backward.total, "B")
    run.compare(f"{form}: forward, collectives", collectives + OF_THE_LOSS, forward.total_calls)
    run.compare(f"{form}: backward, collectives", collectives + norms, backward.total_calls)


if __name__ == "__main__":
    script.exit(main)
