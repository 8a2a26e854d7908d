"""The bench's Llama equals transformers' in both directions, and refuses what it cannot be."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from distlab import model as bench
from distlab.errors import RunError, UsageError
from distlab.model import KVCache, Llama, Llama3Rope, ModelConfig

# Both sides do the same float32 operations; only the order of sums inside kernels may differ.
LOGITS_TOLERANCE = 1e-5

GROUPED = ModelConfig(96, 32, 48, 2, 4, 2)
SHAPES = {
    "grouped, tied": GROUPED,
    "untied": dataclasses.replace(GROUPED, tie_word_embeddings=False),
    "one kv head": dataclasses.replace(GROUPED, num_key_value_heads=1),
    "one kv head per head": dataclasses.replace(GROUPED, num_key_value_heads=4),
    "explicit head_dim": dataclasses.replace(GROUPED, head_dim=16, rope_theta=500000.0),
    "llama3 rope": dataclasses.replace(
        GROUPED, max_position_embeddings=64, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 16)
    ),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


@shapes
def test_transformers_loads_what_we_save(config, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = trained_looking(config)
    bench.save(ours, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == torch.float32
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    tokens = some_tokens(config, 2, 40)
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours(tokens)).abs().max()
    assert difference < LOGITS_TOLERANCE


@shapes
def test_we_load_what_transformers_saves(config, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**bench_fields(config), initializer_range=0.2))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")  # several shards and their index
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ours = bench.load(tmp_path)
    assert ours.config == dataclasses.replace(config, head_dim=config.dim_per_head)
    tokens = some_tokens(config, 2, 40)
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours(tokens)).abs().max()
    assert difference < LOGITS_TOLERANCE


@pytest.mark.slow
def test_a_real_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smollm2 import model_directory

    directory = model_directory()
    ours, theirs = bench.load(directory), AutoModelForCausalLM.from_pretrained(directory)
    assert bench.num_parameters(ours) == pytest.approx(135e6, rel=0.01)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        expected = theirs(tokens).logits
        difference = (expected - ours(tokens)).abs().max()
    # 30 layers and logits of up to 40: float32 rounding grows to a few 1e-5
    assert difference < 1e-5 * expected.abs().max()
    answer = ours.generate(tokens, max_new_tokens=8)[0, tokens.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_tokenizer_is_saved_beside_the_model(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    bench.save(Llama(GROUPED), tmp_path / "model", tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.encode("abb") == [2, 1]
    assert loaded.eos_token == "<|endoftext|>"
    assert AutoConfig.from_pretrained(tmp_path / "model").eos_token_id == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_every_bit(dtype, tmp_path):
    ours = trained_looking(GROUPED).to(dtype)
    bench.save(ours, tmp_path / "model")
    again = bench.load(tmp_path / "model", dtype=dtype)
    assert again.config == dataclasses.replace(GROUPED, head_dim=8)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == str(dtype)[6:]


def test_save_replaces_a_folder_only_when_told(tmp_path):
    target = tmp_path / "model"
    bench.save(Llama(GROUPED), target)
    before = load_file(target / "model.safetensors")
    with pytest.raises(UsageError, match="not empty"):
        bench.save(trained_looking(GROUPED), target)
    after = load_file(target / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    bench.save(trained_looking(GROUPED), target, overwrite=True)
    assert not torch.equal(
        before["model.embed_tokens.weight"],
        load_file(target / "model.safetensors")["model.embed_tokens.weight"],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no scratch folder stays


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.hf_format, "save_file", full_disk)
    with pytest.raises(RunError, match="the disk is full"):
        bench.save(Llama(GROUPED), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path):
    bench.save(Llama(GROUPED), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_cut_file_is_one_line(saved, kept):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(RunError, match="cut short") as error:
        bench.load(saved)
    assert "\n" not in str(error.value)


def test_missing_and_misshapen_tensors_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.norm\.weight is missing"):
        bench.load(saved)
    save_file({**tensors, "model.norm.weight": norm[:3]}, saved / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.norm\.weight is \(3,\)"):
        bench.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(RunError, match="missing"):
        bench.load(saved)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"vocab_size": None}, "vocab_size None"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "no readable"),
    ],
)
def test_another_architecture_is_named(saved, change, named):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(RunError, match=named):
        bench.load(saved)


def test_an_unreadable_config_is_one_line(saved):
    (saved / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(RunError, match="no readable"):
        bench.load(saved)
    shutil.rmtree(saved)
    with pytest.raises(UsageError, match="no model folder"):
        bench.load(saved)


@pytest.mark.parametrize("prefill", [1, 5, 12])
def test_the_cache_changes_no_logits(prefill):
    model, tokens = trained_looking(GROUPED), some_tokens(GROUPED, 2, 12)
    cache = KVCache(GROUPED, batch=2, max_len=12)
    with torch.no_grad():
        parts = [model(tokens[:, :prefill], cache)]
        parts += [model(piece, cache) for piece in tokens[:, prefill:].split(3, dim=1)]
        whole = model(tokens)
    assert cache.length == 12
    assert (torch.cat(parts, dim=1) - whole).abs().max() < LOGITS_TOLERANCE
    with pytest.raises(ValueError, match="holds 12"):
        model(tokens[:, :1], cache)


def test_generation_extends_the_likeliest_way():
    model, tokens = trained_looking(GROUPED), some_tokens(GROUPED, 3, 4)
    with torch.no_grad():
        expected = tokens
        for _ in range(6):
            likeliest = model(expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, likeliest], dim=1)
    assert torch.equal(model.generate(tokens, 6), expected)


def test_sampling_follows_its_generator():
    model, tokens = trained_looking(GROUPED), some_tokens(GROUPED, 1, 4)
    first, second, third = (
        model.generate(tokens, 20, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "loss_chunks"])
def test_saving_memory_changes_no_gradient(switch):
    model, tokens = trained_looking(GROUPED), some_tokens(GROUPED, 2, 16)
    plain = loss_and_gradients(model, tokens)
    setattr(model, switch, 3)
    spared = loss_and_gradients(model, tokens)
    for name, gradient in plain.items():
        # the same sums, in another order over chunks: a few float32 roundings
        torch.testing.assert_close(spared[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_the_loss_is_the_mean_cross_entropy():
    model, tokens = trained_looking(GROUPED), some_tokens(GROUPED, 2, 9)
    logits = model(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_autocast_keeps_the_loss_in_float32():
    model, tokens = trained_looking(GROUPED), some_tokens(GROUPED, 2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16
        loss = model.loss(tokens, tokens)
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits: about 0.4 % a product
    assert loss.item() == pytest.approx(model.loss(tokens, tokens).item(), rel=0.02)


def trained_looking(config: ModelConfig) -> Llama:
    """A model whose weights are large enough for every part to matter in its logits."""
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return model


def some_tokens(config: ModelConfig, batch: int, length: int) -> torch.Tensor:
    return torch.randint(
        config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1)
    )


def bench_fields(config: ModelConfig) -> dict:
    """`config` in the arguments of transformers' own configuration."""
    fields = dataclasses.asdict(config)
    scaling = fields.pop("rope_scaling")
    rope = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
    return {**fields, "rope_parameters": {"rope_theta": fields.pop("rope_theta"), **rope}}


def loss_and_gradients(model: Llama, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}
