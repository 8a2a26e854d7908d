"""A pipeline: its schedules, a rank's stage and links, and the slots of the stage's time."""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distlab import predict
from distlab.errors import UsageError
from distlab.layers import RMSNorm, rope_tables
from distlab.model import Llama
from distlab.predict.plan import divisors
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.problem import Problem, check_share, gradient_of
from parallelism.traffic import Traffic

FORWARD, BACKWARD = "forward", "backward"
Action = tuple[str, int]  # forward or backward, and the micro-batch
Slot = Callable[[str], AbstractContextManager[None]]  # the time of a forward or of a backward


def check_cuts(args: Namespace, stages: int, layers: int) -> None:
    """Raise `UsageError` where the layers or the batch cannot be cut as the flags ask."""
    micro_batches, batch = args.micro_batches, args.batch_size
    if stages < 2:
        raise UsageError("a pipeline has 2 stages or more; use torchrun --nproc_per_node=2")
    if stages > layers:
        raise UsageError(
            f"--layers {layers} is too few for {stages} stages; use --layers {stages} or "
            "more, or fewer ranks"
        )
    if micro_batches < 1:
        raise UsageError(f"--micro-batches {micro_batches} is too few; use 1 or more")
    if batch % micro_batches:
        raise UsageError(
            f"--micro-batches {micro_batches} does not divide --batch-size {batch}; "
            f"use {divisors(batch)}"
        )


class Decoder(nn.Module):
    """The part of a Llama's decoder that a stage holds."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleDict
    norm: RMSNorm


class Stage(nn.Module):
    """Consecutive layers of `whole`, on the first stage its embedding, on the last its output.

    The weights are copies, under the names that they have in the whole model. A tied embedding is
    on both ends. Where the stages do not divide the layers, the first ones take one more: the last
    has the output matrix to multiply with.
    """

    lm_head: nn.Linear

    def __init__(self, whole: Llama, rank: int, stages: int) -> None:
        super().__init__()
        self.config = whole.config
        self.hidden_size = whole.config.hidden_size
        self.is_first, self.is_last = rank == 0, rank == stages - 1
        self.own_layers = predict.stage_layers(whole.config.num_hidden_layers, stages, rank)
        tied = whole.config.tie_word_embeddings
        self.holds_tied_embedding = tied and stages > 1 and (self.is_first or self.is_last)
        self.model = Decoder()
        self.loss = cross_entropy
        if self.is_first or self.holds_tied_embedding:
            self.model.embed_tokens = deepcopy(whole.model.embed_tokens)
        layers = {str(i): deepcopy(whole.model.layers[i]) for i in self.own_layers}
        self.model.layers = nn.ModuleDict(layers)
        if self.is_last:
            self.model.norm = deepcopy(whole.model.norm)
            self.lm_head = deepcopy(whole.lm_head)
            if tied:
                self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """[batch, seq] tokens or [batch, seq, hidden] to the next stage's input.

        On the last stage to logits [batch, seq, vocab], or with `targets` to their mean loss.
        """
        if self.is_first:
            x = self.model.embed_tokens(x)
        rope = rope_tables(self.config, 0, x.shape[1], x.device, x.dtype)
        for layer in self.model.layers.values():
            x = layer(x, rope)
        if not self.is_last:
            return x
        logits = self.lm_head(self.model.norm(x))
        return logits if targets is None else self.loss(logits, targets)


class Slots:
    """Gives each forward `forward_s` seconds of this stage's time, each backward twice as many.

    Work that is done sooner sleeps until its slot ends; work that takes longer is counted.
    """

    def __init__(self, job: Runtime, forward_s: float) -> None:
        self.device = job.device
        self.seconds = {FORWARD: forward_s, BACKWARD: 2 * forward_s}
        self.used: list[tuple[float, float]] = []
        self.overruns = 0

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":  # not the whole device: a message may wait for its receiver
            torch.cuda.current_stream(self.device).synchronize()
        remaining = started + self.seconds[kind] - time.perf_counter()
        self.overruns += remaining < 0
        time.sleep(max(0.0, remaining))
        self.used.append((started, time.perf_counter()))

    @property
    def busy(self) -> float:
        return sum(end - start for start, end in self.used)

    @property
    def window(self) -> float:
        """From the first start to the last end, in seconds."""
        return self.used[-1][1] - self.used[0][0]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean, in nats, of logits [batch, seq, vocab]."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Links:
    """Messages of a stage's rank to and from those of the stages before and after it.

    Where several ranks share a stage, `side` of them, the neighbours are so far apart.

    A blocking send ends when its receiver takes the message. In 1F1B both of two neighbours would
    wait in a send: stage r has another activation for r + 1 while r + 1 has a gradient for r, and
    neither comes to its receive. So a message is sent by `isend`, and waited for at the step's end.
    With NCCL even that may deadlock: what one group sends and receives happens in the order of the
    calls, so a receive queues behind the send. Each direction therefore has its own group.
    """

    def __init__(self, job: Runtime, timeout_s: float, side: int = 1) -> None:
        self.before, self.after = job.rank - side, job.rank + side
        timeout = timedelta(seconds=timeout_s)
        self.forwards = Direction(dist.new_group(timeout=timeout))
        self.backwards = Direction(dist.new_group(timeout=timeout))
        self.ends = Traffic(dist.new_group(sorted({0, job.world_size - 1}), timeout=timeout))

    def send_activation(self, activation: Tensor) -> None:
        self.forwards.send_later(activation, self.after)

    def receive_activation(self, tokens: Tensor, hidden_size: int) -> Tensor:
        """[batch, seq, hidden] for `tokens` [batch, seq]."""
        like = torch.empty(*tokens.shape, hidden_size, device=tokens.device)
        return self.forwards.receive(like, self.before)

    def send_gradient(self, gradient: Tensor) -> None:
        self.backwards.send_later(gradient, self.before)

    def receive_gradient(self, like: Tensor) -> Tensor:
        return self.backwards.receive(like, self.after)

    def sum_of_both_ends(self, gradient: Tensor) -> None:
        """Add the first and the last stage's gradient of the weight that both hold."""
        self.ends.all_reduce(gradient)

    def finish(self) -> dict[str, float]:
        """Wait until all is sent; the bytes of it, by what they were."""
        self.forwards.wait()
        self.backwards.wait()
        kinds = {
            "activations": self.forwards,
            "gradients of activations": self.backwards,
            "gradient of the tied embedding": self.ends,
        }
        sent = {name: traffic.total for name, traffic in kinds.items()}
        for traffic in kinds.values():
            traffic.bytes.clear()
        return sent


