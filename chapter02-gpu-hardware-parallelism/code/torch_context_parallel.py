"""Context parallelism with torch: inside `context_parallel`, attention runs on sharded sequences.

What the library does for you: it cuts the buffers that you name, in place, to the rank's tokens, a
piece from the head and one from the tail of the sequence (the zigzag of context_parallel.py). It
replaces `scaled_dot_product_attention` by one that has the ranks' keys and values gathered, or
passed around, runs CUDA's fused kernels on each block and merges the results, forward and backward.
What it leaves to you: the rotary tables, which are buffers like the tokens; a backward pass inside
the context; the mean of the gradients.

It has kernels for CUDA only, and each rank needs a GPU. Elsewhere this script says so, with status
77; context_parallel.py runs everywhere. It starts two ranks itself, because torchrun would turn
their 77 into a 1. For more ranks use torchrun.

Run:
    python chapter02-gpu-hardware-parallelism/code/torch_context_parallel.py
    torchrun --nproc_per_node=8 chapter02-gpu-hardware-parallelism/code/torch_context_parallel.py

You should see: on two GPUs or more, loss and every gradient equal to one process's. Without GPUs,
why not.
"""

import os
import sys
from argparse import Namespace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from distlab import runtime, script
from distlab.errors import Skipped
from distlab.launch import detect_launch
from distlab.layers import rope_tables
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.context import average, loss_at
from parallelism.problem import (
    FLOAT,
    PRESETS,
    Problem,
    check_equal,
    check_shares,
    gradients_of,
    mean_loss,
    one_process,
    parser,
)
from parallelism.traffic import CountCollectives, Traffic

LONGER = {**PRESETS, "smoke": {**PRESETS["smoke"], "seq_len": 256}}
RANKS = 2  # that this script starts itself
PIECE = 32  # the float32 kernel pads its log-sum-exp to so many tokens, and torch's ring does not


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__, LONGER).parse_args(argv)
    require_gpus(args)
    if detect_launch().master_addr is None:
        start_ranks(sys.argv[1:] if argv is None else argv)
    ranks = detect_launch().world_size
    pieces = f"tokens, two pieces of {PIECE} for each of {ranks} ranks"
    check_shares("--seq-len", args.seq_len, 2 * PIECE * ranks, pieces)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def require_gpus(args: Namespace) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cpu" or gpus == 0:
        raise Skipped(
            "torch's context_parallel has attention kernels for CUDA only: no GPU is used"
        )
    if gpus < RANKS and args.backend != "gloo":
        raise Skipped(
            f"torch's context_parallel needs a GPU for each of {RANKS} ranks: {gpus} here"
        )


def start_ranks(argv: list[str]) -> None:
    """Become torchrun, which starts this script again."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    os.execv(sys.executable, [sys.executable, *torchrun, __file__, *argv])


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    problem = one_process(run, args, job)
    mesh = init_device_mesh(job.device.type, (job.world_size,))
    loss, gradients, attention = step(problem, mesh)
    check_equal(run, "context_parallel", loss, gradients, problem)
    # As context_parallel.py's ring, but with all heads' keys: the float32 kernel knows no groups.
    config, workers = problem.model.config, job.world_size
    tokens = args.batch_size * args.seq_len // workers
    keys_and_values = 2 * FLOAT * tokens * config.num_attention_heads * config.dim_per_head
    hops = 2 * (workers - 1) + (workers if workers > 1 else 0)
    predicted = hops * keys_and_values * config.num_hidden_layers
    run.compare("context_parallel: bytes of attention", predicted, attention.total, "B")


def step(problem: Problem, mesh: DeviceMesh) -> tuple[Tensor, dict[str, Tensor], CountCollectives]:
    """The loss and the gradients of all tokens, of which this rank computes its own; bytes sent."""
    model, seq_len = problem.new_model(), problem.input_ids.shape[1]
    weight = model.lm_head.weight
    cosines, sines = rope_tables(model.config, 0, seq_len, weight.device, weight.dtype)
    input_ids, targets = problem.input_ids.clone(), problem.targets.clone()
    with (
        context_parallel(
            mesh, buffers=[input_ids, targets, cosines, sines], buffer_seq_dims=[1, 1, 0, 0]
        ),
        CountCollectives() as sent,
    ):
        loss = loss_at(model, input_ids, targets, (cosines, sines))
        loss.backward()
    gradients = gradients_of(model)
    average(gradients.values(), Traffic())
    return mean_loss(loss), gradients, sent


if __name__ == "__main__":
    script.exit(main)
