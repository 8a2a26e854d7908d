"""What the agent listens to in a rank: steps, losses, data, devices, collectives, and its end.

torch offers a hook for the optimizer's steps and for a module's forward pass. Where it offers none,
a function of torch is replaced by one that tells the agent and then calls it.
"""

import ast
import atexit
import functools
import inspect
import itertools
import math
import os
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook as after_steps
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from . import Agent, caller, cuda_device, is_own, own_frame

COLLECTIVES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor",
    "all_gather_single", "gather", "scatter", "reduce_scatter", "reduce_scatter_tensor",
    "reduce_scatter_single", "all_to_all", "all_to_all_single", "barrier", "send", "recv",
)  # fmt: skip
TORCH_DISTRIBUTED = f"{os.sep}torch{os.sep}distributed{os.sep}"
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
FIRST, EVERY = 4, 8  # each of the first steps, then each eighth: a fraction of a fraction of a step


def activate() -> Agent:
    """Watch this rank from now on; torch has just been imported."""
    folder, rank = os.environ["DIAGNOSE_DIR"], int(os.environ["RANK"])
    agent = Agent(Path(folder), rank, float(os.environ["DIAGNOSE_STALL_AFTER"]))
    install(agent)
    _hear_last_words(agent)
    threading.Thread(target=agent.run, name="diagnose", daemon=True).start()
    return agent


def install(agent: Agent) -> None:
    Steps(agent)
    losses(agent)
    replicas(agent)
    samplers(agent)
    loaders(agent)
    devices(agent)
    collectives(agent)


class Steps:
    """Fingerprints of each optimizer's parameters: before its first step, and after some."""

    def __init__(self, agent: Agent) -> None:
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
                self.built[number], self.steps[number] = caller(), 0

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
            place=caller(), sums=fingerprint(parameters),
            shapes=[list(p.shape) for p in parameters], device=str(parameters[0].device),
            devices=cuda_device(parameters[0].device),
        )  # fmt: skip


def _built_by_torch() -> bool:
    frame = inspect.currentframe()
    while frame is not None and not is_own(frame.f_code.co_filename):
        if TORCH_DISTRIBUTED in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def replicas(agent: Agent) -> None:
    """DDP's parameter names, and its buffers as the forward pass of a step finds them."""
    made = DistributedDataParallel.__init__

    @functools.wraps(made)
    def init(replica: DistributedDataParallel, *args: Any, **options: Any) -> None:
        made(replica, *args, **options)
        place = caller()
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


def devices(agent: Agent) -> None:
    """Which device, or which cores, a rank chooses, and in which line."""

    def watch(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            cores = sorted(os.sched_getaffinity(0)) if what == "cores" else []
            agent.tell("chosen", what=what, device=cuda_device(), cores=cores,
                       place=caller())  # fmt: skip
            return result

        setattr(owner, name, watched)

    watch(torch.cuda, "set_device", "cuda")
    if hasattr(os, "sched_setaffinity"):
        watch(os, "sched_setaffinity", "cores")


def collectives(agent: Agent) -> None:
    """Each call from Python, noted before it begins: a crash in it leaves nothing else behind."""

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **options: Any) -> Any:
            in_main = threading.current_thread() is threading.main_thread()
            if not (in_main and agent.listening):
                return function(*args, **options)
            tensors = [a for a in [*args, *options.values()] if isinstance(a, Tensor)]
            place, calls = caller(), agent.counts["calls"] + 1
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


def is_due(step: int) -> bool:
    """Whether the tensors are looked at after this step; the same on every rank."""
    return step <= FIRST or step % EVERY == 0


@torch.no_grad()
def fingerprint(tensors: list[Tensor]) -> list[int]:
    """The sum of each tensor's bits, read as whole numbers: exact, and in any order the same."""
    sums = [_bits(tensor).sum(dtype=torch.int64) for tensor in tensors if type(tensor) in PLAIN]
    return torch.stack(sums).tolist() if sums else []


PLAIN = (Tensor, torch.nn.Parameter)  # a DTensor holds a share of its own, which is to differ


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach()
    if not flat.is_contiguous():
        flat = flat.contiguous()
    return flat.view(-1).view(WHOLE[tensor.element_size()])


