"""torch.distributed's collectives in the form of `collectives_from_scratch.py`'s."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from distlab.runtime import Runtime


def run_library(name: str, tensor: Tensor, job: Runtime) -> Tensor:
    """The library's result of the collective called `name`, on `tensor`'s device."""
    kind = name.partition(" (")[0]
    staged = job.backend == "gloo"  # not all of gloo's collectives take CUDA tensors
    return LIBRARY[kind](tensor.cpu() if staged else tensor).to(tensor.device)


def broadcast(tensor: Tensor) -> Tensor:
    dist.broadcast(tensor, src=0)
    return tensor


def reduce_scatter(tensor: Tensor) -> Tensor:
    """The library wants chunks of one size."""
    chunks = tensor.tensor_split(dist.get_world_size())
    padded = [padded_to(chunks[0].numel(), chunk) for chunk in chunks]
    own = torch.empty_like(padded[0])
    dist.reduce_scatter(own, padded)
    return own[: chunks[dist.get_rank()].numel()]


def all_gather(tensor: Tensor) -> Tensor:
    """The library wants chunks of one size."""
    chunks = tensor.tensor_split(dist.get_world_size())
    own = padded_to(chunks[0].numel(), chunks[dist.get_rank()])
    gathered = [torch.empty_like(own) for _ in chunks]
    dist.all_gather(gathered, own)
    return torch.cat([g[: c.numel()] for g, c in zip(gathered, chunks, strict=True)])


def all_to_all(tensor: Tensor) -> Tensor:
    sizes = [chunk.numel() for chunk in tensor.tensor_split(dist.get_world_size())]
    own = sizes[dist.get_rank()]
    received = tensor.new_empty(own * len(sizes))
    dist.all_to_all_single(received, tensor, [own] * len(sizes), sizes)
    return received


def all_reduce(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def padded_to(size: int, tensor: Tensor) -> Tensor:
    return pad(tensor, (0, size - tensor.numel()))


LIBRARY = {
    "broadcast": broadcast,
    "reduce-scatter": reduce_scatter,
    "all-gather": all_gather,
    "all-to-all": all_to_all,
    "all-reduce": all_reduce,
}
