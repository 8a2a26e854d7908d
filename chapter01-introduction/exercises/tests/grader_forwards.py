"""Forward passes that `saved_bytes` measures: built beside the student's code, from plain data."""

import torch
from grader_llama_block import LlamaBlock

from distlab.lab.grade_student import rig

torch.set_num_threads(1)  # tiny kernels: on a busy machine two threads wait for each other


@rig
def saved_by_steps(student, steps, rows, cols, dtype):
    """(bytes, calls): what `saved_bytes` says of a forward pass, and how often it ran it.

    steps: expressions; the value of step i has the name v{i+1}. What they may use besides: v0, the
    input [rows, cols]; c, a constant of the same shape; first, the index [0, 0]; and the
    parameters p [rows, cols], a part of a flat buffer as sharded training keeps it, and w
    [cols, cols]. A third parameter, unused, is never saved.
    """
    dtype = getattr(torch, dtype)
    names = {
        "v0": torch.rand(rows, cols, dtype=dtype, requires_grad=True),
        "c": torch.rand(rows, cols, dtype=dtype),
        "first": torch.tensor([0, 0]),
        "p": torch.nn.Parameter(torch.rand(rows * cols + 1, dtype=dtype)[1:].view(rows, cols)),
        "w": torch.nn.Parameter(torch.rand(cols, cols, dtype=dtype)),
    }
    unused = torch.nn.Parameter(torch.rand(rows, cols))
    calls = 0

    def forward():
        nonlocal calls
        calls += 1
        values = dict(names)
        for i, step in enumerate(steps, start=1):
            values[f"v{i}"] = eval(step, {}, values)
        return sum(values[f"v{i}"].sum() for i in range(1, len(steps) + 1))

    parameters = iter([names["p"], unused, names["w"]])  # like module.parameters(): read once
    return student.saved_bytes(forward, parameters), calls


@rig
def saved_by_block(student, batch, seq_len, dtype, **sizes):
    """What `saved_bytes` says of one LlamaBlock of these `sizes`."""
    block, x = make_block(batch, seq_len, dtype, **sizes)
    return student.saved_bytes(lambda: block(x), block.parameters())


def make_block(batch, seq_len, dtype, **sizes):
    """A LlamaBlock, and an input for it."""
    block = LlamaBlock(**sizes).to(getattr(torch, dtype))
    shape = (batch, seq_len, sizes["hidden_size"])
    return block, torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=True)
