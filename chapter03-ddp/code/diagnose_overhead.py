"""What being watched costs: steps with diagnose's agent and without, in turns, in the same ranks.

The agent's thread samples the main thread, reads the flight recorder and writes what it saw; hooks
look at each loss and at the fingerprints of parameters and buffers. Here each rank trains in rounds
of several steps, with the agent at work in every second one, so that both see the same machine. The
flight recorder itself, which torch offers for production, records in all of them.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/diagnose_overhead.py

You should see: two medians, and the cost of a watched round against its unwatched twin: its median
with the interval in which the true one lies. 3 % is the limit; where the machine is too noisy to
tell, it says so.
"""

import os
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import median

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.diagnosis.injected.diagnose_agent import Agent
from ddp.diagnosis.injected.diagnose_agent.hooks import activate
from ddp.diagnosis.watching import agent_variables
from distlab import data, measure, runtime, script
from distlab.launch import detect_launch
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime

STALL_AFTER_S = 5.0
LIMIT = 3.0  # percent
PRESETS = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 4,
              "steps": 8, "rounds": 3},
    "laptop": {"model": "laptop", "corpus_mb": 2.0, "seq_len": 64, "batch_size": 4,
               "steps": 8, "rounds": 25},
    "gpu": {"model": "gpu", "corpus_mb": 12.0, "seq_len": 1024, "batch_size": 8,
            "steps": 16, "rounds": 15},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="diagnose-") as folder, script.run(args) as run:
        agent = start_agent(Path(folder))
        with runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job:
            compare(run, args, job, agent)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--steps", type=script.positive_int, help="of a round")
    parser.add_argument("--rounds", type=script.positive_int, help="with the agent, and without")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "rounds")
    return args


def start_agent(folder: Path) -> Agent:
    """The agent as diagnose.py brings it into a rank, in this process; before there is a group."""
    os.environ.update(agent_variables(folder, STALL_AFTER_S))
    os.environ.setdefault("RANK", str(detect_launch().rank))
    return activate()


def compare(run: Run, args: Namespace, job: Runtime, agent: Agent) -> None:
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    own = args.batch_size // job.world_size
    loader = data.Loader(
        tokens, args.seq_len, own * job.world_size, job.rank, job.world_size, device=job.device
    )
    model = DDP(model_from_args(args, job.device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train_a_round(listening: bool) -> None:
        job.barrier()
        agent.listening = listening
        for _ in range(args.steps):
            inputs, targets = next(loader)
            model(inputs, targets=targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    ways = {
        "unwatched": lambda: train_a_round(False),
        "watched": lambda: train_a_round(True),
    }
    times = measure.compare(ways, warmup=1, repeats=args.rounds, device=job.device)
    for name, timing in times.items():
        run.metric(f"{name}: step", timing.median / args.steps, "s", "median of the rounds")
    ratios = times["watched"].ratios(times["unwatched"])
    costs = [100 * (ratio - 1) for ratio in ratios]  # %
    run.metric("cost of being watched", median(costs), "%", "median of each round to its twin")
    run.check_within("the cost is small", costs, LIMIT, unit="%", more="--rounds")


if __name__ == "__main__":
    script.exit(main)
