"""Task 2: what autograd keeps, first of small functions counted by hand, then of a Llama block."""

import torch
from grader_forwards import saved_by_block, saved_by_layer, saved_by_steps

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
    got = saved_by_steps(student)
    assert got == 5200, (
        "y = exp(x) with 1000 floats is kept by exp, by y * y and by sin(y[:10]), with 100 "
        f"indices and a factor of 100 floats: expected 4000 + 800 + 400 bytes, got {got}"
    )


def test_saved_bytes_leaves_parameters_out(student):
    got = saved_by_layer(student)
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
        sizes = (hidden, intermediate, heads, kv_heads)
        measured = saved_by_block(student, batch, seq, dtype, *sizes)
        assert abs(measured / kept - 1) <= TOLERANCE, (
            f"{name}: saved_bytes measures {measured:,} bytes, but autograd keeps {kept:,}"
        )
