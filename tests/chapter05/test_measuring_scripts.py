"""What the measuring scripts refuse, what they predict, and how operators are found."""

import sys

import pytest

import compare_fsdp_zero
import offload_deepspeed
import profile_deepspeed
import zero_from_scratch
from distlab import predict
from distlab.errors import RunError, UsageError
from zero import engine, operators


@pytest.mark.parametrize(
    ("module", "flags", "told"),
    [
        (compare_fsdp_zero, ["--repeats", "2"], "--repeats 2 gives no median; use 3 or more"),
        (compare_fsdp_zero, ["--links", "fast"], "--links fast"),
        (profile_deepspeed, ["--repeats", "1"], "--repeats 1 gives no median; use 3 or more"),
        (offload_deepspeed, ["--steps", "1"], "--steps 1 leaves nothing to measure"),
        (offload_deepspeed, ["--repeats", "2"], "--repeats 2 gives no median; use 3 or more"),
        (offload_deepspeed, ["--folder", "/proc/none"], "--folder /proc/none"),
    ],
)
def test_bad_input_is_one_line(module, flags, told):
    with pytest.raises(UsageError, match=told):
        module.parse_args(["--preset", "smoke", *flags])


def test_a_batch_that_the_ranks_do_not_divide_is_refused(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--batch-size 12 is not divisible by 5 ranks; use 15"):
        zero_from_scratch.parse_args(["--preset", "smoke"])


@pytest.mark.parametrize(
    ("stage", "ranks", "paper"),  # of 7.5 B parameters, GB: figure 1 of the ZeRO paper
    [(0, 64, 120), (1, 64, 31.4), (2, 64, 16.6), (3, 64, 1.88)],
)
def test_the_formula_gives_the_papers_figure(stage, ranks, paper):
    found = predict.model_state(7.5e9, "mixed", "adamw", stage, ranks).total / 1e9
    assert found == pytest.approx(paper, rel=0.005)


def test_the_recommendation_goes_from_the_fastest_to_what_keeps_less():
    found = {"a": {"state": 4e6}, "b": {"state": 4e6}, "c": {"state": 1e6}}
    told = compare_fsdp_zero.recommended(found, {"a": 0.1, "b": 0.2, "c": 0.3})
    assert told == ("a is the fastest (100 ms); c keeps 1.0 MB instead of 4.0, in 3.00 x the time")


def test_a_ready_operator_is_loaded_without_a_compiler(deepspeed_operators, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(deepspeed_operators))
    monkeypatch.setenv("PATH", "/nonexistent")
    engine.load()
    operators.use(operators.CPU_ADAM, operators.PINNED, operators.ASYNC_IO, flag="--config")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    assert AsyncIOBuilder().load().aio_handle(2**20, 8, False, True, 1).get_block_size() == 2**20
    assert not list(deepspeed_operators.rglob("lock")), sys.path


def test_a_library_that_does_not_load_says_how_to_build_it(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    operators.library("cpu_adam").parent.mkdir()
    operators.library("cpu_adam").write_bytes(b"no library")
    with pytest.raises(RunError, match="does not load here .* env deepspeed builds it anew"):
        operators.use("cpu_adam", flag="--config")
