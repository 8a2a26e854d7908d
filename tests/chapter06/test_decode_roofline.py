"""A decode step against its bound: the bytes that the bound counts, and what the script leaves."""

import json

import pytest
import torch

import decode_roofline
from distlab.errors import UsageError
from distlab.model import Llama
from inference.roofline import decode_bytes
from paged_engine.engine import Engine

SMALL = ["--preset", "smoke", "--batches", "1", "3", "--steps", "4"]


def test_a_steps_bytes_are_those_of_the_matrices_and_the_cache():
    args = decode_roofline.parse_args(["--preset", "laptop"])
    config = decode_roofline.model_config(args)
    with torch.device("meta"):
        model = Llama(config)
    matrices = sum(4 * p.numel() for p in model.parameters() if p.dim() == 2)  # tied: head read
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * 64 * 4
    assert decode_bytes(config, args.dtype, 5, 100) == pytest.approx(matrices + 5 * 100 * cache)


def test_a_trace_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    trace = str(tmp_path / "file" / "trace.json")
    with pytest.raises(UsageError, match=f"--trace {trace} cannot be written: File exists"):
        decode_roofline.parse_args([*SMALL, "--trace", trace])


def test_all_sequences_decode_and_nothing_is_left_behind(tmp_path):
    args = decode_roofline.parse_args(SMALL)
    folder = tmp_path / "model"
    decode_roofline.make_model(decode_roofline.model_config(args), args, folder)
    with Engine(decode_roofline.engine_config(folder, args)) as engine:
        with decode_roofline.decoding(engine, 3, args):
            lengths = [len(engine.step()) for _ in range(args.steps)]
        assert lengths == [3] * args.steps
        assert not engine.has_work and engine.stats().num_preemptions == 0
        assert engine.blocks.num_free == engine.blocks.num_blocks


def test_the_script_bounds_every_batch_and_writes_a_trace(tmp_path):
    trace, record = tmp_path / "new" / "trace.json", tmp_path / "record.json"
    assert decode_roofline.main([*SMALL, "--trace", str(trace), "--json", str(record)]) == 0
    made = json.loads(record.read_text())
    assert [row[0] for row in made["tables"]["decode"]["rows"]] == [1, 3]
    shares = [row[3] for row in made["tables"]["operators"]["rows"]]
    assert sum(shares) == pytest.approx(100, abs=40)  # the operators that are shown, and the rest
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--hidden", "100"], "--hidden 100 is no multiple of 64; use 256"),
        (["--steps", "2"], "--steps 2 gives no median; use at least 3"),
    ],
)
def test_what_cannot_be_is_one_line(flags, told):
    with pytest.raises(UsageError, match=told):
        decode_roofline.parse_args(flags)
