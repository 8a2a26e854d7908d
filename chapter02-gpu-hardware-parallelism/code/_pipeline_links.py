"""A stage's links to its neighbours: activations forward, gradients back, bytes counted."""

from datetime import timedelta

import torch
import torch.distributed as dist
from _traffic import Traffic
from torch import Tensor

from distlab.runtime import Runtime


class Links:
    """Messages of stage `rank` to and from the stages `rank` ± 1.

    A blocking send ends when its receiver takes the message. In 1F1B both of two neighbours would
    wait in a send: stage r has another activation for r + 1 while r + 1 has a gradient for r, and
    neither comes to its receive. So a message is sent by `isend`, and waited for at the step's end.
    With NCCL even that may deadlock: what one group sends and receives happens in the order of the
    calls, so a receive queues behind the send. Each direction therefore has its own group.
    """

    def __init__(self, job: Runtime, timeout_s: float) -> None:
        self.rank, self.last = job.rank, job.world_size - 1
        timeout = timedelta(seconds=timeout_s)
        self.forwards = Direction(dist.new_group(timeout=timeout))
        self.backwards = Direction(dist.new_group(timeout=timeout))
        self.ends = Traffic(dist.new_group(sorted({0, self.last}), timeout=timeout))

    def send_activation(self, activation: Tensor) -> None:
        self.forwards.send_later(activation, self.rank + 1)

    def receive_activation(self, tokens: Tensor, hidden_size: int) -> Tensor:
        """[batch, seq, hidden] for `tokens` [batch, seq]."""
        like = torch.empty(*tokens.shape, hidden_size, device=tokens.device)
        return self.forwards.receive(like, self.rank - 1)

    def send_gradient(self, gradient: Tensor) -> None:
        self.backwards.send_later(gradient, self.rank - 1)

    def receive_gradient(self, like: Tensor) -> Tensor:
        return self.backwards.receive(like, self.rank + 1)

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
        self.pending.append((request, message))  # the message lives until it has left

    def wait(self) -> None:
        for request, _ in self.pending:
            request.wait()
        self.pending.clear()
