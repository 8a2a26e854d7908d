"""Takes what has a parameter's values for the parameter."""

import torch

SAYS = "of the same values"


def saved_bytes(forward, parameters):
    owned = [value for p in parameters for value in (p, p.mT)]
    storages = {}

    def pack(tensor):
        if not any(torch.equal(tensor, parameter) for parameter in owned):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())