def losses(agent: Agent) -> None:
    """Whether each loss was finite when its backward pass began; on GPUs the last one is looked at,
    since looking at this one would wait for the GPU."""
    backward = Tensor.backward
    last: list[tuple[int, Tensor]] = []

    @functools.wraps(backward)
    def watched(loss: Tensor, *args: Any, **options: Any) -> None:
        agent.counts["backward"] += 1
        number = agent.counts["backward"]
        if loss.numel() == 1 and agent.listening:
            last.append((number, loss.detach()))
            if not loss.is_cuda or len(last) > 1:
                number, value = last.pop(0)
                if not math.isfinite(value.item()):
                    told = culprit(own_frame()) if number == agent.counts["backward"] else None
                    agent.tell("loss", number=number, place=caller(), culprit=told)
        try:
            backward(loss, *args, **options)
        except RuntimeError as error:  # of DDP's collectives, which no other hook sees
            agent.tell("failed", op="backward", error=str(error)[:500], place=caller())
            raise

    Tensor.backward = watched  # type: ignore[method-assign, assignment]


def culprit(frame: FrameType | None) -> dict[str, Any] | None:
    """The first of a function's tensors, as its lines assign them, that is not finite."""
    if frame is None:
        return None
    try:
        lines, begin = inspect.getsourcelines(frame.f_code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    begin = max(begin, 1)
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for node in sorted(assigned, key=lambda node: node.lineno):
        parts = [part for target in node.targets for part in ast.walk(target)]
        for name in [part.id for part in parts if isinstance(part, ast.Name)]:
            value = frame.f_locals.get(name)
            if isinstance(value, Tensor) and value.is_floating_point() and not _finite(value):
                line = begin + node.lineno - 1
                return {
                    "name": name,
                    "place": (frame.f_code.co_filename, line, frame.f_code.co_name),
                }
    return None


def _finite(value: Tensor) -> bool:
    return bool(value.detach().isfinite().all())


def samplers(agent: Agent) -> None:
    """The order that a DistributedSampler gives each time that it is asked, and its epoch."""
    order = DistributedSampler.__iter__
    numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
    fresh = itertools.count()

    @functools.wraps(order)
    def watched(sampler: Any) -> Iterator[Any]:
        number = numbers.get(sampler)
        if number is None:
            number = numbers[sampler] = next(fresh)
        indices = list(order(sampler))
        agent.tell(
            "epoch", sampler=number, epoch=sampler.epoch, shuffle=sampler.shuffle,
            order=hash(tuple(indices[:10_000])), place=caller(),
            steps=agent.counts["steps"],
        )  # fmt: skip
        return iter(indices)

    DistributedSampler.__iter__ = watched  # type: ignore[method-assign]


def loaders(agent: Agent) -> None:
    """How many batches each pass over a DataLoader has given, and where it came to its end."""
    begin: Any = DataLoader.__iter__
    draw: Any = _BaseDataLoaderIter.__next__
    numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
    fresh = itertools.count()

    @functools.wraps(begin)
    def watched_begin(loader: Any) -> Any:
        iterator = begin(loader)
        number = numbers.get(loader)
        if number is None:
            number = numbers[loader] = next(fresh)
        iterator._diagnose = [number, 0]
        return iterator

    @functools.wraps(draw)
    def watched_draw(iterator: Any) -> Any:
        try:
            batch = draw(iterator)
        except StopIteration:
            number, drawn = getattr(iterator, "_diagnose", (None, 0))
            agent.tell("exhausted", loader=number, drawn=drawn, place=caller())
            raise
        if hasattr(iterator, "_diagnose"):
            iterator._diagnose[1] += 1
            agent.counts[f"loader{iterator._diagnose[0]}"] = iterator._diagnose[1]
        return batch

    DataLoader.__iter__ = watched_begin  # type: ignore[method-assign]
    _BaseDataLoaderIter.__next__ = watched_draw  # type: ignore[method-assign, assignment]


def _hear_last_words(agent: Agent) -> None:
    pid, leave, show = os.getpid(), os._exit, sys.excepthook

    def leave_at_once(status: int) -> None:
        if os.getpid() == pid:  # not a child that this rank forked
            agent.last_words(status)
        leave(status)

    def show_error(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        place = None
        while trace is not None:
            if is_own(trace.tb_frame.f_code.co_filename):
                place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno,
                         trace.tb_frame.f_code.co_name)  # fmt: skip
            trace = trace.tb_next
        agent.last_words(1, f"{kind.__name__}: {error}"[:500], place)
        show(kind, error, trace)

    def leave_in_order() -> None:
        if os.getpid() == pid:
            agent.tell("exit", status=None, error=None, place=None, devices=None)
            agent.flush()

    os._exit, sys.excepthook = leave_at_once, show_error  # type: ignore[assignment]
    atexit.register(leave_in_order)
