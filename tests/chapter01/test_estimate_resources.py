"""estimate_resources.py as a user runs it: its numbers, its advice, its refusals, its --verify."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import estimate_resources
from distlab import predict, script
from distlab.catalog import MODELS
from distlab.files import repo_root

CODE = repo_root() / "chapter01-introduction" / "code"
MEMORY_KEYS = [
    "weights_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "kv_cache_bytes",
]
LLAMA_8B = 8_030_261_248


@pytest.fixture
def estimate(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[[str], tuple[dict, str]]:
    """Runs a command line; its record and what it printed."""

    def run(command: str) -> tuple[dict, str]:
        file = tmp_path / "record.json"
        status = script.status_of(
            lambda: estimate_resources.main([*command.split(), "--json", str(file)])
        )
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return json.loads(file.read_text()), printed.out

    return run


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    """Runs a command line that must be refused: status 2, one line, no record; that line."""

    def run(command: str) -> str:
        file = tmp_path / "record.json"
        arguments = [*command.split(), "--json", str(file)]
        try:
            status = script.status_of(lambda: estimate_resources.main(arguments))
        except SystemExit as stop:  # argparse's own way out
            status = stop.code
        printed = capsys.readouterr()
        assert status == 2 and printed.err.count("\n") == 1 and not printed.out
        assert not file.exists()
        return printed.err

    return run


def test_training_by_hand(estimate: Callable) -> None:
    record, text = estimate(
        "train --model llama-3-8b --gpu h100 --gpus 8 --zero 1 --seq-len 1024 --micro-batch 2 "
        "--accumulation 4 --mfu 0.5 --usd-per-gpu-hour 3 --tokens 2e12 --reserve-gb 1"
    )
    assert record["weights_bytes"] == 2 * LLAMA_8B
    assert record["gradients_bytes"] == 2 * LLAMA_8B
    assert record["optimizer_bytes"] == 12 * LLAMA_8B / 8
    assert record["kv_cache_bytes"] == 0
    assert record["total_bytes"] == sum(record[key] for key in MEMORY_KEYS)
    # 8 GPUs x 2 sequences x 4 micro-batches x 1024 tokens; 6·7504658432 + 12·32·4096·1024 each
    assert record["tokens_per_step"] == 65536
    flops = 65536 * (6 * 7_504_658_432 + 12 * 32 * 4096 * 1024)
    assert record["flops_per_step"] == flops
    seconds = flops / (8 * 989.4e12 * 0.5)
    assert record["step_seconds"] == pytest.approx(seconds)
    assert record["cost_usd"] == pytest.approx(2e12 / 65536 * seconds / 3600 * 8 * 3)
    assert record["fits"] and "fits, with" in text


def test_fsdp_is_zero_3_and_bubbles_take_time(estimate: Callable) -> None:
    plain, _ = estimate("train --model gpt2 --gpus 4 --zero 3")
    fsdp, _ = estimate("train --model gpt2 --gpus 4 --fsdp")
    assert {key: plain[key] for key in MEMORY_KEYS} == {key: fsdp[key] for key in MEMORY_KEYS}
    assert plain["weights_bytes"] == 2 * 124_439_808 / 4
    piped, _ = estimate("train --model gpt2 --gpus 4 --pp 4 --accumulation 12")
    # the same work on the same GPUs; (4 - 1) / (12 + 4 - 1) of the time is bubble
    work = piped["flops_per_step"] / (4 * 989.4e12 * 0.4)
    assert piped["step_seconds"] == pytest.approx(work / (1 - 3 / 15))
    assert piped["mfu"] == pytest.approx(0.4 * 12 / 15)
    mixed, _ = estimate("train --model gpt2 --gpus 4 --pp 4 --accumulation 12 --virtual-stages 3")
    assert mixed["pipeline_bubble"] == 3 / (3 * 12 + 3)


def test_an_mfu_has_recomputation_and_bubble_in_it(estimate: Callable) -> None:
    """PaLM, appendix B: the model's FLOPs per second over the peak, however they were done."""
    plan = "train --model gpt2 --gpus 4 --pp 4 --accumulation 12 --activation-checkpointing"
    record, text = estimate(f"{plan} --mfu 0.4")
    assert record["step_seconds"] == pytest.approx(record["flops_per_step"] / (4 * 989.4e12 * 0.4))
    assert record["executed_flops_per_step"] > 1.2 * record["flops_per_step"]
    assert record["mfu"] == pytest.approx(0.4) and "(--mfu)" in text


