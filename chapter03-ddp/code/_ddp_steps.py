"""What `ddp_from_scratch.py` says of its buckets and of its steps' times."""

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import measure, predict
from distlab.model import config_from_args, model_from_args, num_parameters
from distlab.run import Run
from distlab.runtime import Runtime

FLOAT = 4  # bytes
TENSORS_OF_A_LAYER = 9  # q, k, v and o, gate, up and down, two norms
WATCHED_STEPS = 5
WARMUP_STEPS = 3  # DDP arranges its buckets in the second step
LOOSE_RATIO = 25.0  # with other numbers of ranks than 2, which may have to share cores
Wrap = Callable[..., Any]


class Trainee:
    """A wrapped model with its optimizer, on this rank's share of one global batch."""

    def __init__(self, args: Namespace, job: Runtime, wrap: Callable[[Any], Any]) -> None:
        self.model = wrap(model_from_args(args, job.device))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        shape = (args.batch_size // job.world_size, args.seq_len + 1)
        random = torch.Generator().manual_seed(args.seed + job.rank)
        tokens = torch.randint(config_from_args(args).vocab_size, shape, generator=random)
        self.inputs = tokens[:, :-1].to(job.device)
        self.targets = tokens[:, 1:].to(job.device)

    def step(self) -> None:
        self.model(self.inputs, targets=self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Launches:
    """When in backward each bucket of a `DataParallel` leaves, and how many bytes it has."""

    def __init__(self, replica: Any) -> None:
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self.early: list[bool] = []  # gradients were still to come
        self._buckets, self._all_reduce = replica.buckets, replica.all_reduce
        replica.all_reduce = self

    def __call__(self, bucket: Any) -> dist.Work:
        self.seconds.append(time.perf_counter())
        self.bytes.append(bucket.flat.nbytes)
        self.early.append(any(one.missing for one in self._buckets))
        return self._all_reduce(bucket)

    def of_a_step(self, trainee: Trainee) -> list[float]:
        """Each launch as a part of backward, which ends when it launches the last bucket."""
        self.seconds, self.bytes, self.early = [], [], []
        loss = trainee.model(trainee.inputs, targets=trainee.targets)
        began = time.perf_counter()
        loss.backward()
        trainee.optimizer.zero_grad()
        return [(at - began) / (self.seconds[-1] - began) for at in self.seconds]


def caps(args: Namespace) -> dict[str, int]:
    cap = int(args.bucket_mb * 2**20)
    return {"bucket_bytes": cap, "first_bucket_bytes": cap}  # one cap, as DDP(bucket_cap_mb=) has


def report_buckets(run: Run, args: Namespace, job: Runtime, wrap: Wrap) -> None:
    """A few steps, watched: which bucket left when, and how many bytes that were."""
    trainee = Trainee(args, job, lambda model: wrap(model, **caps(args)))
    for _ in range(WARMUP_STEPS):
        trainee.step()
    launches = Launches(trainee.model)
    left = np.median([launches.of_a_step(trainee) for _ in range(WATCHED_STEPS)], axis=0)

    rows: list[list[Any]] = []
    first = 1
    for index, bucket in enumerate(trainee.model.buckets):
        last = first + len(bucket.parameters) - 1
        rows.append([index, first, last, launches.bytes[index] / 1e6, 100 * left[index]])
        run.print(f"sample: bucket {index} has {bucket.names[0]} to {bucket.names[-1]}")
        first = last + 1
    run.table(
        "buckets", ["bucket", "from tensor", "to tensor", "MB", "launched at % of backward"], rows,
        caption="tensors from the model's end on; the last bucket waits for the end of backward",
    )  # fmt: skip
    run.check_equal(
        "the buckets that leave while backward still computes",
        sum(launches.early),
        len(rows) - 1,
    )
    report_bytes(run, args, job, sum(launches.bytes))


def report_bytes(run: Run, args: Namespace, job: Runtime, flat_bytes: int) -> None:
    """A ring sends 2·(K - 1)/K of the buffers: 4·P bytes of gradients, and 4 for each tensor."""
    config = config_from_args(args)
    tensors = TENSORS_OF_A_LAYER * config.num_hidden_layers + (
        2 if config.tie_word_embeddings else 3
    )
    predicted = predict.data_parallel_bytes(
        FLOAT * (num_parameters(config) + tensors), job.world_size
    )
    counted = predict.BUS_FACTORS["all_reduce"](job.world_size) * flat_bytes
    run.compare("bytes that a rank sends in a step", predicted, counted, "B")
    run.check_equal("the counted bytes are those predicted", counted, predicted)


def compare_step_times(run: Run, args: Namespace, job: Runtime, wrap: Wrap) -> None:
    """Ours, ours without overlap, and torch's DDP, in turns; the slowest rank's time counts."""
    trainees = {
        "from scratch": Trainee(args, job, lambda model: wrap(model, **caps(args))),
        "without overlap": Trainee(
            args, job, lambda model: wrap(model, overlap=False, **caps(args))
        ),
        "of torch DDP": Trainee(args, job, lambda model: DDP(model, bucket_cap_mb=args.bucket_mb)),
    }
    steps = {name: trainee.step for name, trainee in trainees.items()}
    timings = measure.compare(steps, WARMUP_STEPS, args.repeats, job.device)
    own = torch.tensor([timing.samples for timing in timings.values()], device=job.device)
    dist.all_reduce(own, dist.ReduceOp.MAX)  # [kind of step, repeats]
    medians = dict(zip(timings, own.median(dim=1).values.tolist(), strict=True))
    for name, seconds in medians.items():
        run.metric(f"step {name}", seconds, "s", f"median of {args.repeats}, in turns")
    ratio = medians["from scratch"] / medians["of torch DDP"]
    limit = args.max_ratio if job.world_size == 2 else LOOSE_RATIO
    run.check_below("a step's time, in units of torch DDP's", ratio, limit)
