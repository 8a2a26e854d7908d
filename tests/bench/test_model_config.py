"""The flags and sizes of the bench's model, and how it starts."""

import argparse
import dataclasses

import pytest
import torch

from distlab import model as bench
from distlab.errors import UsageError
from distlab.model import SIZES, Llama, ModelConfig

GROUPED = ModelConfig(96, 32, 48, 2, 4, 2)


@pytest.fixture
def saved(tmp_path):
    bench.save(Llama(GROUPED), tmp_path / "model")
    return tmp_path / "model"


def test_residual_outputs_start_smaller():
    config = SIZES["smoke"]
    torch.manual_seed(0)
    layer = Llama(config).model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)


@pytest.mark.parametrize(("name", "millions"), [("smoke", 0.1), ("laptop", 3), ("gpu", 350)])
def test_the_sizes_are_what_they_say(name, millions):
    with torch.device("meta"):
        model = Llama(SIZES[name])
    assert bench.num_parameters(model) == bench.num_parameters(SIZES[name])
    assert bench.num_parameters(model) / 1e6 == pytest.approx(millions, rel=0.3)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_building(tied):
    config = dataclasses.replace(GROUPED, tie_word_embeddings=tied, head_dim=16)
    assert bench.num_parameters(config) == bench.num_parameters(Llama(config))


def test_flags_change_a_size():
    config = config_of("--model", "smoke", "--hidden-size", "96", "--heads", "6", "--layers", "3")
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (96, 6, 3)
    assert config.num_attention_heads % config.num_key_value_heads == 0


def test_a_saved_model_is_chosen_by_its_folder(saved):
    args = parse("--model", str(saved))
    assert bench.config_from_args(args) == dataclasses.replace(GROUPED, head_dim=8)
    assert isinstance(bench.model_from_args(args, "cpu"), Llama)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden-size", "100", "--heads", "3"], "--heads 3 does not divide --hidden-size 100"),
        (["--kv-heads", "3"], "--kv-heads 3 does not divide --heads 4; use 1, 2 or 4"),
        (["--heads", "64"], "--heads 64 gives heads of 1 dim"),
        (["--model", "huge"], "--model huge is no model folder and no size; use smoke, laptop"),
    ],
)
def test_a_shape_that_cannot_be_names_the_flag(flags, message):
    with pytest.raises(UsageError) as error:
        config_of("--model", "smoke", *flags)
    assert message in str(error.value)


def test_a_saved_model_cannot_change_its_shape(saved):
    with pytest.raises(UsageError, match="--layers cannot change"):
        config_of("--model", str(saved), "--layers", "5")


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_model_flags(parser)
    return parser.parse_args(flags)


def config_of(*flags: str) -> ModelConfig:
    return bench.config_from_args(parse(*flags))