def test_checkpointing_trades_flops_for_memory(estimate: Callable) -> None:
    kept, _ = estimate("train --model llama-3-8b")
    again, _ = estimate("train --model llama-3-8b --activation-checkpointing")
    assert again["activations_bytes"] < kept["activations_bytes"] / 3
    assert again["flops_per_step"] == kept["flops_per_step"]  # model FLOPs, as MFU counts them
    assert 1.2 < again["step_seconds"] / kept["step_seconds"] < 4 / 3


def test_serving_by_hand(estimate: Callable) -> None:
    record, text = estimate(
        "infer --model llama-3-8b --gpu h100 --gpus 4 --tp 2 --batch 16 --context 2048 "
        "--kv-dtype fp8 --target-tokens-per-second 10000 --usd-per-gpu-hour 3 --tokens 1e6"
    )
    table = 128256 * 4096
    assert record["weights_bytes"] == LLAMA_8B + 65 * 4096  # half of 2 bytes; norms are not halved
    assert record["kv_cache_bytes"] == 16 * 2048 * 32768  # 131072 · 1/2 (fp8) · 1/2 (tp)
    assert record["gradients_bytes"] == record["optimizer_bytes"] == 0
    assert record["total_bytes"] == sum(record[key] for key in MEMORY_KEYS)
    moved = (LLAMA_8B - table) + record["kv_cache_bytes"]
    assert record["step_seconds"] == pytest.approx(moved / 3350e9)
    speed = 2 * 16 * 3350e9 / moved  # two replicas
    assert record["tokens_per_second"] == pytest.approx(speed)
    assert record["cost_usd"] == pytest.approx(1e6 / speed / 3600 * 4 * 3)
    assert "10,000 tokens per second need at least 4 GPUs (12.00 USD per hour) at batch 16" in text


@pytest.mark.parametrize(
    "command",
    [
        "train --model llama-3-8b --gpu h100",
        "train --model llama-3-70b --gpu a100-80gb --gpus 16 --micro-batch 4",
        "train --model deepseek-v3 --gpu b200 --gpus 64",
        "train --model gpt2 --gpu l4 --micro-batch 32 --precision fp32",
        "infer --model llama-3-70b --gpu rtx-4090 --gpus 2 --batch 64",
        "infer --model qwen3-32b --gpu l4 --context 32768",
    ],
)
def test_what_is_suggested_fits(estimate: Callable, command: str) -> None:
    """The flags that are printed are tried: with them the program itself says that it fits."""
    record, text = estimate(command)
    assert not record["fits"] and "does not fit" in text and record["suggestions"]
    for suggestion in record["suggestions"]:
        assert f"use {suggestion['flags']}: total would be" in text
        changed, _ = estimate(with_flags(command, suggestion["flags"]))
        assert changed["fits"]
        assert changed["total_bytes"] == suggestion["total_bytes"]


def with_flags(command: str, flags: str) -> str:
    """The command with its flags replaced by those of the same name."""
    words, new = command.split(), flags.split()
    for flag in [word for word in new if word.startswith("--") and word in words]:
        position = words.index(flag)
        del words[position : position + 2]
    return " ".join(words + new)


