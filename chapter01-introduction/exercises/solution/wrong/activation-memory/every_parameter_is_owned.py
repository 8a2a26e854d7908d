"""Leaves out whatever is a Parameter, and does not look at those that it is given."""

import torch

SAYS = "given as parameters"


def saved_bytes(forward, parameters):
    storages = {}

    def pack(tensor):
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())
