"""The paged kernel against dense attention on any lengths, what it must not see, wrong flags."""

import json
from argparse import Namespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paged_attention as paged
from distlab import script

ARGS = Namespace(heads=4, kv_heads=2, head_dim=8, seed=3, device="cpu", block_size=4)


def test_slots_by_hand():
    table = torch.tensor([7, 0, 5])
    places = paged.slots(table, torch.tensor([0, 3, 4, 11]), block_size=4)
    assert places.tolist() == [28, 31, 0, 23]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    block_size=st.integers(1, 9),
    blocks_at_once=st.integers(1, 12),
    new=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_paged_equals_dense(lengths, block_size, blocks_at_once, new, kv_heads):
    args = Namespace(**{**vars(ARGS), "kv_heads": kv_heads})
    batch = paged.filled(args, [length + new - 1 for length in lengths], block_size, new=new)
    pool = paged.store(args, batch, block_size)
    attended = attend(batch, pool, blocks_at_once)
    torch.testing.assert_close(attended, paged.dense(batch), atol=1e-5, rtol=1e-5)


def attend(batch, pool, blocks_at_once=1):
    return paged.paged_attention(batch.queries, pool, batch.tables, batch.starts, blocks_at_once)


@pytest.fixture
def stored():
    batch = paged.filled(ARGS, [10, 5], 4)
    return batch, paged.store(ARGS, batch, 4)


def test_what_lies_behind_the_end_is_not_seen(stored):
    batch, pool = stored
    before = attend(batch, pool, 3)
    behind = paged.slots(batch.tables[0], torch.tensor([10, 11]), 4)
    for values in (-1e4, 0.0, 3e38):
        pool.write(behind, *(torch.full((2, 2, 8), values) for _ in range(2)))
        assert torch.equal(attend(batch, pool, 3), before)


def test_but_it_must_be_finite(stored):
    batch, pool = stored
    pool.values.flatten(1, 2)[:, paged.slots(batch.tables[0], torch.tensor([11]), 4)] = torch.nan
    attended = attend(batch, pool)
    assert attended[0].isnan().all() and attended[1].isfinite().all()


def test_every_token_up_to_the_end_is_seen(stored):
    batch, pool = stored
    before = attend(batch, pool)
    for position in range(10):
        place = paged.slots(batch.tables[0], torch.tensor([position]), 4)
        keys, values = (each.clone() for each in (pool.keys, pool.values))
        changed = paged.Pool(keys, values)
        changed.write(place, *(torch.ones(1, 2, 8) for _ in range(2)))
        assert not torch.allclose(attend(batch, changed)[0], before[0], atol=1e-6)


def test_a_wrong_block_is_noticed(stored):
    batch, pool = stored
    batch.tables[0, 0] = batch.tables[1, 0]
    assert not torch.allclose(attend(batch, pool), paged.dense(batch), atol=1e-2)


@pytest.mark.parametrize("blocks_at_once", [1, 2])
def test_gathered_bytes_by_hand(stored, blocks_at_once):
    batch, pool = stored
    read = paged.gathered_bytes(lambda: attend(batch, pool, blocks_at_once))
    blocks = 3 + 2  # 10 tokens in blocks of 4, and 5
    assert read == blocks * 4 * 2 * 2 * 8 * 4  # tokens, keys and values, heads, dims, bytes


def test_the_padded_step_is_dense_attention(stored):
    batch, _ = stored
    torch.testing.assert_close(batch.padded_step()(), paged.dense(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--block-size", "5", "--dtype", "bfloat16"]])
def test_a_smoke_run(tmp_path, flags):
    path = tmp_path / "run.json"
    flags = ["--preset", "smoke", "--device", "cpu", "--json", str(path), *flags]
    assert paged.main(flags) == 0
    record = json.loads(path.read_text())
    equal, mixed = record["tables"]["times"]["rows"]
    assert equal[3] == 1.0 and mixed[3] == mixed[1] / mixed[2] > 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kv-heads", "3"], "--kv-heads 3 does not divide --heads 4; use"),
        (["--repeats", "2"], "--repeats 2 gives no median"),
        (["--device", "cuda"], "--device cuda needs a GPU"),
        (["--block-size", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_wrong_flags(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(paged.hardware, "has_cuda", lambda: False)
    try:
        status = script.status_of(lambda: paged.main(["--preset", "smoke", *flags]))
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and not printed.out
    assert printed.err.count("\n") == 1 and words in printed.err