def test_more_gpus_are_suggested_only_when_nothing_else_helps(estimate: Callable) -> None:
    record, _ = estimate("train --model llama-3-8b --gpus 8 --gpu h100")
    assert all("--gpus" not in suggestion["flags"] for suggestion in record["suggestions"])
    record, _ = estimate("train --model llama-3-8b --gpus 1 --gpu h100")
    assert all("--gpus 2" in suggestion["flags"] for suggestion in record["suggestions"])


def test_a_hopeless_plan_says_so(estimate: Callable) -> None:
    record, text = estimate("infer --model llama-3-405b --gpu l4 --context 100000000")
    assert record["suggestions"] == [] and "no change that was tried makes it fit" in text


def test_a_gpu_of_numbers(estimate: Callable) -> None:
    flags = "--gpu-memory-gb 48 --gpu-tflops 100 --gpu-bandwidth-gbs 1000"
    record, _ = estimate(f"train --model gpt2 --mfu 0.5 {flags}")
    assert record["capacity_bytes"] == 48e9
    assert record["step_seconds"] == pytest.approx(record["flops_per_step"] / (100e12 * 0.5))
    record, _ = estimate("train --model gpt2 --gpu h100 --gpu-memory-gb 94")
    assert record["capacity_bytes"] == 94e9


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_is_estimated(estimate: Callable, name: str) -> None:
    record, _ = estimate(f"train --model {name} --gpus 64 --fsdp --gpu b200")
    assert record["parameters"] == predict.total_parameters(MODELS[name].architecture)
    record, _ = estimate(f"infer --model {name} --gpu b200")
    assert record["active_parameters"] == predict.active_parameters(MODELS[name].architecture)


def test_a_config_file_or_its_folder(estimate: Callable, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    from_file, _ = estimate(f"train --config {tmp_path / 'config.json'}")
    from_folder, _ = estimate(f"train --config {tmp_path}")
    # 2·512·64 + 2·(4·64·64 + 3·64·176 + 2·64) + 64
    assert from_file["parameters"] == from_folder["parameters"] == 166_208


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "say what to estimate: train or infer, or use --verify"),
        ("--tp 2 --verify", "--tp needs train or infer before it"),
        ("--verify --model gpt2", "--model needs train or infer before it"),
        ("trian", "invalid choice: 'trian'"),
        ("train --model llama-4", "invalid choice: 'llama-4'"),
        ("train --gpu tpu", "invalid choice: 'tpu'"),
        ("train --tp 3", "--tp 3 does not divide 32 heads; use 1, 2, 4 or 8"),
        ("train --tp 16", "--tp 16 does not divide 8 key-value heads; use 1, 2, 4 or 8"),
        ("infer --tp 3", "--tp 3 does not divide 32 heads"),
        ("train --pp 33 --gpus 33", "--pp 33 is more than the model's 32 layers"),
        ("train --gpus 8 --tp 4 --pp 4", "--gpus 8 is no multiple of --tp 4 x --pp 4 = 16"),
        ("train --fsdp --zero 2", "not allowed with argument"),
        ("train --zero 4", "invalid choice: 4"),
        ("train --gpus 0", "at least 1"),
        ("train --mfu 0", "--mfu 0 would never finish"),
        ("train --mfu 40", "'40' is not a number from 0 to 1"),
        ("train --mfu 0.4 --efficiency 0.5", "not allowed with argument --mfu"),
        ("infer --efficiency 0.5", "--efficiency is for train, not for infer"),
        ("train --virtual-stages 2", "--virtual-stages 2 needs a pipeline; use --pp 2 or more"),
        ("train --gpus 4 --pp 4 --virtual-stages 2 --accumulation 6", "no multiple of --pp 4"),
        ("train --gpus 8 --cp 8 --seq-len 1000", "--seq-len 1000 is no multiple of 2 x --cp 8"),
        ("train --gpus 8 --cp 3", "no multiple of --tp 1 x --pp 1 x --cp 3 = 3"),
        ("train --gpus 2 --ep 2", "--ep 2 does not divide 1 experts"),
        ("train --sequence-parallel", "--sequence-parallel divides over --tp, which is 1"),
        ("train --gpus 8 --replicate 3", "--replicate 3 does not divide 8 ranks"),
        ("train --offload all", "--offload all is about sharded weights; add --fsdp"),
        ("train --no-reshard-after-forward", "is about sharded weights; add --fsdp"),
        ("train --activation-checkpointing some", "invalid choice: 'some'"),
        ("infer --gpu-memory-utilization 0", "leaves an engine nothing"),
        ("infer --gpu-memory-utilization 90", "'90' is not a number from 0 to 1"),
        ("train --max-num-seqs 4", "--max-num-seqs is for infer, not for train"),
        ("train --precision fp8", "--precision fp8 is not for train; use fp32, tf32"),
        ("infer --precision mixed", "--precision mixed is not for infer; use fp32, bf16"),
        ("infer --optimizer sgd", "--optimizer is for train, not for infer"),
        ("train --batch 4", "--batch is for infer, not for train"),
        ("train --model gpt2 --seq-len 2048", "more than the model's 1024 learned positions"),
        ("train --gpu-memory-gb 48", "add --gpu-tflops and --gpu-bandwidth-gbs"),
        ("train --config nowhere.json", "--config nowhere.json cannot be read"),
        ("train --config x --model gpt2", "not allowed with argument"),
    ],
)
def test_mistakes_are_refused(refusal: Callable, command: str, words: str) -> None:
    assert words in refusal(command)


