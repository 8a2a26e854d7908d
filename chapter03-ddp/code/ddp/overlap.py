"""Steps with overlap and without it: the buckets that they make, and their profiled timeline.

The timeline is read from torch.profiler's trace of one step of each. The steps mark in it what the
profiler does not know: their parts, each bucket's launch, and the last gradient.
"""

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile, record_function

from ddp import data_parallel
from ddp.data_parallel import DataParallel
from ddp.step_times import MIB, Alone, Bucket, Trainee, Wire, ddp_buckets, own_batch, predict_step
from distlab import runtime
from distlab.errors import RunError
from distlab.files import write_text
from distlab.model import model_from_args
from distlab.runtime import Runtime

WITH, WITHOUT, LIBRARY = VARIANTS = ("with overlap", "without overlap", "of torch's DDP")
LAUNCH, ALL_THERE = "launch bucket", "the last gradient"  # as the trace shows them
COMPUTE, WAITS, SENDS = ("forward", "backward", "optimizer"), "waits its turn", "all-reduce"
SETTLE_S = 0.05  # for gloo's threads to close the spans of what has just ended


class Marked(DataParallel):
    """The chapter's own, with its launches and the end of its computing marked in a trace."""

    def __init__(self, module: nn.Module, bucket_bytes: int, overlap: bool) -> None:
        super().__init__(module, bucket_bytes, overlap)
        register_multi_grad_hook(list(module.parameters()), lambda gradients: mark(ALL_THERE))

    def all_reduce(self, bucket: data_parallel.Bucket) -> dist.Work:
        with record_function(f"{LAUNCH} {self.launched}"):
            return super().all_reduce(bucket)


def mark(name: str) -> None:
    with record_function(name):
        pass


def replicas(args: Namespace, job: Runtime) -> dict[str, Trainee]:
    """The same model and batch for each of VARIANTS."""
    trainees = {}
    for name in VARIANTS:
        runtime.seed_everything(args.seed)
        model = model_from_args(args, job.device)
        if name == LIBRARY:
            wrapped: nn.Module = DDP(
                model, bucket_cap_mb=args.bucket_mb, gradient_as_bucket_view=True
            )
        else:
            wrapped = Marked(model, int(args.bucket_mb * MIB), overlap=name == WITH)
        batch = own_batch(args, job, model.config.vocab_size, args.batch_size)
        trainees[name] = Trainee(model, wrapped, batch)
    return trainees


def own_buckets(trainee: Trainee, alone: Alone) -> list[Bucket]:
    """The bytes of `DataParallel`'s buckets, and when each can leave, as measured in `alone`.

    Its last bucket leaves when backward has ended: see `DataParallel._launch_full_buckets`.
    """
    places = {id(parameter): place for place, parameter in enumerate(trainee.parameters)}
    ready = dict(zip(alone.order, alone.ready, strict=True))
    buffers: list[data_parallel.Bucket] = trainee.wrapped.buckets  # type: ignore[assignment]
    buckets = [
        Bucket(one.flat.nbytes, max(ready[places[id(p)]] for p in one.parameters))
        for one in buffers
    ]
    return [*buckets[:-1], Bucket(buckets[-1].size, alone.backward)]


def predict_variants(
    alone: Alone, wire: Wire, own: list[Bucket], bucket_mb: float
) -> dict[str, float]:
    """Seconds of a step of each of VARIANTS."""
    theirs = ddp_buckets(alone, [int(bucket_mb * MIB)])
    return {
        WITH: predict_step(alone, wire, own).step,
        WITHOUT: predict_step(alone, wire, own, overlap=False).step,
        LIBRARY: predict_step(alone, wire, theirs).step,
    }


class Span(NamedTuple):
    name: str
    kind: str  # the trace's category
    begin: float  # microseconds
    end: float


def profile_steps(
    trainees: Mapping[str, Trainee], job: Runtime, file: str | None
) -> list[dict[str, Any]]:
    """Profile a step of each on rank 0: the rows of their timeline in ms; the trace goes to `file`.

    Every rank makes the steps. The other ranks' timelines are empty.
    """
    activities = [ProfilerActivity.CPU]
    if job.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities) if job.is_main else None
    with profiler or nullcontext():
        for trainee in trainees.values():  # the profiler's own beginning is not to be in a step
            trainee.step()
        for name, trainee in trainees.items():
            job.barrier()
            with record_function(name):
                marked_step(trainee)
                job.synchronize()
        job.barrier()
        time.sleep(SETTLE_S)
    if profiler is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_text(encoding="utf-8")
    if file:
        write_text(file, text)
    spans = spans_of(json.loads(text))
    return [row for name in trainees for row in rows_of(spans, name)]


def marked_step(trainee: Trainee) -> None:
    """`Trainee.step`, with its parts marked."""
    trainee.optimizer.zero_grad()
    with record_function("forward"):
        loss = trainee.forward()
    with record_function("backward"):
        loss.backward()
    with record_function("optimizer"):
        trainee.optimizer.step()


def spans_of(trace: Mapping[str, Any]) -> list[Span]:
    """Everything in a chrome trace that has a beginning and an end, in order of beginning."""
    spans = [
        Span(event["name"], event.get("cat", ""), event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event["ph"] == "X"
    ]
    return sorted(spans, key=lambda span: span.begin)


def rows_of(spans: Sequence[Span], variant: str) -> list[dict[str, Any]]:
    """The rows of one variant's step: what it computes, then each of its buckets."""
    whole = one_of(spans, variant)
    inside = [span for span in spans if whole.begin <= span.begin <= whole.end]
    gpu = [span for span in inside if span.kind == "gpu_user_annotation"]
    parts = [one_of(gpu or inside, name) for name in COMPUTE]
    if not gpu:  # else its queue, not `backward` of the CPU, waits for the buckets
        parts[1] = parts[1]._replace(end=one_of(inside, ALL_THERE).end)
    launches = [span.begin for span in inside if span.name.startswith(LAUNCH)]
    sends = [span for span in inside if is_all_reduce(span)]
    if len(sends) != len(launches):
        raise RunError(
            f"the profiler's trace of the step {variant} has {len(sends)} all-reduces of "
            f"{len(launches)} buckets, so no timeline can be drawn from it"
        )
    begin = parts[0].begin
    rows = [(f"{variant}: compute", [(part.name, part.begin, part.end) for part in parts])]
    for index, (launch, send) in enumerate(zip(launches, sends, strict=True)):
        turn = max(launch, send.begin)  # a GPU's clock and the CPU's are not quite the same
        rows.append((f"bucket {index}", [(WAITS, launch, turn), (SENDS, turn, send.end)]))
    return [
        {
            "label": label,
            "x": [[(first - begin) / 1e3, (last - begin) / 1e3] for _, first, last in row],
            "y": [name for name, _, _ in row],
        }
        for label, row in rows
    ]


def is_all_reduce(span: Span) -> bool:
    """Whether it is a thread of gloo's at work on one, or NCCL's kernel."""
    if span.kind == "kernel":
        return span.name.startswith("nccl") and "AllReduce" in span.name
    return span.name == "gloo:all_reduce"


def one_of(spans: Sequence[Span], name: str) -> Span:
    for span in spans:
        if span.name == name:
            return span
    raise RunError(f"the profiler's trace has no {name!r}, so no timeline can be drawn from it")
