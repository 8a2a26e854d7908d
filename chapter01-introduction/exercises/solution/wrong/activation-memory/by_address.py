"""Tells tensors apart by their address, so that a view of the middle counts once more."""

import torch

SAYS = "bytes to be kept"


def saved_bytes(forward, parameters):
    owned, sizes = {p.data_ptr() for p in parameters}, {}

    def pack(tensor):
        if tensor.data_ptr() not in owned:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())
