"""The training loop that is profiled: its four phases, and the bottlenecks that can be planted."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch.profiler import record_function

from distlab.data import Loader
from distlab.model import Llama
from intro.verdict import DATA, STEP

PHASES = (DATA, "forward", "backward", "optimizer")
PLANTED_WAIT = 1.5  # of a step's time
CALIBRATION_STEPS = 3


@dataclass(frozen=True)
class Steps:
    """Some steps: the seconds of each phase in each, those of a step on average, all by the wall
    clock, and how long in all the thread slept outside of its input."""

    phases: dict[str, list[float]]
    seconds: float
    blocked_seconds: float


class Trainer:
    """A model, its optimizer and its batches; a context manager that stops their threads."""

    def __init__(self, model: Llama, batches: Loader, device: torch.device, dtype: str) -> None:
        self.model, self.batches, self.device, self.dtype = model, batches, device, dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self._planted: str | None = None
        self._usual_seconds = self._last_seconds = 0.0
        self._monitor = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.batches.close()
        self._monitor.shutdown()

    def run(self, steps: int) -> Steps:
        """Train for `steps` steps, each inside `record_function("step")`."""
        clock = PhaseClock(self.device)
        start = clock.now()
        for _ in range(steps):
            with record_function(STEP):
                self.step(clock.begin)
        clock.begin("end")
        seconds = clock.now() - start
        return Steps(clock.samples(), seconds / steps, clock.blocked_seconds)

    def step(self, begin: Callable[[str], None]) -> None:
        """One step; `begin` is told each phase as it begins."""
        with phase(DATA, begin):
            if self._planted == "slow-input":
                time.sleep(self._planted_wait(self._last_seconds))
            input_ids, targets = next(self.batches)
        started = time.perf_counter()
        with phase("forward", begin), self._autocast():
            loss = self.model.loss(input_ids, targets)
        with phase("backward", begin):
            loss.backward()
            del loss
        with phase("optimizer", begin):
            if self._planted == "sync":
                self._report_gradients(started)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self._last_seconds = time.perf_counter() - started

    def plant(self, bottleneck: str | None) -> None:
        """From now on let the loop wait: for its input (slow-input), for answers (sync)."""
        self._usual_seconds = self.run(CALIBRATION_STEPS).seconds
        self._planted = bottleneck

    def _planted_wait(self, seconds_just_now: float) -> float:
        """One and a half steps' time; where others slow the machine down, of the steps of now."""
        return PLANTED_WAIT * max(self._usual_seconds, seconds_just_now)

    def _report_gradients(self, started: float) -> None:
        """Read each gradient's norm, which waits for a GPU, and wait until it is acknowledged."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        wait = self._planted_wait(time.perf_counter() - started) / len(gradients)
        for gradient in gradients:
            norm = gradient.norm().item()
            self._monitor.submit(acknowledge, norm, wait).result()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


def acknowledge(value: float, seconds: float) -> float:
    """What a tracking server at the other end of a network does: answer, later."""
    time.sleep(seconds)
    return value


@contextmanager
def phase(name: str, begin: Callable[[str], None]) -> Iterator[None]:
    """A phase of the step, told to `begin` and visible in the profile."""
    begin(name)
    with record_function(name):
        yield


class StepClock:
    """The seconds between ticks: CUDA events on a GPU, so that ticking does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.times: list[float] = []
        self.events: list[torch.cuda.Event] = []

    def tick(self) -> None:
        if self.cuda:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        else:
            self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            pairs = zip(self.events, self.events[1:], strict=False)
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in zip(self.times, self.times[1:], strict=False)]


class PhaseClock(StepClock):
    """How long each phase took, and how long the thread slept outside of its input."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.names: list[str] = []
        self.blocked_seconds = 0.0
        self._slept = 0.0

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self, name: str) -> None:
        slept = asleep_seconds()
        if self.names and self.names[-1] != DATA:
            self.blocked_seconds += slept - self._slept
        self.names.append(name)
        self.tick()
        self._slept = slept

    def samples(self) -> dict[str, list[float]]:
        """The seconds of each phase, each time."""
        samples: dict[str, list[float]] = {name: [] for name in PHASES}
        for name, seconds in zip(self.names, self.seconds(), strict=False):  # the end has none
            samples[name].append(seconds)
        return samples


def asleep_seconds() -> float:
    """Time that this thread neither ran nor was ready to run, up to a constant.

    The kernel counts how long it was ready and had to wait for a core (man 5 proc, schedstat);
    where it does not tell, that counts as sleep.
    """
    waited = 0.0
    file = Path("/proc/thread-self/schedstat")
    if file.exists():
        waited = int(file.read_text(encoding="utf-8").split()[1]) / 1e9
    return time.perf_counter() - time.thread_time() - waited
