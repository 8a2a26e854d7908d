"""The runner: its rows of logits, its memory, its copies, its narrow types."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from paged_engine.attention import CacheShape, PagedCache, Planner, Span
from paged_engine.batch import Batch, Chunk
from paged_engine.kernels import operators
from paged_engine.paged_model import StepInputs
from paged_engine.request import Request, Sequence
from paged_engine.sampling_params import SamplingParams
from paged_engine.shard import DecodeGraphs
from small_models import load_reference, random_prompts, runner_of, save_random_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model") / "llama")


def sequence(tokens: list[int], blocks: list[int]) -> Sequence:
    made = Request("a", tokens, SamplingParams()).sequences[0]
    made.block_table = blocks
    return made


def test_rows_are_those_of_the_chunks_that_sample(directory: Path) -> None:
    runner = runner_of(directory, num_blocks=40, block_size=8)
    model = load_reference(directory)
    prompts = [prompt[:20] for prompt in random_prompts(3, shared=30)]
    longest = prompts[1] * 5
    first, second = sequence(prompts[0], [3, 9, 1]), sequence(longest, [*range(10, 40)])
    third = sequence(prompts[2], [5, 6, 7])
    earlier = Batch([Chunk.of(first, 0, len(prompts[0]) - 1)])
    assert runner.execute(earlier).shape == (0, 97)
    batch = Batch(
        [
            Chunk.of(second, 0, len(longest)),
            Chunk.of(third, 0, 2),
            Chunk.of(first, len(prompts[0]) - 1, 1),
        ]
    )
    logits = runner.execute(batch)
    assert logits.shape == (2, 97)
    assert logits.dtype == torch.float32
    for row, tokens in zip(logits, (longest, prompts[0]), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_copies_come_before_the_chunks(directory: Path) -> None:
    runner = runner_of(directory, num_blocks=8, block_size=8)
    tokens = [5, 1, 4, 2, 3, 9, 7]
    runner.execute(Batch([Chunk.of(sequence(tokens, [2]), 0, 6)]))
    last = [Chunk.of(sequence(tokens, [block]), 6, 1) for block in (2, 5)]
    wanted = runner.execute(Batch(last[:1]))
    copied = runner.execute(Batch(last[1:], copies=[(2, 5)]))
    torch.testing.assert_close(copied, wanted)


def test_copies_in_order() -> None:
    cache = PagedCache(CacheShape(2, 4, 1, 2, 3), torch.float32, CPU)
    for block in range(4):
        cache.data[:, :, block] = block
    cache.copy([(0, 1), (1, 2)])
    assert cache.data[0, 0, :4, 0, 0, 0].tolist() == [0, 0, 0, 3]
    cache.copy([(3, 0), (2, 1)])
    assert cache.data[1, 1, :4, 0, 1, 2].tolist() == [3, 0, 0, 3]


@pytest.mark.parametrize("kernel_chunk", [0, 1, 16])
def test_attention_equals_dense_attention(kernel_chunk: int) -> None:
    """Decodes, chunks with and without context, of odd lengths, over scattered blocks."""
    kv_heads, group, dim, size = 2, 3, 16, 4
    cache = PagedCache(CacheShape(1, 60, kv_heads, size, dim), torch.float32, CPU)
    planner = Planner(cache.shape, torch.float32, CPU, kernel_chunk)
    spans = [(0, 5), (17, 1), (0, 1), (9, 20), (0, 5), (40, 1), (3, 4), (0, 33)]
    free = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[free.pop() for _ in range(-(-(s + n) // size))] for s, n in spans]
    past = [torch.randn(s + n, kv_heads * (group + 2), dim) for s, n in spans]
    for (start, _), table, qkv in zip(spans, tables, past, strict=True):
        for at in range(start):
            where = table[at // size], slice(None), at % size
            cache.keys[0][where] = qkv[at, -2 * kv_heads : -kv_heads]
            cache.values[0][where] = qkv[at, -kv_heads:]
    made = [Span(s, n, table) for (s, n), table in zip(spans, tables, strict=True)]
    order = planner.order(made)
    ordered = [made[i] for i in order]
    plan = planner.plan(ordered, torch.tensor(planner.slots(ordered)))
    qkv = torch.cat([past[i][spans[i][0] :] for i in order])
    rows = cache.data.shape[2] * size
    for part, new in ((0, qkv[:, -2 * kv_heads : -kv_heads]), (1, qkv[:, -kv_heads:])):
        whole = cache.data[0, part].transpose(1, 2).reshape(rows, kv_heads, dim)
        whole[plan.slots] = new
        cache.data[0, part] = whole.view(-1, size, kv_heads, dim).transpose(1, 2)
    out = cache.attend(0, qkv, plan).split([spans[i][1] for i in order])
    for i, mine in zip(order, out, strict=True):
        start, length = spans[i]
        q, k, v = past[i].transpose(0, 1).split([kv_heads * group, kv_heads, kv_heads])
        seen = torch.ones(length, start + length, dtype=torch.bool).tril(start)
        dense = torch.nn.functional.scaled_dot_product_attention(
            q[None, :, start:], k[None], v[None], attn_mask=seen, enable_gqa=True
        )
        torch.testing.assert_close(mine, dense[0].transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)


def test_the_operators_of_cuda_are_those_of_the_cpu() -> None:
    """The same functions that torch.compile gets there, run here as they are."""
    cpu, cuda = operators(CPU, False), operators(torch.device("cuda"), False)
    x, added, weight = torch.randn(3, 5, 48).unbind()
    twins = x.clone(), x.clone()
    norms = [o.rms_norm(t, weight[0], 1e-5, added) for o, t in zip((cpu, cuda), twins, strict=True)]
    torch.testing.assert_close(*twins)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(cpu.silu_mul(x), cuda.silu_mul(x))
    qkv, caches = torch.randn(5, 3 + 2 * 2, 16), torch.zeros(2, 2, 9, 2, 4, 16)
    angles = torch.randn(5, 8)
    slots = torch.tensor([0, 7, 35, 2, 9])
    turned = qkv.clone(), qkv.clone()
    for made, heads, cache in zip((cpu, cuda), turned, caches, strict=True):
        made.rotate_and_store(heads, angles.cos(), angles.sin(), slots, *cache)
    torch.testing.assert_close(*turned)
    torch.testing.assert_close(*caches)


class RunAgain:
    """Stands in for a CUDA graph: runs anew what was called while it was open, in its place."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        for model, inputs, out in self.calls:
            out.copy_(model(inputs))


