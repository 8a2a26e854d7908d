"""The copy of a state for which a training step waits, while the rest goes on behind its back."""

import torch
from torch import Tensor


class HostCopies:
    """Copies of tensors in host memory, made fast enough for a step to wait for them.

    The memory is kept for the next time: fresh pages cost more than the copy, and page-locked ones,
    to which a GPU copies at the full speed of its link, far more.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._buffers = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        for device in {t.device for t in tensors.values() if t.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return self._buffers

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        on_gpu = tensor.device.type == "cuda"
        buffer = self._buffers.get(name)
        wanted = (tensor.shape, tensor.dtype, on_gpu)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.is_pinned()) != wanted:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        return buffer.copy_(tensor, non_blocking=on_gpu)
