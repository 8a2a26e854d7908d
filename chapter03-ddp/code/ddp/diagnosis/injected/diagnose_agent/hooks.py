"""What the agent listens to in a rank: steps, losses, epochs, devices, and calls of collectives.

torch offers a hook for the optimizer's steps and for a module's forward pass. Where it offers none,
a function of torch is replaced by one that tells the agent and then calls it.
"""

import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import diagnose_frames as frames
import torch
import torch.distributed as dist
from diagnose_data import loaders, samplers
from diagnose_fingerprint import fingerprint, is_due
from diagnose_loss import losses
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook as after_steps
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps

if TYPE_CHECKING:
    from diagnose_agent import Agent

COLLECTIVES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor",
    "all_gather_single", "gather", "scatter", "reduce_scatter", "reduce_scatter_tensor",
    "reduce_scatter_single", "all_to_all", "all_to_all_single", "barrier", "send", "recv",
)  # fmt: skip
TORCH_DISTRIBUTED = f"{os.sep}torch{os.sep}distributed{os.sep}"


def install(agent: "Agent") -> None:
    Steps(agent)
    losses(agent)
    replicas(agent)
    samplers(agent)
    loaders(agent)
    devices(agent)
    collectives(agent)


class Steps:
    """Fingerprints of each optimizer's parameters: before its first step, and after some."""

    def __init__(self, agent: "Agent") -> None:
        self.agent = agent
        self.numbers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.built: dict[int, Any] = {}
        self.steps: dict[int, int] = {}
        made = Optimizer.__init__

        @functools.wraps(made)
        def init(optimizer: Optimizer, *args: Any, **options: Any) -> None:
            made(optimizer, *args, **options)
            if not _built_by_torch():  # a sharded optimizer's share is no replica
                number = len(self.built)
                self.numbers[optimizer] = number
                self.built[number], self.steps[number] = frames.caller(), 0

        Optimizer.__init__ = init  # type: ignore[method-assign, assignment]
        before_steps(self.before)
        after_steps(self.after)

    def before(self, optimizer: Optimizer, *_: Any) -> None:
        number = self.numbers.get(optimizer)
        if number is not None and self.steps[number] == 0 and self.agent.listening:
            self.tell(optimizer, number)

    def after(self, optimizer: Optimizer, *_: Any) -> None:
        number = self.numbers.get(optimizer)
        if number is None or not self.agent.listening:
            return
        self.steps[number] += 1
        if number == 0:
            self.agent.counts["steps"] += 1
        if is_due(self.steps[number]):
            self.tell(optimizer, number)

    def tell(self, optimizer: Optimizer, number: int) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.agent.tell(
            "parameters", optimizer=number, step=self.steps[number], built=self.built[number],
            place=frames.caller(), sums=fingerprint(parameters),
            shapes=[list(p.shape) for p in parameters], device=str(parameters[0].device),
            devices=cuda_device(parameters[0].device),
        )  # fmt: skip


def _built_by_torch() -> bool:
    frame = inspect.currentframe()
    while frame is not None and not frames.is_own(frame.f_code.co_filename):
        if TORCH_DISTRIBUTED in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def replicas(agent: "Agent") -> None:
    """DDP's parameter names, and its buffers as the forward pass of a step finds them."""
    made = DistributedDataParallel.__init__

    @functools.wraps(made)
    def init(replica: DistributedDataParallel, *args: Any, **options: Any) -> None:
        made(replica, *args, **options)
        place = frames.caller()
        names = [name for name, p in replica.module.named_parameters() if p.requires_grad]
        agent.tell("replica", place=place, names=names)
        buffers = dict(replica.module.named_buffers())
        if not buffers:
            return
        seen: set[int] = set()

        def before_forward(module: nn.Module, inputs: Any) -> None:
            step = agent.counts["steps"]
            due = module.training and step not in seen and is_due(step)
            if due and agent.listening:
                seen.add(step)
                sums = fingerprint(list(buffers.values()))
                agent.tell("buffers", step=step, place=place, names=list(buffers), sums=sums)

        replica.module.register_forward_pre_hook(before_forward)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign, assignment]


def devices(agent: "Agent") -> None:
    """Which device, or which cores, a rank chooses, and in which line."""

    def watch(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            cores = sorted(os.sched_getaffinity(0)) if what == "cores" else []
            agent.tell("chosen", what=what, device=cuda_device(), cores=cores,
                       place=frames.caller())  # fmt: skip
            return result

        setattr(owner, name, watched)

    watch(torch.cuda, "set_device", "cuda")
    if hasattr(os, "sched_setaffinity"):
        watch(os, "sched_setaffinity", "cores")


def cuda_device(device: torch.device | None = None) -> dict[str, Any] | None:
    """The CUDA device that this rank uses: its number, identity, and how many there are."""
    if not torch.cuda.is_initialized() or (device is not None and device.type != "cuda"):
        return None
    index = device.index if device is not None else torch.cuda.current_device()
    identity = str(torch.cuda.get_device_properties(index).uuid)
    return {"index": index, "uuid": identity, "count": torch.cuda.device_count()}


def collectives(agent: "Agent") -> None:
    """Each call from Python, noted before it begins: a crash in it leaves nothing else behind."""

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **options: Any) -> Any:
            in_main = threading.current_thread() is threading.main_thread()
            if not (in_main and agent.listening):
                return function(*args, **options)
            tensors = [a for a in [*args, *options.values()] if isinstance(a, Tensor)]
            place, calls = frames.caller(), agent.counts["calls"] + 1
            agent.counts["calls"] = calls
            agent.note(
                call=calls, op=name, shapes=[list(t.shape) for t in tensors],
                dtypes=[str(t.dtype) for t in tensors], place=place,
            )  # fmt: skip
            try:
                return function(*args, **options)
            except Exception as error:
                agent.tell("failed", op=name, error=str(error)[:500], place=place)
                raise

        return watched

    for name in COLLECTIVES:
        if function := getattr(dist, name, None):
            setattr(dist, name, watch(name, function))
