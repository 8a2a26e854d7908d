"""The run that is stopped and resumed, and what is measured of its checkpoints.

The run has everything that can be forgotten. Of a checkpoint: its bytes, what disks do to it (full
ones, files cut short, bytes changed, files gone), and the time that a step waits for it.
"""

import hashlib
import itertools
import math
import os
import random
import resource
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.checkpoints import Checkpoints, HostCopies
from ddp.training_state import collect, restore, settle_buckets
from distlab import data, measure
from distlab.checkpoint_files import MANIFEST, TENSORS, TREE, encode
from distlab.errors import RunError
from distlab.model import model_from_args, num_parameters
from distlab.run import Run
from distlab.runtime import Runtime, seed_everything

FLOAT = 4
MOMENTS = 2  # of AdamW
SMALL_SYNCS = 4  # of state.json, manifest.json, the checkpoint's folder and the folder around it
BETWEEN_FAILURES_S = 3 * 3600.0  # for the example of how often to save


class Trainee:
    """A model under DDP with AdamW, a schedule, a loss scale, a loader, and random numbers.

    In float32 the loss scale, a power of two, changes no bit of a gradient. But it has a state.
    """

    def __init__(self, args: Namespace, job: Runtime, tokens: data.Tokens, seed: int) -> None:
        self.job = job
        seed_everything(seed)
        self.model = model_from_args(args, job.device)
        seed_everything(seed + 1 + job.rank)  # each rank draws its own random numbers
        self.ddp = DDP(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine_after_warm_up(step, args.steps)
        )
        self.scaler = torch.amp.GradScaler(job.device.type, init_scale=1024.0, growth_interval=3)
        self.loader = data.Loader(
            tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed,
            job.device, prefetch=2,
        )  # fmt: skip
        self._parts = (self.ddp, self.optimizer, self.loader, self.scheduler, self.scaler)

    def state(self) -> dict[str, Any]:
        return collect(*self._parts, job=self.job)

    def restore(
        self, state: dict[str, Any], left_out: Sequence[str] = (), settle: bool = True
    ) -> None:
        """Take the state up, but for the parts left out, which stay as they are."""
        own = self.state()
        if settle:
            settle_buckets(self.ddp, self._loss)
        restore({**state, **{part: own[part] for part in left_out}}, *self._parts, job=self.job)

    def train(self, steps: int) -> Tensor:
        """The losses of the next steps, mean of all ranks, float32 [steps]."""
        losses = torch.stack([self._step() for _ in range(steps)])
        self.loader.close()
        return losses.cpu()

    def _step(self) -> Tensor:
        loss = self._loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(
            mean
        )  # each loss for itself: in one sum of all, bits depend on their number
        return mean / self.job.world_size

    def _loss(self) -> Tensor:
        input_ids, targets = next(self.loader)
        return self.ddp(with_mistakes(input_ids, self.model.config.vocab_size), targets=targets)


def with_mistakes(input_ids: Tensor, vocab_size: int) -> Tensor:
    """`input_ids` [batch, seq] with up to 3 in 10 replaced, by the numbers of three generators."""
    share = random.uniform(0.0, 0.3)
    places = torch.from_numpy(np.random.random(tuple(input_ids.shape)) < share)
    anything = torch.randint_like(input_ids, vocab_size)
    return torch.where(places.to(input_ids.device), anything, input_ids)


def cosine_after_warm_up(step: int, steps: int) -> float:
    """The learning rate's factor: up over a tenth of the steps, then down to a tenth."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def differing(one: Any, other: Any) -> tuple[list[str], int]:
    """The names of what differs in two states, bit for bit, and how much was compared."""
    (tree, tensors), (other_tree, other_tensors) = encode(one), encode(other)
    leaves, other_leaves = dict(_leaves(tree)), dict(_leaves(other_tree))
    wrong = [
        name for name in {**leaves, **other_leaves} if leaves.get(name) != other_leaves.get(name)
    ]
    wrong += [
        name
        for name in {**tensors, **other_tensors}
        if name not in tensors or name not in other_tensors
        or not same_bits(tensors[name], other_tensors[name])
    ]  # fmt: skip
    return wrong, len(leaves) + len(tensors)


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every value that is no list or object, by its place in the tree."""
    if isinstance(tree, dict):
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return [(path, tree)]
    return [leaf for key, item in items for leaf in _leaves(item, f"{path}/{key}")]


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bytes_of_both = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*bytes_of_both)


