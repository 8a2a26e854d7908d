"""Save on 4 ranks, go on with 2, 3 and 1: sharded checkpoints, what breaks them, their ways out.

Each rank writes its shards by torch.distributed.checkpoint (DCP), before training's eyes or behind
its back, and the stalls are measured in turns. What was saved on 4 ranks is loaded on 2, saved
there, loaded on 3, and on 1: every weight and moment the same bits. A rank is killed in the middle
of a save. A bit of a file is flipped: DCP alone loads it without a word, the manifest's checksums
find it, and the checkpoint before is used. At last the checkpoint becomes a Hugging Face folder and
one of chapter 3, and comes back, one tensor in memory at a time.

Run:
    python chapter04-fsdp/code/fsdp_checkpointing.py
    python chapter04-fsdp/code/fsdp_checkpointing.py --hidden-size 512

It starts its ranks itself, as processes of this machine.

You should see: 0 tensors that differ, on any number of ranks; an asynchronous save that costs
training the copy of a shard only; the changed bit in one tensor that DCP gives out as good; and
conversions that never hold more than a few tensors.
"""

import itertools
import os
import signal
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distlab import measure, model, script
from distlab.errors import RunError
from distlab.model import Llama, add_model_flags, config_from_args
from distlab.model_config import config_to_json
from distlab.ranks import digest, slowest
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.spawning import spawn
from fsdp import contents
from fsdp.checkpoints import Checkpoints

PRESETS = {
    "smoke": {"model": "smoke", "repeats": 3},
    "laptop": {"model": "laptop", "repeats": 9},
    "gpu": {"model": "laptop", "hidden_size": 1024, "repeats": 9},
}
RANKS = (4, 2, 3, 1)  # one after the other
Sums = dict[str, str]  # of each tensor, by its name


class Found(NamedTuple):
    """What a rank that loaded the newest checkpoint has, and what it was told."""

    step: int
    sums: Sums
    said: list[str]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run, tempfile.TemporaryDirectory(prefix="sharded_") as folder:
        demonstrate(run, args, Path(folder))
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    parser.add_argument("--repeats", type=script.positive_int, help="of each kind of save")
    parser.add_argument("--timeout", type=script.seconds, default=200.0, help="seconds")
    parser.add_argument("--seed", type=script.seed, default=0)
    args = parser.parse_args(argv)
    config_from_args(args)
    return args


def demonstrate(run: Run, args: Namespace, folder: Path) -> None:
    limit = args.timeout
    kept = folder / "run"
    saved, stalls = spawn(begin, RANKS[0], args, folder, timeout_s=limit)[0]
    report_stalls(run, args, stalls, folder)
    report_files(run, newest(kept), saved)
    for ranks in RANKS[1:]:
        found = spawn(go_on, ranks, args, kept, timeout_s=limit)
        wrong = max(differing(saved, one.sums) for one in found)
        run.check_equal(f"of {len(saved)} tensors loaded on {ranks} rank(s), differing", wrong, 0)

    before = newest(kept).name
    try:
        spawn(die_in_a_save, 2, args, kept, timeout_s=limit)
        run.check_true("a rank is killed in the middle of a save", False, "it lived")
    except RunError as error:
        run.print(f"sample: {str(error).splitlines()[0]}; left: {', '.join(hidden(kept))}")
    one = spawn(go_on, 2, args, kept, timeout_s=limit)[0]
    run.check_equal("after it the one before is used", f"step_{one.step:08d}", before)
    run.check_equal("its tensors that differ", differing(saved, one.sums), 0)
    run.check_equal("files that the killed save left", len(hidden(kept)), 0)

    flip_a_bit(newest(kept))
    by_dcp, one = spawn(load_both_ways, 2, args, kept, timeout_s=limit)[0]
    run.print(f"sample: {one.said[0]}")
    run.check_equal("tensors that DCP alone loads with a flipped bit", differing(saved, by_dcp), 1)
    run.check_equal("the manifest tells it, and the tensors before differ in",
                    (len(one.said), differing(saved, one.sums)), (1, 0))  # fmt: skip
    convert(run, args, kept / f"step_{one.step:08d}", saved, folder)


