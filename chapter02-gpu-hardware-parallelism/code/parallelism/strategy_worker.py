"""A rank of measure_strategies.py: proves that each plan trains the same model, then times it.

Started on the virtual cluster as `python -m parallelism.strategy_worker TASK`, with what is to be
done as JSON; rank 0 answers with JSON. The device is paced: a rank really computes, then sleeps
until a device of the stated FLOP/s would be done. So four ranks can share two processors and still
show what four devices would.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlab import script
from distlab.layers import rope_tables
from distlab.model import Llama, ModelConfig
from distlab.predict import TrainingPlan
from distlab.ranks import gathered
from distlab.runtime import Runtime, distributed
from parallelism.cost import stage_flops
from parallelism.pipeline import BACKWARD, FORWARD, Links, Pipeline, Stage, one_f_one_b
from parallelism.problem import gradient_of
from parallelism.tensor import OF_THE_LOSS, TensorParallel
from parallelism.traffic import Traffic

LARGE = 1 << 20  # bytes, for the rate of the links inside a node
PIECE_S = 5e-3  # about what a device computes between two collectives
LEARNING_RATE = 0.1


def main() -> int:
    task = json.loads(sys.argv[1])
    with distributed("gloo", task["timeout_s"], task["seed"], "cpu") as job:
        torch.set_num_threads(1)
        answer = work(job, task)
        if job.is_main:
            print(json.dumps(answer))
    return 0


def work(job: Runtime, task: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig(**task["config"])
    batch = random_batch(config, task["global_batch"], task["seq_len"], task["seed"])
    plans = [TrainingPlan(**plan) for plan in task["plans"]]
    pace = Pace()
    groups = Groups(job, task["timeout_s"], pace)
    trainers = [Trainer(new_model(config, task["seed"]), plan, groups, batch) for plan in plans]
    proved = trainers if task["prove"] else []
    proofs = [prove(trainer, new_model(config, task["seed"]), batch) for trainer in proved]
    trainers[0].step()  # the first backward pass of a process is slow
    pace.flops = task["device_flops"]
    return {
        "proofs": proofs,
        "links": measure_links(groups, job, trainers[0].compute_a_little),
        "seconds": time_steps(job, trainers, task["repeats"]),
        "late": max(gathered(pace.late)),
    }


def new_model(config: ModelConfig, seed: int) -> Llama:
    torch.manual_seed(seed)
    return Llama(config)


def random_batch(config: ModelConfig, sequences: int, seq_len: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (sequences, seq_len + 1), generator=generator)


class Pace:
    """Makes this rank as slow as a device of `flops` FLOP/s; None: as fast as it is."""

    def __init__(self, flops: float | None = None) -> None:
        self.flops = flops
        self.late = 0.0  # seconds by which real computing took longer than the device's, in all
        self._piece = 0.0
        self._since = 0.0

    @contextmanager
    def computing(self, flops: float, sends: int = 0) -> Iterator[None]:
        """Inside, `sends` times something is sent; before, between and after it is computed."""
        self._piece = 0.0 if self.flops is None else flops / self.flops / (sends + 1)
        self._since = time.perf_counter()
        yield
        self._wait()
        self._piece = 0.0

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Begins when the device would have what is to be sent.

        What the operating system slept too long is taken off the next piece: a device does not
        oversleep, and a plan that sends often must not seem slower than it is.
        """
        overslept = self._wait()
        yield
        self._since = time.perf_counter() - overslept

    def _wait(self) -> float:
        """Sleep until the device would have done its piece; the seconds slept too long."""
        if not self._piece:
            return 0.0
        end = self._since + self._piece
        left = end - time.perf_counter()
        if left <= 0:
            self.late -= left
            return 0.0
        time.sleep(left)
        return min(time.perf_counter() - end, self._piece)


class PacedTraffic(Traffic):
    """Counted collectives of a paced device."""

    def __init__(self, group: dist.ProcessGroup, pace: Pace) -> None:
        super().__init__(group)
        self.pace = pace

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        with self.pace.sending():
            return super().all_reduce(tensor, op)


@dataclass(frozen=True)
class Place:
    """Where this rank is in the plan: tensor-parallel ranks are neighbours, stages far apart."""

    tp: PacedTraffic
    dp: Traffic
    stage: int
    links: Links