@contextmanager
def full_disk(file_bytes: int = 100_000) -> Iterator[None]:
    """A limit on the size of files stands for the full disk: a write fails in the middle of one.

    It holds for the whole process.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / TENSORS
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / TENSORS
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        [old] = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([old ^ 0b100]))


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / TREE).unlink()


def copy_half_of_it(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": cut_short,
    "one bit changed": flip_a_byte,
    "a file lost": lose_a_file,
    "copied by half": copy_half_of_it,
}


def damage_one_after_another(run: Run, folder: Path, state: Any) -> None:
    """Damage the newest checkpoint, then the newest that is left, each in its own way."""
    lines: list[str] = []
    newest = len(DAMAGES)
    store = Checkpoints(folder, keep=newest + 1, asynchronous=False, report=lines.append)
    for step in range(newest + 1):
        store.save(step, state)
    for name, damage in DAMAGES.items():
        damage(store.path(newest))
        lines.clear()
        loaded = store.load_newest()
        run.print(f"sample: {lines[-1]}")
        run.check_equal(
            f"newest checkpoint {name}: named, and the one before is used",
            (f"{store.path(newest).name}:" in lines[-1], loaded and loaded.step),
            (True, newest - 1),
        )
        newest -= 1
    cut_short(store.path(0))
    try:
        store.load_newest()
        said = "nothing"
    except RunError as error:
        said = str(error).partition(" in ")[0]
    run.check_equal("with all of them damaged", said, "no checkpoint")


def report_bytes(run: Run, checkpoint: Path, model: nn.Module) -> None:
    """Weights and AdamW's two moments, all in float32; the rest is small."""
    predicted = num_parameters(model) * FLOAT * (1 + MOMENTS)
    measured = sum(file.stat().st_size for file in checkpoint.iterdir())
    run.compare("bytes of a checkpoint", predicted, measured, "B")


def report_stall(run: Run, args: Namespace, trainee: Trainee, folder: Path) -> None:
    """How long a step waits for a save, both ways in turns, and what that time consists of."""
    collecting = measure.measure(trainee.state, warmup=1, repeats=5)
    run.metric("collecting the state", collecting.median, "s", "all ranks, random states gathered")
    state = trainee.state()
    if trainee.job.is_main:
        timings = _time_saves(state, folder)
        _report_times(run, args, timings, measure.tensor_bytes(encode(state)[1].values()))
    trainee.job.barrier()


def _time_saves(state: Any, folder: Path) -> dict[str, measure.Timing]:
    """Seconds of both kinds of save, of the wait for the thread, and of the parts of a save."""
    stores = {
        way: Checkpoints(folder / way, keep=1, asynchronous=way == "asynchronous")
        for way in ("synchronous", "asynchronous")
    }
    tensors = encode(state)[1]
    host = HostCopies()
    contents = b"".join(
        t.reshape(-1).view(torch.uint8).numpy().data for t in host.take(tensors).values()
    )
    step = itertools.count()
    timings = measure.compare(
        {
            "synchronous": lambda: stores["synchronous"].save(next(step), state),
            "asynchronous": lambda: stores["asynchronous"].save(next(step), state),
            "then in the background": stores["asynchronous"].wait,
            "copy": lambda: host.take(tensors),
            "sha256": lambda: hashlib.sha256(contents).hexdigest(),
            "write and fsync": lambda: _write(folder / "plain", contents),
            "fsync of nothing": lambda: _write(folder / "plain", b"{}"),
        },
        warmup=2,  # the first asynchronous save gets its memory
        repeats=9,  # 6 give an interval of the ratio; one of 9 may be disturbed at either end
    )
    for store in stores.values():
        store.close()
    return timings


def _write(path: Path, contents: bytes) -> None:
    with path.open("wb") as file:
        file.write(contents)
        os.fsync(file.fileno())


def _report_times(
    run: Run, args: Namespace, timings: dict[str, measure.Timing], state_bytes: int
) -> None:
    rows = []
    for way in ("synchronous", "asynchronous"):
        stall = timings[way].median
        interval = math.sqrt(2 * stall * BETWEEN_FAILURES_S)
        lost = stall / interval + interval / 2 / BETWEEN_FAILURES_S
        rows.append([way, 1e3 * stall, interval, 100 * lost])
    run.table(
        "stall", ["saving", "step waits (ms)", "save every (s)", "time lost (%)"], rows,
        caption=f"medians; Young's interval for a failure every {BETWEEN_FAILURES_S / 3600:g} h",
    )  # fmt: skip
    parts = {name: timings[name].median for name in ("copy", "sha256", "write and fsync")}
    for name, seconds in parts.items():
        run.metric(name, state_bytes / seconds, "B/s", "of the state's bytes alone")
    run.compare("stall, asynchronous: the copy", parts["copy"], timings["asynchronous"].median, "s")
    rest = parts["sha256"] + parts["write and fsync"]
    rest += SMALL_SYNCS * timings["fsync of nothing"].median
    run.compare("stall, synchronous: sha256, disk", rest, timings["synchronous"].median, "s")
    ratios = timings["asynchronous"].ratios(timings["synchronous"])
    run.check_within("asynchronous / synchronous stall", ratios, 0.75, more="repeats")
