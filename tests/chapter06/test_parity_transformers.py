"""Greedy float32 output is that of transformers' generate, token for token, however it is made."""

from pathlib import Path
from typing import Any

import pytest
import torch

from paged_engine import shard
from small_models import (
    Greedy,
    assert_same_greedy,
    greedy_reference,
    load_reference,
    random_prompts,
    runner_of,
    save_random_model,
)

COUNT = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list, list]:
    """A model, its reference, 64 prompts and their expected answers."""
    directory = save_random_model(tmp_path_factory.mktemp("model") / "llama")
    model = load_reference(directory)
    prompts = random_prompts(64, shared=40)
    return directory, model, prompts, [greedy_reference(model, p, COUNT) for p in prompts]


@pytest.fixture(params=["compiled", "plain torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Attention by the compiled kernel, and by gathered blocks."""
    if request.param == "plain torch":
        monkeypatch.setattr(shard.Shard, "_kernel", lambda self: ("gathered blocks", 0))
    elif shard.native()[0] is None:
        pytest.skip(f"no compiled kernels here: {shard.native()[1]}")
    return request.param


def check(small: tuple, requests: int, num_blocks: int, caching: bool, budget: int) -> Greedy:
    directory, model, prompts, expected = small
    runner = runner_of(directory, num_blocks=num_blocks, block_size=8)
    engine = Greedy(runner, num_blocks, caching, budget)
    answers = engine.generate(prompts[:requests], COUNT)
    for prompt, tokens, wanted in zip(prompts, answers, expected, strict=False):
        assert_same_greedy(model, prompt, tokens, wanted)
    return engine


@pytest.mark.parametrize("requests", [1, 2, 7, 64])
def test_batches_of_any_size(small: tuple, kernel: str, requests: int) -> None:
    check(small, requests, num_blocks=1200, caching=False, budget=4096)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("budget", [7, 100])
def test_chunked_prefill(small: tuple, kernel: str, caching: bool, budget: int) -> None:
    engine = check(small, 16, num_blocks=400, caching=caching, budget=budget)
    assert bool(engine.blocks.hits) == caching


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("budget", [40, 2048])
def test_preemption_in_a_cache_far_too_small(
    small: tuple, kernel: str, caching: bool, budget: int
) -> None:
    engine = check(small, 32, num_blocks=20, caching=caching, budget=budget)
    assert engine.scheduler.num_preemptions > 0


def test_answers_to_a_second_round_come_from_the_cache(small: tuple, kernel: str) -> None:
    directory, model, prompts, expected = small
    runner = runner_of(directory, num_blocks=400, block_size=8)
    engine = Greedy(runner, 400, True, 4096)
    engine.generate(prompts[:8], COUNT)
    again = engine.generate(prompts[:8], COUNT)
    assert engine.blocks.hits > sum(len(prompt) - 8 for prompt in prompts[:8])
    for prompt, tokens, wanted in zip(prompts, again, expected, strict=False):
        assert_same_greedy(model, prompt, tokens, wanted)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 8}),
        ("llama", {"head_dim": 6}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_architectures(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    directory = save_random_model(tmp_path / "model", architecture, **changes)
    model, prompts = load_reference(directory), random_prompts(5, shared=70, longest=30)
    runner = runner_of(directory, num_blocks=200, block_size=8)
    for prompt, tokens in zip(
        prompts, Greedy(runner, 200, True, 50).generate(prompts, COUNT), strict=True
    ):
        assert_same_greedy(model, prompt, tokens, greedy_reference(model, prompt, COUNT))


@pytest.mark.slow
def test_smollm2() -> None:
    """The real model: 64 requests, alone and together, in a cache that is too small for all."""
    from transformers import AutoTokenizer

    import smollm2

    directory = smollm2.model_directory(torch.float32)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), load_reference(directory)
    texts = ["The capital of France is", "def fibonacci(n):", "Water boils at"]
    prompts = [tokenizer(text).input_ids for text in texts]
    expected = [greedy_reference(model, prompt, 16) for prompt in prompts]
    runner = runner_of(directory, num_blocks=40, max_model_len=256)
    for requests in (1, 3, 64):
        asked = [i % len(prompts) for i in range(requests)]
        engine = Greedy(runner, 40, requests == 3, 32)
        answers = engine.generate([prompts[i] for i in asked], 16)
        for i, tokens in zip(asked, answers, strict=True):
            assert_same_greedy(model, prompts[i], tokens, expected[i])


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_cuda(small: tuple, compile: bool) -> None:
    """Triton's attention, without and within CUDA graphs, at batch sizes that are padded too."""
    directory, model, prompts, expected = small
    runner = runner_of(directory, num_blocks=400, device="cuda", max_sequences=40, compile=compile)
    assert ("CUDA graphs" in runner.description) == compile
    for requests in (1, 3, 33):
        answers = Greedy(runner, 400, True, 100).generate(prompts[:requests], COUNT)
        for prompt, tokens, wanted in zip(prompts, answers, expected, strict=False):
            assert_same_greedy(model, prompt, tokens, wanted)
