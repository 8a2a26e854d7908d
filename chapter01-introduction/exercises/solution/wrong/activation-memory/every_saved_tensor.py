"""Counts what is saved twice twice, and a view as its part."""

import torch

SAYS = "expected 8016 bytes to be kept, got 14016"


def saved_bytes(forward, parameters):
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes)
