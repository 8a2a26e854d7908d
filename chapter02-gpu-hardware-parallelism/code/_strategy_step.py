"""One training step of a plan, from scratch: 1F1B over the stages, then the data-parallel sums."""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from _strategy_cost import stage_flops
from _strategy_stage import Pace, Stage, tp_slice, whole_name
from _traffic import Traffic
from torch import Tensor, nn

from distlab.layers import rope_tables
from distlab.model import Llama
from distlab.predict import Architecture, TrainingPlan
from distlab.runtime import Runtime

LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Place:
    """Where this rank is in the plan: tensor-parallel ranks are neighbours, stages far apart."""

    tp: Traffic
    dp: Traffic
    stage: int
    before: int  # the ranks of the same place in the stages before and after
    after: int


class Groups:
    """Process groups by their ranks; every rank must ask for the same ones in the same order."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def place(self, plan: TrainingPlan) -> Place:
        rank, tp, dp = self.runtime.rank, plan.tp, plan.data_parallel
        side = tp * dp
        stage, within = divmod(rank, side)
        for start in range(0, plan.gpus, side):
            rows = torch.arange(start, start + side).view(dp, tp)
            for ranks in [*rows.tolist(), *rows.T.tolist()]:
                self._group(tuple(ranks))
        own = torch.arange(stage * side, (stage + 1) * side).view(dp, tp)
        return Place(
            Traffic(self._group(tuple(own[within // tp].tolist()))),
            Traffic(self._group(tuple(own[:, within % tp].tolist()))),
            stage,
            rank - side,
            rank + side,
        )

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if ranks not in self.made:
            self.made[ranks] = dist.new_group(list(ranks))
        return self.made[ranks]


class Shards:
    """The stage's parameters in one flat buffer, of which ZeRO lets this rank own 1/dp."""

    def __init__(self, stage: nn.Module, dp: Traffic, zero: int, pace: Pace) -> None:
        self.dp, self.zero, self.pace = dp, zero, pace
        self.parameters = list(stage.parameters())
        size = sum(p.numel() for p in self.parameters)
        padded = -(-size // dp.world_size) * dp.world_size
        self.weights, self.gradients = torch.zeros(padded), torch.zeros(padded)
        start = 0
        for p in self.parameters:
            part = slice(start, start + p.numel())
            self.weights[part] = p.detach().flatten()
            p.data = self.weights[part].view_as(p)
            p.grad = self.gradients[part].view_as(p)
            start += p.numel()
        self.own_weights = self.weights.chunk(dp.world_size)[dp.rank].clone()
        self.own_gradients = torch.zeros_like(self.own_weights)

    def gather(self) -> None:
        """All of the weights, from the ranks that own them."""
        torch.cat(self.pace.sent(self.dp.all_gather, self.own_weights), out=self.weights)

    def release(self) -> None:
        """What a rank does not own is gone; zeros, so that a forgotten gather is seen."""
        self.weights.zero_()

    def reduce(self) -> None:
        """Add this rank's share of the mean gradient to what it owns."""
        parts = list(self.gradients.chunk(self.dp.world_size))
        total = self.pace.sent(ring_reduce_scatter, parts, self.dp)
        self.own_gradients += total / self.dp.world_size
        self.gradients.zero_()

    def update(self) -> None:
        """The step's end: sum what is not yet summed, and plain SGD."""
        if self.zero == 0:
            self.pace.sent(self.dp.all_reduce, self.gradients)
            self.weights -= LEARNING_RATE / self.dp.world_size * self.gradients
            self.gradients.zero_()
            return
        if self.zero < 3:
            self.reduce()
        self.own_weights -= LEARNING_RATE * self.own_gradients
        self.own_gradients.zero_()
        if self.zero < 3:
            self.gather()


class Trainer:
    """This rank's part of the plan's training step on one global batch [sequences, seq]."""

    def __init__(
        self, whole: Llama, a: Architecture, plan: TrainingPlan, place: Place, batch: Tensor,
        pace: Pace,
    ) -> None:  # fmt: skip
        self.plan, self.place, self.pace = plan, place, pace
        self.stage = Stage(whole, plan.pp, place.stage, place.tp, pace)
        self.shards = Shards(self.stage, place.dp, plan.zero, pace)
        self.micro_batches = batch.chunk(plan.data_parallel)[place.dp.rank].split(plan.micro_batch)
        self.flops = [n / plan.tp for n in stage_flops(a, plan, place.stage)[:2]]
        self.sends = 2 * len(self.stage.layers) if plan.tp > 1 else 0  # in each pass
        self.hidden = (plan.micro_batch, plan.seq_len, a.hidden_size)
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()  # input and output of each forward
        self.unsent: list[tuple[dist.Work, Tensor]] = []

    def step(self) -> float:
        """1F1B: fill the pipeline, one forward and one backward in turn, drain it; the loss."""
        m = len(self.micro_batches)
        warm_up = min(m, self.plan.pp - self.place.stage - 1)
        losses = [self.forward(n) for n in range(warm_up)]
        for n in range(warm_up, m):
            losses.append(self.forward(n))
            self.backward()
        for _ in range(warm_up):
            self.backward()
        for work, _ in self.unsent:
            work.wait()
        self.unsent.clear()
        self.shards.update()
        return sum(losses) / m

    def forward(self, n: int) -> float:
        """Micro-batch n through this stage; its loss on the last stage, else 0."""
        tokens = self.micro_batches[n]
        x = tokens[:, :-1] if self.stage.first else self.receive(self.place.before)
        if self.plan.zero == 3:
            self.shards.gather()
        with self.pace.computing(self.flops[0], self.sends):
            y = self.stage(x, tokens[:, 1:])
        if self.plan.zero == 3:
            self.shards.release()
        self.waiting.append((x, y))
        if self.stage.last:
            return y.item()
        self.send(y.detach(), self.place.after)
        return 0.0

    def backward(self) -> None:
        """The oldest micro-batch that waits goes back, and its gradient to the stage before."""
        x, y = self.waiting.popleft()
        if self.stage.last:
            gradient = torch.tensor(1 / len(self.micro_batches))
        else:
            gradient = self.receive(self.place.after).detach()
        if self.plan.zero == 3:
            self.shards.gather()
        with self.pace.computing(self.flops[1], self.sends):
            y.backward(gradient)
        if self.plan.zero == 3:
            self.shards.reduce()
            self.shards.release()
        if not self.stage.first:
            self.send(x.grad, self.place.before)

    def send(self, tensor: Tensor, to: int) -> None:
        self.unsent.append((dist.isend(tensor, to), tensor))  # kept until it has been sent

    def receive(self, source: int) -> Tensor:
        tensor = torch.empty(self.hidden)
        dist.recv(tensor, source)
        return tensor.requires_grad_()

    @torch.no_grad()
    def compute_a_little(self) -> None:
        """One layer, forward, not paced; nothing is sent if the plan has no TP."""
        block = next(iter(self.stage.layers.values()))
        hidden = torch.zeros(self.hidden)
        block(
            hidden, rope_tables(self.stage.config, 0, hidden.shape[1], hidden.device, hidden.dtype)
        )

    def difference(self, whole: Llama) -> float:
        """The largest difference between this rank's weights and those of the whole model."""
        if self.plan.zero == 3:
            self.shards.gather()
        wanted = {
            name: tp_slice(name, whole.get_parameter(whole_name(name)), self.place.tp)
            for name, _ in self.stage.named_parameters()
        }
        parameters = dict(self.stage.named_parameters())
        return max(float((p - wanted[name]).abs().max()) for name, p in parameters.items())


def ring_reduce_scatter(parts: list[Tensor], group: Traffic) -> Tensor:
    """The sum over the group of this rank's part. gloo's own is an all-reduce, twice the bytes."""
    rank, size = group.rank, group.world_size
    for step in range(size - 1):
        arrived = group.exchange(
            parts[(rank - step - 1) % size], (rank + 1) % size, (rank - 1) % size
        )
        parts[(rank - step - 2) % size] += arrived
    return parts[rank]


def train_alone(whole: Llama, batch: Tensor) -> float:
    """One step of the whole model in one process, as the plans are to do it; its loss."""
    loss = whole.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()
    with torch.no_grad():
        for p in whole.parameters():
            p -= LEARNING_RATE * p.grad
            p.grad = None
    return loss.item()