def new_run(args: Namespace, seed: int) -> tuple[Llama, torch.optim.AdamW]:
    """A sharded model and its optimizer."""
    torch.manual_seed(seed)
    made = Llama(config_from_args(args))
    for layer in made.model.layers:
        fully_shard(layer)
    fully_shard(made)
    matrices = [p for p in made.parameters() if p.dim() == 2]
    norms = [p for p in made.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return made, torch.optim.AdamW(groups, lr=1e-2, fused=True)


def train(job: Runtime, made: Llama, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        ids = torch.randint(made.config.vocab_size, (2, 16))
        made(ids, targets=ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def begin(job: Runtime, args: Namespace, folder: Path) -> tuple[Sums, dict[str, list[float]]]:
    """Train, time both ways of saving, and save once while the training goes on."""
    made, optimizer = new_run(args, args.seed)
    train(job, made, optimizer, 3)
    stores = {
        way: Checkpoints(folder / way, job, keep=1, asynchronous=way == "asynchronous")
        for way in ("synchronous", "asynchronous")
    }
    step, fields = itertools.count(1), fields_of(args, job)

    def save(store: Checkpoints) -> None:
        store.save(next(step), made, optimizer, fields)

    timings = measure.compare(
        {
            **{way: partial(save, store) for way, store in stores.items()},
            "behind training's back": stores["asynchronous"].wait,
        },
        warmup=1, repeats=args.repeats, before=job.barrier,
    )  # fmt: skip
    for store in stores.values():
        store.close()
    with Checkpoints(folder / "run", job) as store:
        saved = sums(made, optimizer)
        store.save(3, made, optimizer, fields)
        train(job, made, optimizer, 1)
    return saved, {name: list(slowest(timing).samples) for name, timing in timings.items()}


def go_on(job: Runtime, args: Namespace, folder: Path) -> Found:
    """A run that began otherwise takes the newest checkpoint up, and saves it as the next step."""
    made, optimizer = new_run(args, args.seed + 1)
    said: list[str] = []
    with Checkpoints(folder, job, keep=9, report=said.append) as store:
        loaded = store.load_newest(made, optimizer)
        if loaded is None:
            raise RunError(f"there is no checkpoint in {folder}")
        store.save(loaded.step + 1, made, optimizer, loaded.fields)
    return Found(loaded.step, sums(made, optimizer), said)


def die_in_a_save(job: Runtime, args: Namespace, folder: Path) -> None:
    """Rank 1 is killed when its shards are written, and not yet flushed to the disk."""
    made, optimizer = new_run(args, args.seed + 1)
    train(job, made, optimizer, 1)
    if job.rank == 1:
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    with Checkpoints(folder, job, keep=9, asynchronous=False) as store:
        store.save(max(store.steps()) + 1, made, optimizer, fields_of(args, job))


def load_both_ways(job: Runtime, args: Namespace, folder: Path) -> tuple[Sums, Found]:
    """The newest checkpoint by DCP alone, and then with the sums of its manifest."""
    path = newest(folder)
    made, optimizer = new_run(args, args.seed + 1)
    contents.make_state(contents.Sharded(path).shapes, made, optimizer)
    dcp.load(contents.tensors_of(made, optimizer), storage_reader=dcp.FileSystemReader(path))
    by_dcp = sums(made, optimizer)
    job.barrier()
    return by_dcp, go_on(job, args, folder)


def load_this(job: Runtime, args: Namespace, path: Path) -> Found:
    made, optimizer = new_run(args, args.seed + 1)
    loaded = Checkpoints(path.parent, job).load(path, made, optimizer)
    return Found(loaded.step, sums(made, optimizer), [])


def convert(run: Run, args: Namespace, path: Path, saved: Sums, folder: Path) -> None:
    """To a Hugging Face folder and to chapter 3's file, and back; this process alone, streaming."""
    whole = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for dtype, shape in contents.Sharded(path).shapes.values()
    )
    rows = []
    for name, make in {
        "Hugging Face": lambda: contents.to_hugging_face(path, folder / "model", shard_bytes=10**6),
        "chapter 3": lambda: contents.to_replicated(path, folder / "replicated"),
    }.items():
        started = time.perf_counter()
        with measure.LiveBytes() as live:
            made = make()
        seconds = time.perf_counter() - started
        written = sum(file.stat().st_size for file in made.glob("*.safetensors"))
        rows.append([name, written / 1e6, live.peak / 1e6, seconds])
    run.table(
        "conversions", ["to", "written (MB)", "most held at once (MB)", "seconds"], rows,
        caption=f"the checkpoint has {whole / 1e6:.1f} MB of weights and moments",
    )  # fmt: skip
    weights = {
        f"model.{n}": digest([p]) for n, p in model.load(folder / "model").named_parameters()
    }
    expected = {name: one for name, one in saved.items() if name.startswith("model.")}
    run.check_equal(
        "weights in the Hugging Face folder that differ", differing(expected, weights), 0
    )
    back = spawn(load_this, 3, args, newest(folder / "replicated"), timeout_s=args.timeout)
    wrong = max(differing(saved, one.sums) for one in back)
    run.check_equal("tensors that differ, from chapter 3's format back on 3 ranks", wrong, 0)


def fields_of(args: Namespace, job: Runtime) -> dict[str, object]:
    """What is saved beside the tensors, as a training does."""
    config = config_to_json(config_from_args(args))
    return {"world_size": job.world_size, "loader": {"samples_consumed": 0}, "flags": {},
            "config": config, "optimizer_class": "AdamW"}  # fmt: skip


def sums(made: Llama, optimizer: torch.optim.Optimizer) -> Sums:
    """SHA-256 of each whole tensor; every rank calls it."""
    tensors = contents.tensors_of(made, optimizer)
    return {
        name: digest([tensor.full_tensor() if isinstance(tensor, DTensor) else tensor])
        for name, tensor in tensors.items()
    }


def differing(one: Sums, other: Sums) -> int:
    return sum(one.get(name) != other.get(name) for name in {**one, **other})


def newest(folder: Path) -> Path:
    return max(folder.glob("step_*"))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".step_*"))


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest file: among a matrix's numbers."""
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        [old] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 0b100]))


def report_stalls(
    run: Run, args: Namespace, stalls: Mapping[str, list[float]], folder: Path
) -> None:
    timings = {name: measure.Timing(tuple(samples)) for name, samples in stalls.items()}
    run.table(
        "stalls", ["saving", "the slowest rank takes (ms)", "quartiles (ms)"],
        [[n, 1e3 * t.median, f"{1e3 * t.q1:.1f} to {1e3 * t.q3:.1f}"] for n, t in timings.items()],
        caption=f"{RANKS[0]} ranks, medians of {args.repeats}, in turns",
    )  # fmt: skip
    ratios = timings["asynchronous"].ratios(timings["synchronous"])
    run.check_within("asynchronous / synchronous stall", ratios, 0.75)


def report_files(run: Run, path: Path, saved: Sums) -> None:
    stored = contents.Sharded(path).shapes.values()
    tensors = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in stored)
    files = sum(file.stat().st_size for file in path.iterdir())
    run.compare("bytes of a checkpoint: weights and two moments", tensors, files, "B")


if __name__ == "__main__":
    script.exit(main)
