"""The parameter server's training: a worker's replica, its log and outcome; and the server by RPC.

`train_by_rpc` is the synchronous server by torch.distributed.rpc: workers call a function of the
server. The library carries tensors and threads: the worker's call waits, the server's function runs
in a thread, and with `async_execution` it answers all workers when the last gradient has come. What
stays to be written is the server. Source: PyTorch's tutorial "Implementing Batch RPC Processing
Using Asynchronous Executions". TensorPipe, which carries the calls, moves host memory here.
"""

import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import rpc
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from distlab.data.loader import Loader
from distlab.runtime import Runtime

ALL_REDUCE, SYNCHRONOUS, ASYNCHRONOUS = "all-reduce", "synchronous", "asynchronous"
DESIGNS = (ALL_REDUCE, SYNCHRONOUS, ASYNCHRONOUS)
TakePart = Callable[..., None]  # parameter_server.take_part
Evaluate = Callable[[Tensor], float]  # a loss of flat parameters


class Replica:
    """A worker's model and its own batches; parameters and gradients are flat, in host memory.

    A gradient takes at least `pace` seconds, and `straggle` more. With `once` it is computed a
    single time and then only waited for, as if this worker had a processor of its own. One longer
    than `most_norm` is cut to that length.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Loader,
        pace: float = 0.0,
        straggle: float = 0.0,
        once: bool = False,
        most_norm: float = math.inf,
    ) -> None:
        self.most_norm = most_norm
        self.model, self.batches, self.once = model, batches, once
        self.pace, self.straggle = pace, straggle
        self.parameters = list(model.parameters())
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.losses: list[float] = []
        self.seconds: list[float] = []  # that each gradient took
        self._first = self._computed() if once else None

    @torch.no_grad()
    def load(self, flat: Tensor) -> None:
        vector_to_parameters(flat.to(self.parameters[0].device), self.parameters)

    def gradient(self) -> Tensor:
        """Of the next batch's mean loss, float32 [size]."""
        started = time.perf_counter()
        gradient = self._computed() if self._first is None else self._first.clone()
        rest = self.pace - (time.perf_counter() - started)
        time.sleep(max(0.0, rest) + self.straggle)
        self.seconds.append(time.perf_counter() - started)
        return gradient

    def _computed(self) -> Tensor:
        input_ids, targets = next(self.batches)
        self.model.zero_grad()
        loss = self.model(input_ids, targets=targets)
        loss.backward()
        clip_grad_norm_(self.parameters, self.most_norm)
        self.losses.append(loss.item())
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]).cpu()


def flat_parameters(model: nn.Module) -> Tensor:
    """A copy, float32 [size], in host memory."""
    return parameters_to_vector(model.parameters()).detach().cpu().clone()


@dataclass
class Log:
    """What a training is to do, and when it has applied how many gradients.

    `share` says how an asynchronous server weighs a single gradient: "K-th" of the learning rate,
    so that a sample moves the parameters as far as in a mean; all of it, "full"; or "1 / (1 + s)"
    of it for a staleness of s updates (Zhang et al., arXiv 1511.05950, section 3).
    """

    steps: int
    learning_rate: float
    share: str = "K-th"
    keep_every: int = 0  # gradients: copies of the parameters, to compute their loss afterwards
    times: list[float] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)  # applied by then
    staleness: list[int] = field(default_factory=list)
    kept: list[tuple[int, float, Tensor]] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # gradients, seconds, loss

    def start(self) -> None:
        self.started = time.perf_counter()

    def applied(self, count: int, parameters: Tensor, staleness: int = 0) -> None:
        self.times.append(time.perf_counter() - self.started)
        self.gradients.append(count + (self.gradients[-1] if self.gradients else 0))
        self.staleness += [staleness] * count
        if self.keep_every and self.gradients[-1] % self.keep_every == 0:
            self.kept.append((self.gradients[-1], self.times[-1], parameters.clone()))

    def evaluate(self, loss_of: Evaluate) -> None:
        """Compute the curve, after the clock has stopped."""
        self.curve = [(count, seconds, loss_of(flat)) for count, seconds, flat in self.kept]
        self.kept = []

    def rate_of(self, staleness: int, workers: int) -> float:
        share = {"K-th": workers, "full": 1, "1 / (1 + s)": 1 + staleness}[self.share]
        return self.learning_rate / share


@dataclass(frozen=True)
class Outcome:
    """What all ranks know of a training afterwards."""

    log: Log
    parameters: Tensor  # at the end
    losses: list[list[float]]  # of each worker
    compute: list[float]  # median seconds of a gradient, of each worker
    wire: list[tuple[int, int]]  # bytes that each rank's network interfaces received and sent


def train(
    take_part: TakePart,
    design: str,
    job: Runtime,
    group: dist.ProcessGroup,
    replica: Replica,
    log: Log,
    loss_of: Evaluate | None = None,
) -> Outcome:
    """Train from the replica's own parameters on, the same on every rank."""
    parameters = flat_parameters(replica.model)
    job.barrier()
    before = interface_bytes()
    take_part(design, job, group, replica, parameters, log)
    job.barrier()
    wire = tuple(now - then for now, then in zip(interface_bytes(), before, strict=True))
    own = replica.losses, median(replica.seconds), wire
    everyone: list = [None] * job.world_size
    dist.all_gather_object(everyone, own)
    losses, compute, bytes_moved = (list(column) for column in zip(*everyone, strict=True))
    source = 1 if design == ALL_REDUCE else 0
    if loss_of is not None and job.rank == source:
        log.evaluate(loss_of)
    told: list = [(log, parameters)]
    dist.broadcast_object_list(told, source)
    log, parameters = told[0]
    return Outcome(log, parameters, losses[1:], compute[1:], bytes_moved)


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else 0.0


def interface_bytes() -> tuple[int, int]:
    """(received, sent) so far by this node's network interfaces but the loopback."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()[2:]
    fields = [line.replace(":", " ").split() for line in lines]
    counted = [(int(f[1]), int(f[9])) for f in fields if f[0] != "lo"]
    return sum(pair[0] for pair in counted), sum(pair[1] for pair in counted)


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