def test_graphs_of_decodes_on_a_stand_in(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches at fixed addresses give the logits, and leave the cache, of plain steps."""
    open_graphs: list[RunAgain] = []

    @contextlib.contextmanager
    def recording(graph: RunAgain, pool: None) -> Iterator[None]:
        open_graphs.append(graph)
        yield
        open_graphs.pop()

    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RunAgain)
    monkeypatch.setattr(torch.cuda, "graph", recording)

    made = enumerate(random_prompts(6, longest=38))
    prompts = [(sequence(p, [*range(5 * i, 5 * i + 5)]), len(p) - 1) for i, p in made]
    plain, graphed = (runner_of(directory, num_blocks=40, block_size=8) for _ in range(2))
    for runner in (plain, graphed):
        runner.execute(Batch([Chunk.of(s, 0, last) for s, last in prompts]))
    shard = graphed.shard
    model, shard.model = shard.model, MagicMock()

    def recorded(inputs: StepInputs) -> torch.Tensor:
        out = model(inputs).clone()  # which a replay may write to
        for graph in open_graphs:
            graph.calls.append((model, inputs, out))
        return out

    shard.graphs = DecodeGraphs(recorded, shard.cache.shape, CPU, most=6, most_blocks=5)
    for count in (1, 3, 6, 5, 2):  # by the graphs of 1, 4, 6, 6 and 2
        decodes = [Chunk.of(s, last, 1) for s, last in prompts[:count]]
        wanted = plain.execute(Batch(decodes))
        torch.testing.assert_close(graphed.execute(Batch(decodes)), wanted)
    shard.model.assert_not_called()
    kept = slice(0, 40)  # the scratch block is behind
    torch.testing.assert_close(shard.cache.data[:, :, kept], plain.shard.cache.data[:, :, kept])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_near_float32(directory: Path, dtype: str) -> None:
    tokens = random_prompts(2, shared=50)[1]
    rows = []
    for asked in ("float32", dtype):
        runner = runner_of(directory, dtype=asked, num_blocks=30, block_size=8)
        table = list(range(20))
        last = len(tokens) - 1
        runner.execute(Batch([Chunk.of(sequence(tokens, table), 0, last)]))
        rows.append(runner.execute(Batch([Chunk.of(sequence(tokens, table), last, 1)])))
    wide, narrow = rows
    assert not torch.equal(wide, narrow)
    assert (wide - narrow).norm() < 0.05 * wide.norm()


def test_sizes(directory: Path) -> None:
    runner = runner_of(directory, kv_cache_bytes=100_000, block_size=8)
    # keys and values of 2 layers, 2 heads of 16 numbers, 8 tokens, 4 bytes
    assert runner.block_bytes == 2 * 2 * 2 * 16 * 8 * 4
    assert runner.num_blocks == 100_000 // runner.block_bytes
    allocated = runner.shard.cache.data.nbytes
    assert allocated == (runner.num_blocks + 1) * runner.block_bytes
    assert runner.max_model_len == 256
    runner = runner_of(directory, max_model_len=100, max_sequences=3)
    assert runner.num_blocks == 3 * 7  # all that 3 sequences of 100 tokens need, and no more
    assert "float32" in runner.description


def test_batches_survive_their_journey() -> None:
    chunks = [Chunk(4, [5, 6], [7, 1], True), Chunk(0, [9], [3], False)]
    batch = Batch(chunks, copies=[(1, 2)])
    assert Batch.from_bytes(batch.to_bytes()) == batch
    assert Batch.from_bytes(Batch().to_bytes()) == Batch()
