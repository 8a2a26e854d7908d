"""Pipeline parallelism from scratch: GPipe and 1F1B, with their bubble and memory measured.

Each of p ranks holds a stage: some consecutive layers. A batch is cut into m micro-batches that
flow through the stages; activations go forward, their gradients come back. GPipe (Huang et al.
2019, arXiv 1811.06965) runs all forwards, then all backwards; 1F1B (Narayanan et al. 2021, arXiv
2104.04473) begins a backward as soon as it can. Where a forward takes f and a backward b seconds on
every stage, a step takes (m + p - 1)·(f + b), of which a stage works m·(f + b): it idles for
(p - 1)/(m + p - 1) of the step with either schedule, whatever f and b are. But GPipe keeps the
activations of m micro-batches, 1F1B on stage r those of min(m, p - r).

A forward sleeps until it has lasted --stage-ms, a backward twice that: so the stages cost the same,
as the formula assumes, and overlap even where ranks are more than cores.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/pipeline_parallel.py
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/pipeline_parallel.py

You should see: each schedule drawn, a stage a line; the one-process model's loss and gradients, bit
for bit the same with both schedules; the predicted bytes; the bubble within 10 % of the formula.
"""

from argparse import Namespace
from math import inf

import torch
from _parallel import gradients_of, one_process
from _pipeline_links import Links
from _pipeline_report import report_bytes, report_gradients, report_schedule
from _pipeline_stage import BACKWARD, FORWARD, Action, Slots, Stage, check_cuts
from torch import Tensor

from distlab import data, runtime, script
from distlab.model import add_model_flags, config_from_args
from distlab.run import Run
from distlab.runtime import Runtime

SMOKE = {"model": "smoke", "layers": 4, "corpus_mb": 0.2, "seq_len": 16, "micro_batches": 4}
LAPTOP = {"model": "laptop", "layers": 6, "corpus_mb": 1.0, "seq_len": 32, "micro_batches": 4}
GPU = {"model": "gpu", "corpus_mb": 12.0, "seq_len": 1024, "micro_batches": 8}
PRESETS = {  # smoke's machine may be busy: only the drawing's bubble, which is exact, is checked
    "smoke": {**SMOKE, "batch_size": 8, "stage_ms": 10, "bubble_tolerance": inf},
    "laptop": {**LAPTOP, "batch_size": 8, "stage_ms": 50, "bubble_tolerance": 10},
    "gpu": {**GPU, "batch_size": 8, "stage_ms": 30, "bubble_tolerance": 10},
}
TIMED_STEPS = 3  # after one to warm up, in slots of no length


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
    parser.add_argument("--schedule", choices=[*SCHEDULES, "both"], default="both")
    parser.add_argument("--micro-batches", type=int, metavar="M", help="parts of the batch")
    parser.add_argument("--stage-ms", type=script.positive_float, help="of a forward")
    parser.add_argument("--bubble-tolerance", type=script.positive_float, metavar="PERCENT")
    return parser.parse_args(argv)


def gpipe(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """All forwards, then all backwards."""
    return [(kind, i) for kind in (FORWARD, BACKWARD) for i in range(micro_batches)]


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """A forward for each stage behind this one; then one forward, one backward; then the rest."""
    ahead = min(stages - 1 - stage, micro_batches)
    actions = [(FORWARD, i) for i in range(ahead)]
    for i in range(micro_batches - ahead):
        actions += [(FORWARD, ahead + i), (BACKWARD, i)]
    return actions + [(BACKWARD, i) for i in range(micro_batches - ahead, micro_batches)]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}


class Pipeline:
    """This rank's stage, and what it does with the micro-batches of a batch."""

    def __init__(self, stage: Stage, links: Links) -> None:
        self.stage, self.links = stage, links

    def step(self, actions: list[Action], slots: Slots, inputs: Tensor, targets: Tensor) -> Tensor:
        """Gradients of the batch's mean loss; gives that loss, on the last stage alone (else 0)."""
        self.stage.zero_grad()
        self.slots, self.micro_batches = slots, len(actions) // 2
        self.inputs, self.targets = (t.chunk(self.micro_batches) for t in (inputs, targets))
        self.alive: dict[int, tuple[Tensor, Tensor]] = {}
        self.most_alive, self.loss = 0, torch.zeros((), device=inputs.device)
        for kind, i in actions:
            self.forward(i) if kind == FORWARD else self.backward(i)
        if self.stage.holds_tied_embedding:  # one end's gradient is of the input, one's the output
            self.links.sum_of_both_ends(self.stage.model.embed_tokens.weight.grad)
        self.sent = self.links.finish()
        return self.loss

    def forward(self, i: int) -> None:
        x = self.inputs[i]
        if not self.stage.is_first:
            x = self.links.receive_activation(x, self.stage.hidden_size).requires_grad_()
        with self.slots(FORWARD):
            y = self.stage(x, self.targets[i])
        if self.stage.is_last:
            y = y / self.micro_batches  # the batch's loss is the mean of its micro-batches'
            self.loss += y.detach()
        else:
            self.links.send_activation(y.detach())
        self.alive[i] = x, y  # y holds the graph, and with it all that backward needs
        self.most_alive = max(self.most_alive, len(self.alive))

    def backward(self, i: int) -> None:
        x, y = self.alive.pop(i)
        gradient = None if self.stage.is_last else self.links.receive_gradient(y)
        with self.slots(BACKWARD):
            y.backward(gradient)
        if not self.stage.is_first:
            self.links.send_gradient(x.grad)


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    check_cuts(args, job.world_size, config_from_args(args).num_hidden_layers)
    problem = one_process(run, args, job)
    pipeline = Pipeline(Stage(problem.model, job.rank, job.world_size), Links(job, args.timeout))
    found = {}
    for name in SCHEDULES if args.schedule == "both" else [args.schedule]:
        actions = SCHEDULES[name](job.rank, job.world_size, args.micro_batches)
        steps = [Slots(job, args.stage_ms / 1e3) for _ in range(TIMED_STEPS)]
        for slots in run.progress([Slots(job, 0.0), *steps], name):
            job.barrier()
            loss = pipeline.step(actions, slots, problem.input_ids, problem.targets)
        found[name] = gradients_of(pipeline.stage)  # the next step's are new tensors
        report_gradients(run, job, name, loss, found[name], problem)
        report_bytes(run, job, name, pipeline, args)
        report_schedule(run, job, name, actions, pipeline, steps, args)
    if len(found) == 2:
        run.check_equal("both schedules' gradients, bit for bit", *found.values())


if __name__ == "__main__":
    script.exit(main)
