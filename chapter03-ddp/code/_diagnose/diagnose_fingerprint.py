"""Fingerprints of tensors: equal tensors have equal ones, and a different bit shows."""

import torch
from torch import Tensor

WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
FIRST, EVERY = 4, 8  # each of the first steps, then each eighth: a fraction of a fraction of a step


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
