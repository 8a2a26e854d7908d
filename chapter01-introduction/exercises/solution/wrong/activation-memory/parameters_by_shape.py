"""Takes what has a parameter's shape for a parameter."""

import torch

SAYS = "p a parameter of that shape"


def saved_bytes(forward, parameters):
    shapes, storages = {tuple(p.shape) for p in parameters}, {}

    def pack(tensor):
        if tuple(tensor.shape) not in shapes and tuple(tensor.T.shape) not in shapes:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())
