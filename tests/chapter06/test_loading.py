"""What a model directory may hold, and the one line for what it may not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distlab.errors import RunError, UsageError
from paged_engine.loading import Part, check_split, eos_token_ids, load_weights, read_shape
from small_models import Greedy, greedy_reference, load_reference, runner_of, save_random_model

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_random_model(tmp_path / "model")


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(directory: Path) -> None:
    load_weights(directory, read_shape(directory), torch.float32, CPU)


def refused(error: type[Exception], directory: Path, *words: str) -> None:
    """Loading fails with one line that says all `words`."""
    with pytest.raises(error) as caught:
        load(directory)
    told = str(caught.value)
    assert "\n" not in told
    assert all(word in told for word in words), told


def test_no_model_directory(tmp_path: Path) -> None:
    refused(UsageError, tmp_path, str(tmp_path), "config.json")
    refused(UsageError, tmp_path / "nowhere", "no model directory")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            ["GPT2LMHeadModel", "Llama"],
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["SequenceClassification"]),
        ({"architectures": None, "model_type": "mamba"}, ["mamba"]),
        ({"quantization_config": {"bits": 4}}, ["quantized"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["yarn"]),
        ({"dtype": "float8_e4m3fn"}, ["float8_e4m3fn"]),
        ({"num_key_value_heads": 3}, ["3", "4"]),
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
    ],
    ids=str,
)
def test_unsupported_configurations(directory: Path, changes: dict, words: list[str]) -> None:
    change_config(directory, **changes)
    refused(RunError, directory, "config.json", *words)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"'])
def test_unreadable_configuration(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    refused(RunError, directory, "config.json")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(directory: Path, share: float) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(RunError, directory, "model.safetensors", "cut short")


def test_missing_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refused(RunError, directory, "model.safetensors", "missing")


def test_tensors_that_do_not_fit_the_configuration(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, words in (
        ({name: tensors[name][:-1].contiguous()}, [name, "(79, 48)", "(80, 48)"]),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, ["q_norm", "no place"]),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, ["q_proj.bias", "no place"]),
    ):
        save_file({**tensors, **changed}, path)
        refused(RunError, directory, *words)
    del tensors[name]
    save_file(tensors, path)
    refused(RunError, directory, name, "missing")


def test_parts_are_the_whole(directory: Path) -> None:
    shape = read_shape(directory)
    whole = load_weights(directory, shape, torch.float32, CPU)
    parts = [load_weights(directory, shape, torch.float32, CPU, Part(r, 2)) for r in range(2)]
    heads = torch.cat([part.head for part in parts])
    torch.testing.assert_close(heads[:97], whole.head)
    assert not heads[97:].any()
    x = torch.randn(3, 48)
    for index, layer in enumerate(whole.layers):
        mine = [part.layers[index] for part in parts]
        torch.testing.assert_close(torch.cat([m.down for m in mine], dim=1), layer.down)
        gates = torch.cat([(x @ m.gate_up.T).chunk(2, -1)[0] for m in mine], dim=1)
        torch.testing.assert_close(gates, (x @ layer.gate_up.T).chunk(2, -1)[0])
        q, k, v = (x @ layer.qkv.T).split([64, 32, 32], dim=-1)
        split = [(x @ m.qkv.T).split([32, 16, 16], dim=-1) for m in mine]
        for one, other in zip(zip(*split, strict=True), (q, k, v), strict=True):
            torch.testing.assert_close(torch.cat(one, dim=-1), other)


def test_a_split_that_cannot_be(directory: Path) -> None:
    with pytest.raises(UsageError, match="--tensor-parallel 3 .* use 1 or 2"):
        check_split(read_shape(directory).config, 3)


def test_end_tokens_of_both_files(directory: Path) -> None:
    change_config(directory, eos_token_id=2)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert eos_token_ids(directory) == {2, 5}


def test_a_sliding_window_limits_the_length(tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", "mistral", sliding_window=100)
    assert read_shape(directory).max_length == 100


@pytest.mark.parametrize(
    ("architecture", "fields", "length"),
    [
        ("qwen2", {"sliding_window": 100}, 256),  # off where the file does not switch it on
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, 256),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True}, 100),
        ("qwen3", {"sliding_window": 100}, 256),
        ("mistral", {"sliding_window": None}, 256),
    ],
)
def test_a_window_that_is_not_used_limits_nothing(
    tmp_path: Path, architecture: str, fields: dict, length: int
) -> None:
    directory = save_random_model(tmp_path / "model", architecture)
    change_config(directory, **fields)
    if "use_sliding_window" not in fields:
        config = json.loads((directory / "config.json").read_text())
        config.pop("use_sliding_window", None)
        (directory / "config.json").write_text(json.dumps(config))
    assert read_shape(directory).max_length == length


def test_two_different_matrices_of_a_tied_configuration_are_both_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does, which says it as well."""
    directory = save_random_model(tmp_path / "model")
    change_config(directory, tie_word_embeddings=True)
    prompt = [3, 1, 4, 1, 5]
    expected = greedy_reference(load_reference(directory), prompt, 12)
    runner = runner_of(directory)
    assert "two different ones; both are used" in caplog.text
    (tokens,) = Greedy(runner, 32, False, 64).generate([prompt], 12)
    assert tokens == expected
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    caplog.clear()
    load(directory)  # a copy of the embedding is nothing to tell
    assert not caplog.text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dtype": "int8"}, "--dtype int8"),
        ({"device": "tpu"}, "--device tpu"),
        ({"max_model_len": 257}, "--max-model-len 257 .* 256"),
        ({"num_blocks": 0}, "num_blocks 0"),
        ({"kv_cache_bytes": 10}, "kv_cache_bytes 10 .* 8192"),
        ({"tensor_parallel": 4}, "--tensor-parallel 4"),
    ],
    ids=str,
)
def test_impossible_settings(directory: Path, wrong: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        runner_of(directory, **wrong)
