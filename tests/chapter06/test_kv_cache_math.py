"""The arithmetic of the KV cache by hand, what does not fit, and wrong flags."""

import json

import pytest

import kv_cache_math as kv
from distlab import script
from distlab.catalog import MODELS
from distlab.predict import total_parameters


@pytest.mark.parametrize(
    ("model", "dtype", "gpus", "expected"),
    [
        ("llama-3-8b", "bf16", 1, 2 * 32 * 8 * 128 * 2),
        ("llama-3-8b", "fp8", 1, 2 * 32 * 8 * 128),
        ("llama-3-70b", "bf16", 8, 2 * 80 * 1 * 128 * 2),
        ("llama-3-70b", "bf16", 16, 2 * 80 * 1 * 128 * 2),  # a key-value head is not divided
        ("gpt2", "fp32", 1, 2 * 12 * 12 * 64 * 4),
        ("deepseek-v3", "bf16", 1, 61 * (512 + 64) * 2),
        ("deepseek-v3", "bf16", 8, 61 * (512 + 64) * 2),  # nor is the latent vector
    ],
)
def test_bytes_per_token_by_hand(model, dtype, gpus, expected):
    assert kv.bytes_per_token(MODELS[model].architecture, dtype, gpus) == expected


def test_what_can_be_divided():
    def usable(name):
        a = MODELS[name].architecture
        return [gpus for gpus in range(1, 33) if kv.is_divisible(a, gpus)]

    assert usable("llama-3-8b") == [1, 2, 4, 8, 16, 32]
    assert usable("gpt2") == [1, 2, 3, 4, 6, 12]
    assert usable("smollm2-135m") == [1, 3]  # 9 heads on 3: 9 GPUs would not divide 1,536 columns


def test_a_row_by_hand():
    flags = ["--preset", "smoke", "--gpu", "a100-80gb", "--gpus", "2", "--utilization", "0.5",
             "--context", "1000", "--block-size", "32", "--kv-dtype", "fp8"]  # fmt: skip
    row = kv.count(kv.parse_args([*flags, "--model", "llama-3-8b"]), "llama-3-8b")
    norms = 65 * 4096  # every GPU has them all
    weights = (total_parameters(row.architecture) - norms) / 2 * 2 + norms * 2
    # half of the A100's 79.25 GiB; an engine's room for 256 rows of 128,256 logits at 38 bytes and
    # 2,048 hidden vectors, and 1.4 GiB for kernels and NCCL
    kept = 256 * 128256 * 38 + 2048 * 4096 * 2 + 1.4 * 2**30
    assert row.weights == weights
    assert row.room == pytest.approx(79.25 * 2**30 / 2 - kept - weights)
    assert row.blocks == int(row.room // (32 * 32 * 4 * 2 * 128))
    assert row.sequences == row.blocks // 32  # 1,000 tokens need 32 blocks of 32


def test_the_fewest_gpus_are_found():
    args = kv.parse_args(["--preset", "smoke", "--gpu", "h100"])
    assert {name: kv.count(args, name).gpus for name in ("llama-3-8b", "llama-3-70b")} == {
        "llama-3-8b": 1,
        "llama-3-70b": 4,  # on 2, the weights leave less than 1,024 rows of logits need
    }
    longer = kv.parse_args(["--preset", "smoke", "--gpu", "h100", "--context", "100000"])
    assert kv.count(longer, "llama-3-70b").gpus == 4


def test_what_does_not_fit_is_said():
    args = kv.parse_args(["--preset", "smoke", "--gpu", "l4", "--gpus", "1"])
    assert "GB too large for each GPU" in kv.verdict(args, kv.count(args, "llama-3-70b"))
    flags = ["--gpu", "l4", "--gpus", "1", "--context", "1000000"]
    long = kv.parse_args(["--preset", "smoke", *flags])
    assert "not one sequence of 1,000,000" in kv.verdict(long, kv.count(long, "llama-3-8b"))


def test_the_block_manager_admits_as_many_as_have_blocks():
    assert kv.admitted(10, 16, 33) == 3
    assert kv.admitted(10, 16, 161) == 0


def test_a_smoke_run(tmp_path):
    path = tmp_path / "run.json"
    flags = ["--preset", "smoke", "--gpu", "l4", "--gpus", "1", "--json", str(path)]
    assert kv.main([*flags, "--model", "llama-3-70b", "qwen3-0.6b"]) == 0
    record = json.loads(path.read_text())
    too_large, small = record["tables"]["sequences"]["rows"]
    assert too_large[-3:-1] == [0, 0] and small[-2] > 0
    block = record["comparisons"]["one block, grouped heads, float32"]
    assert block["measured"] == 16 * 2 * 2 * 2 * 16 * 4  # tokens, k and v, layers, heads, dims, b


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "3"], "--gpus 3 cannot divide the heads of llama-3-8b; use one of 1, 2, 4"),
        (["--utilization", "0"], "--utilization 0 leaves no memory"),
        (["--utilization", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--model", "llama-9"], "invalid choice: 'llama-9'"),
        (["--context", "0"], "'0' is not a whole number"),
    ],
)
def test_wrong_flags(capsys, flags, words):
    try:
        status = script.status_of(lambda: kv.main(["--preset", "smoke", *flags]))
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and not printed.out
    assert printed.err.count("\n") == 1 and words in printed.err
