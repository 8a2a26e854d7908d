"""Pipeline parallelism by torch.distributed.pipelining: the same stages, the same gradients.

The library takes a module for each stage and a loss function. It cuts the batch, finds the shapes
of the messages by itself, runs the schedule, and divides the gradients by m. Where
`pipeline_parallel.py` gives each direction a group of its own against the deadlock, the library's
1F1B issues an activation's send and a gradient's receive as one fused operation. It has more
schedules than the two here: with several smaller stages on each rank (ScheduleInterleaved1F1B,
ScheduleLoopedBFS) and with the backward of weights moved into the bubble (zero bubble, DualPipeV).

What it leaves to you: where to cut, and weights that two stages share. Nobody tells it that the
embedding on the first stage is the output matrix of the last.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/torch_pipeline_parallel.py
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/torch_pipeline_parallel.py

You should see: loss and gradients of the one-process model with either schedule, but for the tied
embedding: half of its gradient is missing on each end until the ends have summed it.
"""

from argparse import Namespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from distlab import data, runtime, script
from distlab.errors import Skipped, UsageError
from distlab.model import add_model_flags, config_from_args
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.pipeline import Links, Stage, check_cuts, cross_entropy, report_gradients
from parallelism.problem import Problem, gradient_of, gradients_of, one_process

PRESETS = {
    "smoke": {
        "model": "smoke", "layers": 4,
        "corpus_mb": 0.2, "seq_len": 16, "batch_size": 8, "micro_batches": 4,
    },
    "laptop": {
        "model": "laptop", "layers": 6,
        "corpus_mb": 1.0, "seq_len": 32, "batch_size": 8, "micro_batches": 4,
    },
    "gpu": {
        "model": "gpu",
        "corpus_mb": 12.0, "seq_len": 1024, "batch_size": 8, "micro_batches": 8,
    },
}  # fmt: skip
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
WRONG = 0.01  # of a gradient's largest element: no rounding explains that


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--micro-batches", type=int, metavar="M", help="parts of the batch")
    return parser.parse_args(argv)


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    check_cuts(args, job.world_size, config_from_args(args).num_hidden_layers)
    check_library(args, job)
    problem = one_process(run, args, job)
    links = Links(job, args.timeout)
    for name, schedule in SCHEDULES.items():
        stage = Stage(problem.model, job.rank, job.world_size)
        loss = step(schedule, stage, job, problem, args.micro_batches)
        missing = torch.zeros((), device=job.device)
        if stage.holds_tied_embedding:
            embedding = "model.embed_tokens.weight"
            missing += distance(gradients_of(stage)[embedding], problem.gradients[embedding])
            links.sum_of_both_ends(gradient_of(stage.model.embed_tokens.weight))
        dist.all_reduce(missing, dist.ReduceOp.MAX)
        report_gradients(run, job, name, loss, gradients_of(stage), problem)
        if problem.model.config.tie_word_embeddings:
            run.check_above(
                f"{name}: before its sum the embedding's is wrong", float(missing), WRONG
            )


def check_library(args: Namespace, job: Runtime) -> None:
    if args.micro_batches < job.world_size:
        raise UsageError(
            f"--micro-batches {args.micro_batches}: the library's 1F1B wants as many as stages; "
            f"use {job.world_size} or more"
        )
    if job.backend == "gloo" and job.device.type == "cuda":
        raise Skipped("gloo sends no GPU's tensors and the library does not stage them; "
                      "use --device cpu, or NCCL with a GPU for each rank")  # fmt: skip


def step(
    schedule: type, stage: Stage, job: Runtime, problem: Problem, micro_batches: int
) -> Tensor:
    """Gradients of the batch's mean loss; gives that loss, on the last stage alone (else 0)."""
    piped = PipelineStage(stage, job.rank, job.world_size, job.device)
    run_schedule = schedule(piped, micro_batches, loss_fn=cross_entropy).step
    losses: list[Tensor] = []
    if stage.is_first:
        run_schedule(problem.input_ids)
    elif stage.is_last:
        run_schedule(target=problem.targets, losses=losses)
    else:
        run_schedule()
    return torch.stack(losses).mean().detach() if losses else torch.zeros((), device=job.device)


def distance(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference, in units of the largest element."""
    return (found - expected).abs().max() / expected.abs().max()


if __name__ == "__main__":
    script.exit(main)