class Groups:
    """Process groups by their ranks; every rank must ask for the same ones in the same order."""

    def __init__(self, job: Runtime, timeout_s: float, pace: Pace) -> None:
        self.job, self.timeout_s, self.pace = job, timeout_s, pace
        self.made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.links: dict[int, Links] = {}

    def place(self, plan: TrainingPlan) -> Place:
        tp, dp = plan.tp, plan.data_parallel
        side = tp * dp
        stage, within = divmod(self.job.rank, side)
        for start in range(0, plan.gpus, side):
            rows = torch.arange(start, start + side).view(dp, tp)
            for ranks in [*rows.tolist(), *rows.T.tolist()]:
                self._group(tuple(ranks))
        own = torch.arange(stage * side, (stage + 1) * side).view(dp, tp)
        if side not in self.links:
            self.links[side] = Links(self.job, self.timeout_s, side)
        return Place(
            PacedTraffic(self._group(tuple(own[within // tp].tolist())), self.pace),
            Traffic(self._group(tuple(own[:, within % tp].tolist()))),
            stage,
            self.links[side],
        )

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if ranks not in self.made:
            self.made[ranks] = dist.new_group(list(ranks))
        return self.made[ranks]


class Shards:
    """The stage's parameters in one flat buffer, of which ZeRO lets this rank own 1/dp."""

    def __init__(self, stage: nn.Module, dp: Traffic, zero: int) -> None:
        self.dp, self.zero = dp, zero
        parameters = list(stage.parameters())
        size = sum(p.numel() for p in parameters)
        padded = -(-size // dp.world_size) * dp.world_size
        self.weights, self.gradients = torch.zeros(padded), torch.zeros(padded)
        start = 0
        for p in parameters:
            part = slice(start, start + p.numel())
            self.weights[part] = p.detach().flatten()
            p.data = self.weights[part].view_as(p)
            p.grad = self.gradients[part].view_as(p)
            start += p.numel()
        self.own_weights = self.weights.chunk(dp.world_size)[dp.rank].clone()
        self.own_gradients = torch.zeros_like(self.own_weights)

    def gather(self) -> None:
        """All of the weights, from the ranks that own them."""
        torch.cat(self.dp.all_gather(self.own_weights), out=self.weights)

    def release(self) -> None:
        """What a rank does not own is gone; zeros, so that a forgotten gather is seen."""
        self.weights.zero_()

    def reduce(self) -> None:
        """Add this rank's share of the mean gradient to what it owns."""
        parts = list(self.gradients.chunk(self.dp.world_size))
        self.own_gradients += ring_reduce_scatter(parts, self.dp) / self.dp.world_size
        self.gradients.zero_()

    def update(self) -> None:
        """The step's end: sum what is not yet summed, and plain SGD."""
        if self.zero == 0:
            self.dp.all_reduce(self.gradients)
            self.weights -= LEARNING_RATE / self.dp.world_size * self.gradients
            self.gradients.zero_()
            return
        if self.zero < 3:
            self.reduce()
        self.own_weights -= LEARNING_RATE * self.own_gradients
        self.own_gradients.zero_()
        if self.zero < 3:
            self.gather()


def ring_reduce_scatter(parts: list[Tensor], group: Traffic) -> Tensor:
    """The sum over the group of this rank's part. gloo's own is an all-reduce, twice the bytes."""
    rank, size = group.rank, group.world_size
    for step in range(size - 1):
        arrived = group.exchange(
            parts[(rank - step - 1) % size], (rank + 1) % size, (rank - 1) % size
        )
        parts[(rank - step - 2) % size] += arrived
    return parts[rank]


class Trainer:
    """This rank's part of the plan's training step on one global batch [sequences, seq + 1]."""

    def __init__(self, whole: Llama, plan: TrainingPlan, groups: Groups, batch: Tensor) -> None:
        self.plan, self.place, self.pace = plan, groups.place(plan), groups.pace
        self.stage = Stage(whole, self.place.stage, plan.pp)
        self.split: TensorParallel | None = None
        if plan.tp > 1:
            self.split = TensorParallel(self.stage, self.place.tp)
            self.stage.loss = self.split.cross_entropy
        self.shards = Shards(self.stage, self.place.dp, plan.zero)
        self.pipeline = Pipeline(self.stage, self.place.links)
        self.own = batch.chunk(plan.data_parallel)[self.place.dp.rank]
        self.actions = one_f_one_b(self.place.stage, plan.pp, plan.accumulation)
        forward, backward, _ = stage_flops(whole.config.architecture, plan, self.place.stage)
        self.flops = {FORWARD: forward / plan.tp, BACKWARD: backward / plan.tp}
        self.sends = dict.fromkeys(self.flops, 0)  # of tensor parallelism, in each pass
        if plan.tp > 1:
            blocks = 2 * len(self.stage.own_layers)
            ends = self.stage.is_first + OF_THE_LOSS * self.stage.is_last
            self.sends = {FORWARD: blocks + ends, BACKWARD: blocks + self.stage.is_last}

    def step(self) -> float:
        """A step of 1F1B and of SGD; the mean loss of the rank's own batch, on the last stage."""
        loss = self.pipeline.step(self.actions, self.slot, self.own[:, :-1], self.own[:, 1:])
        self.shards.update()
        return loss.item()

    @contextmanager
    def slot(self, kind: str) -> Iterator[None]:
        """What happens around each forward and each backward of the stage: FSDP, and the pace."""
        if self.plan.zero == 3:
            self.shards.gather()
        with self.pace.computing(self.flops[kind], self.sends[kind]):
            yield
        if self.plan.zero == 3 and kind == BACKWARD:
            self.shards.reduce()
        if self.plan.zero == 3:
            self.shards.release()

    @torch.no_grad()
    def compute_a_little(self) -> None:
        """One layer, forward, not paced; nothing is sent if the plan has no TP."""
        config, seq_len = self.stage.config, self.plan.seq_len
        hidden = torch.zeros(self.plan.micro_batch, seq_len, config.hidden_size)
        layer = next(iter(self.stage.model.layers.values()))
        layer(hidden, rope_tables(config, 0, seq_len, hidden.device, hidden.dtype))

    def difference(self, whole: Llama) -> float:
        """The largest difference between this rank's weights and those of the whole model."""
        if self.plan.zero == 3:
            self.shards.gather()
        differences = []
        for name, parameter in self.stage.named_parameters():
            wanted: Tensor = whole.get_parameter(name)
            if self.split is not None:
                wanted = self.split.own_part(name, wanted)
            differences.append(float((parameter - wanted).abs().max()))
        return max(differences)


def prove(trainer: Trainer, whole: Llama, batch: Tensor) -> dict[str, Any]:
    """Two steps of the plan beside two steps of one process.

    The second loss depends on every weight that the first step has changed. `dp_bytes` is what
    this rank sent for data parallelism in one step.
    """
    plan = trainer.plan
    losses, alone = [], []
    for _ in range(2):
        # 0 but on the last stage, where tensor-parallel ranks have the same
        losses.append(sum(gathered(trainer.step())) / (plan.tp * plan.data_parallel))
        alone.append(train_alone(whole, batch))
    return {
        "losses": losses,
        "alone": alone,
        "dp_bytes": trainer.place.dp.total / 2,
        "parameters": trainer.shards.weights.numel(),
        "weight_difference": max(gathered(trainer.difference(whole))),
    }


def train_alone(whole: Llama, batch: Tensor) -> float:
    """One step of the whole model in one process, as the plans are to do it; its loss."""
    loss = whole.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()
    with torch.no_grad():
        for p in whole.parameters():
            p.sub_(LEARNING_RATE * gradient_of(p))
            p.grad = None
    return loss.item()


def measure_links(groups: Groups, job: Runtime, compute: Callable[[], object]) -> dict[str, float]:
    """Latency inside a node and between nodes, and bytes per second inside; from all-reduces of
    two ranks, which take 2·alpha + n·beta. The rate between nodes is what the link is shaped to."""
    pairs = groups.place(TrainingPlan(job.world_size, tp=job.local_world_size))
    small, large = torch.zeros(1), torch.zeros(LARGE // 4)
    near = all_reduce_seconds(pairs.tp, small, 60, compute)
    far = all_reduce_seconds(pairs.dp, small, 60, compute)
    more = all_reduce_seconds(pairs.tp, large, 15, compute) - near
    return {"near_s": near / 2, "far_s": far / 2, "near_rate": LARGE / max(1e-6, more)}


def all_reduce_seconds(
    group: Traffic, tensor: Tensor, repeats: int, compute: Callable[[], object]
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
    return max(gathered(mean(samples[1:])))


def time_steps(job: Runtime, trainers: Sequence[Trainer], repeats: int) -> list[list[float]]:
    """Seconds of each plan's steps, until the last rank is done; the plans take turns."""
    samples: list[list[float]] = [[] for _ in trainers]
    for _ in range(repeats):
        for trainer, own in zip(trainers, samples, strict=True):
            job.barrier()
            started = time.perf_counter()
            trainer.step()
            own.append(max(gathered(time.perf_counter() - started)))
    return samples


if __name__ == "__main__":
    script.exit(main)
