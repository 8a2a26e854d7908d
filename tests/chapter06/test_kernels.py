"""The CPU operators: exact at every shape, the same in every batch, with whatever instructions.

Every test runs once with each choice of PAGED_ENGINE_KERNELS that this machine has (what it lacks
is told by test_native.py).
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_engine import kernels, native
from paged_engine.packing import Linear, holds_bfloat16

FLOAT, BFLOAT = torch.float32, torch.bfloat16
ODD_SHAPES = [(1, 1), (7, 5), (16, 64), (37, 300), (100, 513), (576, 1536)]
HEADS = [  # heads, kv_heads, head_dim, block_size: one not of whole vectors among them
    (9, 3, 64, 16), (4, 4, 16, 8), (8, 1, 80, 32), (2, 2, 24, 5), (4, 2, 6, 16),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True, params=native.available())
def way(request) -> Iterator[str]:
    """Every way of computing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.VARIABLE, request.param)
        native.native.cache_clear()
        built, words = kernels.native()
        assert (built is None) == (request.param == "torch"), words
        yield request.param
    native.native.cache_clear()


def rounding(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far float32 sums may be from x Wᵀ, in whatever order they are added.

    n additions, each rounded to half a unit u = 2⁻²⁴ of its result, make an error of at most
    n u Σ|x w|. Nearly always it is below λ √n u Σ|x w| with a λ of a few, for roundings go up and
    down (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"). Factors
    rounded to bfloat16 would be off by some 2⁻⁹ Σ|x w| / √n: more than that up to n = 8,000.
    """
    return 4 * (x.shape[1] + 1) ** 0.5 * 2.0**-24 * (x.abs().double() @ weight.abs().double().T)


def random_weight(out: int, depth: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(out, depth, generator=generator) / depth**0.5).to(dtype)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(("out", "depth"), ODD_SHAPES)
def test_a_product_is_exact_to_float32_whatever_the_shape(out, depth, dtype):
    weight, bias = random_weight(out, depth, dtype), random_weight(1, out, FLOAT)[0]
    x = random_weight(200, depth, FLOAT, seed=1) * depth**0.5
    linear = kernels.pack(weight, bias)
    for rows in (0, 1, 2, 5, 6, 7, 13, 64, 193, 200):
        y, exact = linear(x[:rows]), x[:rows].double() @ weight.double().T + bias.double()
        assert y.shape == (rows, out) and y.dtype == FLOAT
        error, most = (y.double() - exact).abs(), rounding(x[:rows], weight) + 2.0**-22
        assert (error <= most).all(), f"{rows} rows: {(error / most).max()} times the rounding"


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_a_row_does_not_depend_on_the_rows_beside_it(way, dtype):
    weight, x = random_weight(100, 513, dtype), random_weight(400, 513, FLOAT, seed=1)
    linear = kernels.pack(weight)
    whole, most = linear(x), 2 * rounding(x, weight)
    for rows in (1, 2, 3, 8, 15, 16, 17, 64, 191, 192, 193):
        for some in (slice(rows), slice(-rows, None)):
            few = linear(x[some])
            if way == "torch":  # whose sums are in an order that depends on the rows
                assert ((few - whole[some]).abs() <= most[some]).all()
            else:
                assert torch.equal(few, whole[some])


def test_input_of_any_layout_and_type():
    weight = random_weight(24, 40, FLOAT)
    linear = kernels.pack(weight)
    x = random_weight(40, 12, FLOAT, seed=1)
    torch.testing.assert_close(linear(x.T), x.T @ weight.T)
    every_other = random_weight(6, 80, FLOAT, seed=2)[:, ::2]
    torch.testing.assert_close(linear(every_other), every_other @ weight.T)
    batched = random_weight(6, 40, FLOAT, seed=3).view(2, 3, 40)
    torch.testing.assert_close(linear(batched), batched @ weight.T)
    assert linear(batched.bfloat16()).dtype == BFLOAT
    assert linear(batched[0, 0]).shape == (24,)


def test_a_weight_of_any_layout():
    weight, x = random_weight(40, 24, FLOAT).T, random_weight(3, 40, FLOAT)
    torch.testing.assert_close(kernels.pack(weight)(x), x @ weight.T)


def test_float32_that_was_bfloat16_is_kept_as_such_and_nothing_is_lost(way):
    narrow = random_weight(50, 60, BFLOAT)
    assert holds_bfloat16(narrow.float())
    assert not holds_bfloat16(random_weight(50, 60, FLOAT))
    linear, x = kernels.pack(narrow.float()), random_weight(3, 60, FLOAT, seed=1)
    if way == "torch":
        return  # nothing is packed
    assert linear.panels.dtype == BFLOAT
    wide = narrow.float()
    wide[49, 59] += 1e-6  # and so it is no bfloat16 any more
    assert kernels.pack(wide).panels.dtype == FLOAT
    assert torch.equal(linear(x)[:, :49], kernels.pack(wide)(x)[:, :49])


def test_what_cannot_be_packed_or_multiplied_is_told():
    with pytest.raises(ValueError, match="3 dimensions cannot be packed"):
        kernels.pack(torch.zeros(2, 3, 4))
    linear = kernels.pack(torch.zeros(2, 3))
    if isinstance(linear, Linear):
        with pytest.raises(ValueError, match="x has 4 columns; the weight takes 3"):
            linear(torch.zeros(1, 4))


def test_packing_inside_and_outside_of_inference_mode():
    x, weight = random_weight(3, 40, FLOAT), random_weight(24, 40, FLOAT, seed=1)
    with torch.inference_mode():
        inside = kernels.pack(weight)
    for linear in (inside, kernels.pack(weight.requires_grad_())):
        torch.testing.assert_close(linear(x), x @ weight.detach().T)


def test_rms_norm():
    x, added = random_weight(5, 33, FLOAT), random_weight(5, 33, FLOAT, seed=1)
    weight, joined = torch.rand(33), x + added
    exact = joined / (joined.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(kernels.rms_norm(joined.clone(), weight, 1e-5), exact)
    stream = x.clone()
    torch.testing.assert_close(kernels.rms_norm(stream, weight, 1e-5, added), exact)
    assert torch.equal(stream, joined)


def test_silu_mul_of_ordinary_and_of_extreme_numbers():
    gate_up = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)) * 10
    gate_up[0, :5] = torch.tensor([-500.0, 500.0, -88.0, 88.0, 0.0])
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = (gate * torch.sigmoid(gate) * up).float()
    torch.testing.assert_close(kernels.silu_mul(gate_up), exact)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), HEADS)
def test_rotation_and_storage(heads, kv_heads, dim, block_size, dtype):
    generator = torch.Generator().manual_seed(0)
    tokens, blocks = 7, 40
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator)
    angles = torch.randn(tokens, dim // 2, generator=generator)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[3] = -1
    k_cache = torch.zeros(blocks, kv_heads, block_size, dim, dtype=dtype)
    v_cache, rotated = k_cache.clone(), qkv.clone()
    kernels.rotate_and_store(rotated, angles.cos(), angles.sin(), slots, k_cache, v_cache)

    pairs = torch.complex(*qkv[:, :-kv_heads].chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    exact = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotated[:, :-kv_heads], exact)
    assert torch.equal(rotated[:, -kv_heads:], qkv[:, -kv_heads:])
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, place = divmod(slot, block_size)
            key = rotated[token, heads : heads + kv_heads].to(dtype)
            assert torch.equal(k_cache[block, :, place], key)
            assert torch.equal(v_cache[block, :, place], qkv[token, -kv_heads:].to(dtype))
    assert (v_cache != 0).any(dim=(1, 3)).sum() == tokens - 1


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), HEADS)
def test_paged_attention_is_dense_attention(heads, kv_heads, dim, block_size, dtype):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 10 * block_size, 1, block_size, block_size + 1, 37, 2]).int()
    lengths = lengths.clamp(max=10 * block_size)
    caches = [
        torch.randn(40, kv_heads, block_size, dim, generator=generator).to(dtype) for _ in "kv"
    ]
    tables = torch.stack([torch.randperm(40, generator=generator)[:10] for _ in lengths]).int()
    qkv = torch.randn(len(lengths), heads + 3, dim, generator=generator)
    query = qkv[:, :heads]  # rows with a gap between them
    out = kernels.paged_decode_attention(query, *caches, tables, lengths, dim**-0.5)
    assert not out[0].any()
    for token, length in enumerate(lengths.tolist()[1:], start=1):
        keys, values = (
            cache[tables[token].long()].transpose(0, 1).flatten(1, 2)[:, :length].double()
            for cache in caches
        )
        shared = (t.repeat_interleave(heads // kv_heads, 0) for t in (keys, values))
        dense = torch.nn.functional.scaled_dot_product_attention(
            query[token].double()[:, None], *shared, scale=dim**-0.5
        )
        # A score of `dim` products is off by some √dim u, its share of the softmax by as much in
        # relation, and so is the mean of values below 5: 1e-5 in any order of the sums.
        torch.testing.assert_close(out[token], dense[:, 0].float(), rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow():
    query, cache = torch.full((1, 1, 16), 100.0), torch.full((1, 1, 16, 16), 100.0)
    table, length = torch.zeros(1, 1).int(), torch.tensor([16]).int()
    out = kernels.paged_decode_attention(query, cache, cache, table, length, 1.0)
    torch.testing.assert_close(out, torch.full((1, 1, 16), 100.0))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 80), min_size=1, max_size=12), st.integers(0, 2**16))
def test_a_token_attends_the_same_in_every_batch(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    caches = [torch.randn(20, 2, 8, 16, generator=generator) for _ in "kv"]
    tables = torch.randint(0, 20, (len(lengths), 10), generator=generator).int()
    query, held = torch.randn(len(lengths), 4, 16, generator=generator), torch.tensor(lengths).int()
    together = kernels.paged_decode_attention(query, *caches, tables, held, 0.25)
    if kernels.native()[0] is None:
        return
    for i in range(len(lengths)):
        one = slice(i, i + 1)
        alone = kernels.paged_decode_attention(query[one], *caches, tables[one], held[one], 0.25)
        assert torch.equal(alone, together[one])


def test_more_threads_give_the_same():
    linear, x = kernels.pack(random_weight(300, 256, FLOAT)), random_weight(9, 256, FLOAT)
    before, one = torch.get_num_threads(), linear(x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(x), one)
    finally:
        torch.set_num_threads(before)
