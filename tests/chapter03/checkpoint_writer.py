"""Processes that write checkpoints until they are killed, and what must be true afterwards.

It imports little: a process that is started for it is soon at work.
"""

import os
import random
import signal
import time

import torch

from ddp.checkpoints import Checkpoints

SYSTEM_CALLS = ("mkdir", "fsync", "rename", "rmdir", "unlink")


def state_of(step, size=1000):
    return {"step": step, "weights": torch.full((size,), float(step)), "list": [step, None]}


def is_state_of(loaded):
    weights = loaded.state["weights"]
    return loaded.state["step"] == loaded.step and bool((weights == loaded.step).all())


def left_over(store):
    return [path.name for path in store.folder.glob(".step_*")]


def killed_at_random_moments(folder, times):
    newest, chance = 0, random.Random(0)
    for _ in range(times):
        writer = started(write_for_ever, folder, newest + 1)
        deadline = time.monotonic() + 60
        while not (folder / f"step_{newest + 1:08d}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        newest = whole_after_a_kill(folder, newest + 1)


def killed_before_each_system_call(folder, calls):
    newest = 0
    for call in range(calls):
        writer = started(write_until, folder, newest + 1, call)
        _, status = os.waitpid(writer, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        newest = whole_after_a_kill(folder, newest)
    assert newest > 1


def started(function, *args):
    """The id of a forked process: this one has no other thread."""
    process = os.fork()
    if process == 0:
        try:
            function(*args)
        finally:
            os._exit(1)
    return process


def write_for_ever(folder, begin):
    store = Checkpoints(folder, keep=1, asynchronous=False)
    for step in range(begin, begin + 1000):
        for _ in range(2):  # the second takes the place of the first
            store.save(step, state_of(step, 50_000))


def write_until(folder, begin, last_call):
    """Write until just before the system call of this number, where the process is killed."""
    calls = iter(range(10_000))
    for name in SYSTEM_CALLS:
        original = getattr(os, name)

        def counted(*args, original=original, **kwargs):
            if next(calls) == last_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, counted)
    write_for_ever(folder, begin)


def whole_after_a_kill(folder, at_least):
    said = []
    store = Checkpoints(folder, keep=1, report=said.append)
    loaded = store.load_newest()
    assert said == [] and left_over(store) == []
    assert (loaded.step >= at_least and is_state_of(loaded)) if loaded else not at_least
    return loaded.step if loaded else 0
