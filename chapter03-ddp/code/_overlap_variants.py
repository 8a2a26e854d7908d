"""The three steps that `overlap_profile.py` compares, and the buckets that they make."""

from argparse import Namespace

import torch.distributed as dist
from _bucket_model import MIB, Alone, Bucket, Wire, ddp_buckets, predict_step
from _bucket_training import Trainee, own_batch
from _ddp_buckets import Bucket as Buffer
from ddp_from_scratch import DataParallel
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import record_function

from distlab import runtime
from distlab.model import model_from_args
from distlab.runtime import Runtime

WITH, WITHOUT, LIBRARY = VARIANTS = ("with overlap", "without overlap", "of torch's DDP")
LAUNCH, ALL_THERE = "launch bucket", "the last gradient"  # as the trace shows them


class Marked(DataParallel):
    """The chapter's own, with its launches and the end of its computing marked in a trace."""

    def __init__(self, module: nn.Module, bucket_bytes: int, overlap: bool) -> None:
        super().__init__(module, bucket_bytes, overlap)
        register_multi_grad_hook(list(module.parameters()), lambda gradients: mark(ALL_THERE))

    def all_reduce(self, bucket: Buffer) -> dist.Work:
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
        trainees[name] = Trainee(model, wrapped, own_batch(args, job, model.config.vocab_size))
    return trainees


def own_buckets(trainee: Trainee, alone: Alone) -> list[Bucket]:
    """The bytes of `DataParallel`'s buckets, and when each can leave, as measured in `alone`.

    Its last bucket leaves when backward has ended: see `DataParallel._launch_full_buckets`.
    """
    places = {id(parameter): place for place, parameter in enumerate(trainee.parameters)}
    ready = dict(zip(alone.order, alone.ready, strict=True))
    buffers: list[Buffer] = trainee.wrapped.buckets  # type: ignore[assignment]
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
