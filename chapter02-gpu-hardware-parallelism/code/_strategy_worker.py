"""A rank of measure_strategies.py: proves that each plan trains the same model, then times it.

Started on the virtual cluster with what is to be done as JSON; rank 0 answers with JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from _strategy_stage import Pace
from _strategy_step import Groups, Trainer, train_alone
from _traffic import Traffic

from distlab import script
from distlab.model import Llama, ModelConfig
from distlab.predict import TrainingPlan
from distlab.runtime import Runtime, distributed

LARGE = 1 << 20  # bytes, for the rate of the links inside a node
PIECE_S = 5e-3  # about what a device computes between two collectives


def main() -> int:
    task = json.loads(sys.argv[1])
    with distributed("gloo", task["timeout_s"], task["seed"], "cpu") as runtime:
        torch.set_num_threads(1)
        answer = work(runtime, task)
        if runtime.is_main:
            print(json.dumps(answer))
    return 0


def work(runtime: Runtime, task: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig(**task["config"])
    batch = random_batch(config, task["global_batch"], task["seq_len"], task["seed"])
    plans = [TrainingPlan(**plan) for plan in task["plans"]]
    groups = Groups(runtime)
    pace = Pace()
    trainers = [make_trainer(config, plan, groups, batch, pace, task["seed"]) for plan in plans]
    proved = trainers if task["prove"] else []
    proofs = [prove(trainer, config, batch, task["seed"]) for trainer in proved]
    trainers[0].step()  # the first backward pass of a process is slow
    pace.flops = task["device_flops"]
    return {
        "proofs": proofs,
        "links": measure_links(groups, runtime, trainers[0].compute_a_little),
        "seconds": time_steps(runtime, trainers, task["repeats"]),
        "late": highest(pace.late),
    }


def make_trainer(
    config: ModelConfig, plan: TrainingPlan, groups: Groups, batch: torch.Tensor, pace: Pace,
    seed: int,
) -> Trainer:  # fmt: skip
    whole = new_model(config, seed)
    return Trainer(whole, config.architecture, plan, groups.place(plan), batch, pace)


def prove(trainer: Trainer, config: ModelConfig, batch: torch.Tensor, seed: int) -> dict[str, Any]:
    """Two steps of the plan beside two steps of one process.

    The second loss depends on every weight that the first step has changed. `dp_bytes` is what
    this rank sent for data parallelism in one step.
    """
    whole = new_model(config, seed)
    plan, place = trainer.plan, trainer.place
    losses, alone = [], []
    for _ in range(2):
        loss = trainer.step()  # 0 but on the last stage, where tensor-parallel ranks have the same
        total = torch.tensor(loss / (plan.tp * plan.data_parallel), dtype=torch.float64)
        dist.all_reduce(total)
        losses.append(total.item())
        alone.append(train_alone(whole, batch))
    return {
        "losses": losses,
        "alone": alone,
        "dp_bytes": place.dp.total / 2,
        "parameters": trainer.shards.weights.numel(),
        "weight_difference": highest(trainer.difference(whole)),
    }


def measure_links(
    groups: Groups, runtime: Runtime, compute: Callable[[], object]
) -> dict[str, float]:
    """Latency inside a node and between nodes, and bytes per second inside; from all-reduces of
    two ranks, which take 2·alpha + n·beta. The rate between nodes is what the link is shaped to."""
    pairs = groups.place(TrainingPlan(runtime.world_size, tp=runtime.local_world_size))
    small, large = torch.zeros(1), torch.zeros(LARGE // 4)
    near = all_reduce_seconds(pairs.tp, small, 60, compute)
    far = all_reduce_seconds(pairs.dp, small, 60, compute)
    more = all_reduce_seconds(pairs.tp, large, 15, compute) - near
    return {"near_s": near / 2, "far_s": far / 2, "near_rate": LARGE / max(1e-6, more)}


def all_reduce_seconds(
    group: Traffic, tensor: torch.Tensor, repeats: int, compute: Callable[[], object]
) -> float:
    """The mean, since a step has the sum of many, on the rank where it is largest.

    As in a step something is computed before each, and slept: processors are shared with other
    ranks, and who slept must be woken.
    """
    samples = []
    for _ in range(repeats):
        end = time.perf_counter() + PIECE_S
        compute()
        time.sleep(max(0.0, end - time.perf_counter()))
        started = time.perf_counter()
        group.all_reduce(tensor)
        samples.append(time.perf_counter() - started)
    return highest(mean(samples[1:]))


def time_steps(runtime: Runtime, trainers: Sequence[Trainer], repeats: int) -> list[list[float]]:
    """Seconds of each plan's steps, until the last rank is done; the plans take turns."""
    samples: list[list[float]] = [[] for _ in trainers]
    for _ in range(repeats):
        for trainer, own in zip(trainers, samples, strict=True):
            runtime.barrier()
            started = time.perf_counter()
            trainer.step()
            own.append(highest(time.perf_counter() - started))
    return samples


def highest(value: float) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def new_model(config: ModelConfig, seed: int) -> Llama:
    torch.manual_seed(seed)
    return Llama(config)


def random_batch(config: ModelConfig, sequences: int, seq_len: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (sequences, seq_len + 1), generator=generator)


if __name__ == "__main__":
    script.exit(main)
