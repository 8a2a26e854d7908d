"""The synchronous server by torch.distributed.rpc: workers call a function of the server.

The library carries tensors and threads: the worker's call waits, the server's function runs in a
thread, and with `async_execution` it answers all workers when the last gradient has come. What
stays to be written is the server. Source: PyTorch's tutorial "Implementing Batch RPC Processing
Using Asynchronous Executions". TensorPipe, which carries the calls, moves host memory here.
"""

import threading
import warnings

import torch
import torch.distributed as dist
from _ps_training import Replica, flat_parameters
from torch import Tensor
from torch.distributed import rpc

from distlab.runtime import Runtime

SERVER = "rank0"


class BatchServer:
    """Parameters that change when a gradient of every worker is there."""

    def __init__(self, parameters: Tensor, workers: int, learning_rate: float) -> None:
        self.parameters, self.workers, self.learning_rate = parameters, workers, learning_rate
        self.lock = threading.Lock()
        self.begin_step()

    def begin_step(self) -> None:
        self.total, self.arrived = torch.zeros_like(self.parameters), 0
        self.answer: torch.futures.Future[Tensor] = torch.futures.Future()

    def push(self, gradient: Tensor) -> torch.futures.Future[Tensor]:
        with self.lock:
            self.total += gradient
            self.arrived += 1
            answer = self.answer
            if self.arrived == self.workers:
                self.parameters -= self.learning_rate / self.workers * self.total
                self.begin_step()
                answer.set_result(self.parameters.clone())
            return answer


_servers: list[BatchServer] = []  # one, on rank 0: a call finds it by this name


@rpc.functions.async_execution
def push(gradient: Tensor) -> torch.futures.Future[Tensor]:
    return _servers[0].push(gradient)


def train_by_rpc(
    job: Runtime, replica: Replica, steps: int, learning_rate: float, timeout_s: float
) -> Tensor:
    """The parameters after `steps` steps, on every rank."""
    parameters = flat_parameters(replica.model)
    _servers[:] = [BatchServer(parameters, job.world_size - 1, learning_rate)]
    job.barrier()  # no call before every rank has its server
    with warnings.catch_warnings():  # torch itself calls what it warns of
        warnings.filterwarnings("ignore", message="You are using a Backend")
        rpc.init_rpc(
            f"rank{job.rank}",
            rank=job.rank,
            world_size=job.world_size,
            rpc_backend_options=rpc.TensorPipeRpcBackendOptions(rpc_timeout=timeout_s),
        )
    if not job.is_main:
        for _ in range(steps):
            replica.load(parameters)
            parameters = rpc.rpc_sync(SERVER, push, (replica.gradient(),))
    rpc.shutdown(timeout=timeout_s)  # waits for all
    told = [parameters]
    dist.broadcast_object_list(told, src=1)
    return told[0]
