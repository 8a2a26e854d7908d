"""Forward passes that `saved_bytes` measures: built beside the student's code, from plain data."""

import torch
from grader_llama_block import LlamaBlock

from distlab.lab.grade_student import rig

torch.set_num_threads(1)  # tiny kernels: on a busy machine two threads wait for each other


@rig
def saved_by_steps(student, steps, rows, cols, dtype, owned=("p", "w")):
    """(bytes, calls): what `saved_bytes` says of a forward pass, and how often it ran it.

    steps: expressions; the value of step i has the name v{i+1}. What they may use besides: v0, the
    input [rows, cols]; c, a constant of the same shape; first, the index [0, 0]; and the
    parameters p [rows, cols], a part of a flat buffer as sharded training keeps it, and w
    [cols, cols]. Those `owned` are handed to `saved_bytes`, and a third one, never saved. c has
    the values of p.
    """
    dtype = getattr(torch, dtype)
    names = {
        "v0": torch.rand(rows, cols, dtype=dtype, requires_grad=True),
        "first": torch.tensor([0, 0]),
        "p": torch.nn.Parameter(torch.rand(rows * cols + 1, dtype=dtype)[1:].view(rows, cols)),
        "w": torch.nn.Parameter(torch.rand(cols, cols, dtype=dtype)),
    }
    names["c"] = names["p"].detach().clone()
    unused = torch.nn.Parameter(torch.rand(rows, cols))
    calls = 0

    def forward():
        nonlocal calls
        calls += 1
        values = dict(names)
        for i, step in enumerate(steps, start=1):
            values[f"v{i}"] = eval(step, {}, values)
        return sum(values[f"v{i}"].sum() for i in range(1, len(steps) + 1))

    handed = [unused, *(names[name] for name in owned)]
    parameters = iter(handed)  # like module.parameters(): read once
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
