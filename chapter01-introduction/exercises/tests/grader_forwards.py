"""Forward passes that `saved_bytes` measures: built beside the student's code."""

import torch
from grader_llama_block import LlamaBlock

from distlab.lab.grade_student import rig


@rig
def saved_by_steps(student):
    """What `saved_bytes` says of a few operations on 1000 floats."""
    x = torch.randn(1000, requires_grad=True)
    chosen = torch.arange(100)

    def forward():
        y = x.exp()  # keeps y: 4000 bytes
        a = y * y  # keeps y, twice
        b = y[:10].sin()  # keeps a part of y
        c = x.detach()[chosen] * x[chosen]  # keeps the indices, 800 bytes, and a factor, 400
        return a.sum() + b.sum() + c.sum()

    return student.saved_bytes(forward, [])


@rig
def saved_by_layer(student):
    """What it says of a linear layer from 64 to 32 and 16 inputs."""
    layer = torch.nn.Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)
    return student.saved_bytes(lambda: layer(x), layer.parameters())


@rig
def saved_by_block(student, batch, seq_len, dtype, *sizes):
    """What it says of one LlamaBlock of these `sizes`."""
    block = LlamaBlock(*sizes).to(dtype)
    x = torch.randn(batch, seq_len, sizes[0], dtype=dtype, requires_grad=True)
    return student.saved_bytes(lambda: block(x), block.parameters())
