"""Messages between two ranks, counted: all that the collectives are made of."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from distlab.runtime import Runtime

Message = tuple[Tensor, int]  # what, and the rank at the other end


class Wire:
    """Messages from one rank to one rank, and a count of this rank's steps and bytes sent.

    Receives are posted before sends. gloo announces a posted receive to the sender, who sends
    nothing before. Between two ranks the announcement takes the same connection as the data of our
    own send: behind them, it would make the link's two directions work in turns, not at once.
    """

    def __init__(self, job: Runtime, receive_first: bool = True) -> None:
        self.rank, self.world_size = job.rank, job.world_size
        self.left, self.right = (job.rank - 1) % job.world_size, (job.rank + 1) % job.world_size
        self.staged = job.backend == "gloo" and job.device.type == "cuda"  # gloo sends host memory
        self.receive_first = receive_first
        self.steps = self.sent = 0

    def exchange(self, send: Message | None = None, receive: Message | None = None) -> None:
        """One step: send, receive, or both at once; returns when it is done."""
        self.start(send, receive)()

    def start(
        self, send: Message | None = None, receive: Message | None = None
    ) -> Callable[[], None]:
        """Begin a step; the function that is returned waits for its end.

        An empty message is not sent: both sides know that it is empty.
        """
        self.steps += 1
        operations, landing = [], None
        if receive is not None and receive[0].numel():
            landing = torch.empty_like(receive[0], device="cpu") if self.staged else receive[0]
            operations.append(dist.P2POp(dist.irecv, landing, receive[1]))
        if send is not None and send[0].numel():
            self.sent += send[0].nbytes
            outgoing = send[0].cpu() if self.staged else send[0]
            operations.append(dist.P2POp(dist.isend, outgoing, send[1]))
        if not self.receive_first:
            operations.reverse()
        requests = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for request in requests:
                request.wait()
            if self.staged and receive is not None and landing is not None:
                receive[0].copy_(landing)

        return wait