class Direction(Traffic):
    """Messages one way, sent without waiting."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self.pending: list[tuple[dist.Work, Tensor]] = []

    def send_later(self, tensor: Tensor, to: int) -> None:
        """Begin to send `tensor`; it may be changed only after `wait`."""
        self._count("send", tensor.nbytes)
        message = self._sendable(tensor)
        request = dist.isend(message, group=self.group, group_dst=to)
        assert request is not None  # as for a rank outside of the group
        self.pending.append((request, message))  # the message lives until it has left

    def wait(self) -> None:
        for request, _ in self.pending:
            request.wait()
        self.pending.clear()


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

    def step(self, actions: list[Action], slots: Slot, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add up the batch's mean loss and its gradients; the loss is 0 but on the last stage.

        Every forward and every backward of the stage runs within one of `slots`.
        """
        self.slots, self.micro_batches = slots, len(actions) // 2
        self.inputs, self.targets = (t.chunk(self.micro_batches) for t in (inputs, targets))
        self.alive: dict[int, tuple[Tensor, Tensor]] = {}
        self.most_alive, self.loss = 0, torch.zeros((), device=inputs.device)
        for kind, i in actions:
            self.forward(i) if kind == FORWARD else self.backward(i)
        if self.stage.holds_tied_embedding:  # one end's gradient is of the input, one's the output
            self.links.sum_of_both_ends(gradient_of(self.stage.model.embed_tokens.weight))
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
            self.links.send_gradient(gradient_of(x))


def report_gradients(
    run: Run, job: Runtime, name: str, loss: Tensor, found: dict[str, Tensor], problem: Problem
) -> None:
    """Compare this stage's gradients, and the last one's loss, with the one-process model's."""
    run.print(f"\n{name}")
    dist.broadcast(loss, src=job.world_size - 1)
    check_share(run, name, loss, found, problem, "stage")