def test_weights_of_mixed_types(estimate: Callable, tmp_path: Path) -> None:
    """A checkpoint's own types; then its files' size, where they are there; then --precision."""
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": 32,
            "modules_to_not_convert": ["model.layers.1.mlp"],
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    # 2 layers of attention, 4·64·64, and one MLP, 3·64·176, at 4 bits and 20 for 32 elements
    narrow = 2 * 16384 + 33792
    typed, _ = estimate(f"infer --config {tmp_path}")
    assert typed["weights_bytes"] == narrow * (4 + 20 / 32) / 8 + 2 * (166_208 - narrow)
    index = {"metadata": {"total_size": 300_000}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    measured, text = estimate(f"infer --config {tmp_path}")
    assert measured["weights_bytes"] == pytest.approx(300_000)
    assert f"weights of {8 * 300_000 / 166_208:.3g} bits" in text
    named, _ = estimate(f"infer --config {tmp_path} --precision bf16")
    assert named["weights_bytes"] == 2 * 166_208


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "holds no JSON object"),
        (b'{"model_type": "mamba"}', "model type 'mamba' is not known; known are"),
        (b'{"model_type": "llama", "hidden_size": -1}', "hidden_size is -1"),
        (b'{"model_type": "gpt2", "n_embd": 0}', "n_embd is 0"),
    ],
)
def test_configs_that_are_none(
    refusal: Callable, tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    assert words in refusal(f"train --config {file}")


def test_tp_must_divide_the_heads_of_a_config(refusal: Callable, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176,
        "num_hidden_layers": 2, "num_attention_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refusal(f"train --config {tmp_path} --tp 3 --gpus 3")
    assert error == "error: --tp 3 does not divide 8 heads; use 1, 2, 4 or 8\n"


def test_verify_holds_on_this_machine(tmp_path: Path) -> None:
    """As a process, as a user runs it: memory within the issue's 1 and 15 %, FLOPs within 3 %."""
    record = tmp_path / "verify.json"
    command = [CODE / "estimate_resources.py", "--verify", "--preset", "smoke", "--json", record]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(record.read_text())["checks"]
    names = " ".join(check["name"] for check in checks)
    for quantity in ("model state", "saved activations", "peak activations", "FLOPs per step"):
        assert quantity in names
    assert all(check["ok"] for check in checks)
    comparisons = json.loads(record.read_text())["comparisons"]
    # what is saved for backward is known to the byte but for norm weights that autocast copies
    assert abs(comparisons["saved activations, worst case"]["error"]) < 0.01
