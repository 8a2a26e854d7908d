"""Task 2: what autograd keeps, first of small functions counted by hand, then of a Llama block."""

import torch
from grader_llama_block import LlamaBlock

TOLERANCE = 0.02  # the docstring's: room for a term that grows only with the tokens
BLOCKS = {  # batch, seq_len, hidden, intermediate, heads, kv_heads, dtype: bytes kept (torch 2.13)
    "an ordinary block": (2, 64, 128, 352, 4, 4, torch.float32, 1_508_352),
    "a long sequence": (2, 256, 64, 128, 8, 8, torch.float32, 6_557_696),
    "a wide MLP": (1, 32, 128, 1024, 2, 2, torch.float32, 696_576),
    "grouped queries": (3, 48, 256, 128, 8, 1, torch.float32, 1_733_760),
    "bfloat16": (2, 64, 128, 352, 4, 2, torch.bfloat16, 721_408),
    "float64": (1, 48, 128, 256, 4, 2, torch.float64, 910_080),
}


def test_saved_bytes_counts_each_storage_once(student):
    x = torch.randn(1000, requires_grad=True)
    chosen = torch.arange(100)

    def forward():
        y = x.exp()  # keeps y: 4000 bytes
        a = y * y  # keeps y, twice
        b = y[:10].sin()  # keeps a part of y
        c = x.detach()[chosen] * x[chosen]  # keeps the indices, 800 bytes, and a factor, 400
        return a.sum() + b.sum() + c.sum()

    got = student.saved_bytes(forward, [])
    assert got == 5200, (
        "y = exp(x) with 1000 floats is kept by exp, by y * y and by sin(y[:10]), with 100 "
        f"indices and a factor of 100 floats: expected 4000 + 800 + 400 bytes, got {got}"
    )


def test_saved_bytes_leaves_parameters_out(student):
    layer = torch.nn.Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)
    got = student.saved_bytes(lambda: layer(x), layer.parameters())
    assert got == 16 * 64 * 4, (
        "a linear layer keeps its input [16, 64] and its weight, a parameter that is counted "
        f"elsewhere: expected 4096 bytes, got {got}"
    )


def test_formula_matches_autograd(student):
    for name, (batch, seq, hidden, intermediate, heads, kv_heads, dtype, kept) in BLOCKS.items():
        predicted = student.block_activation_bytes(
            batch=batch,
            seq_len=seq,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_heads=heads,
            num_kv_heads=kv_heads,
            bytes_per_element=dtype.itemsize,
        )
        assert abs(predicted / kept - 1) <= TOLERANCE, (
            f"{name} (batch {batch}, sequence {seq}, hidden {hidden}, MLP {intermediate}, heads "
            f"{heads}, kv heads {kv_heads}, {dtype}): autograd keeps {kept:,} bytes, the formula "
            f"says {predicted:,}, which is {predicted / kept:.2f} of it"
        )
        block = LlamaBlock(hidden, intermediate, heads, kv_heads).to(dtype)
        x = torch.randn(batch, seq, hidden, dtype=dtype, requires_grad=True)
        measured = student.saved_bytes(lambda block=block, x=x: block(x), block.parameters())
        assert abs(measured / kept - 1) <= TOLERANCE, (
            f"{name}: saved_bytes measures {measured:,} bytes, but autograd keeps {kept:,}"
        )
