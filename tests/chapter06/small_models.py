"""Small random models in Hugging Face directories, what transformers makes of them, and the engine.

Their weights are larger than those of a fresh model, so that the likeliest token is far ahead of
the next one: then float32 rounding cannot decide between two.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paged_engine.block_manager import BlockManager
from paged_engine.config import EngineConfig
from paged_engine.request import Request
from paged_engine.runner import ModelRunner
from paged_engine.sampling_params import SamplingParams
from paged_engine.scheduler import Scheduler

VOCABULARY = 97  # no multiple of anything, so that a split vocabulary is uneven
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
NEAR_TIE = 1e-4  # of logits whose size is about 10: rounding in float32 gives some 1e-5


def save_random_model(directory: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A random model of `architecture` (a model_type of transformers), in float32."""
    config = AutoConfig.for_model(architecture, **SIZES | {"tie_word_embeddings": False} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def load_reference(directory: Path) -> Any:
    """transformers' model of a directory."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def greedy_reference(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that transformers' generate puts after `prompt`."""
    made = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # token 0 is no padding
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


def assert_same_greedy(
    model: Any, prompt: Sequence[int], tokens: Sequence[int], expected: Sequence[int]
) -> None:
    """`tokens` are `expected`, up to a place where two logits are equal but for rounding."""
    if list(tokens) == list(expected):
        return
    assert len(tokens) == len(expected)
    at = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *expected[:at]]])).logits[0, -1]
    behind = (logits[expected[at]] - logits[tokens[at]]).item()
    assert abs(behind) < NEAR_TIE, (
        f"token {at} is {tokens[at]}, {behind:.2g} behind transformers' {expected[at]}"
    )
    warnings.warn(f"token {at}: {tokens[at]} and {expected[at]} tie to {behind:.1g}", stacklevel=2)


def random_prompts(count: int, shared: int = 0, longest: int = 60) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens; every other one begins with the same `shared` tokens."""
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (size,), generator=generator).tolist()

    prefix = draw(shared)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [(prefix if i % 2 else []) + draw(length) for i, length in enumerate(lengths)]


def runner_of(directory: Path, **settings: Any) -> ModelRunner:
    return ModelRunner(EngineConfig(directory, **settings))


class Greedy:
    """Scheduler, block manager and runner, and nothing else: the engine for greedy answers."""

    def __init__(
        self, runner: ModelRunner, num_blocks: int, prefix_caching: bool, max_batch_tokens: int
    ) -> None:
        self.runner = runner
        self.blocks = BlockManager(num_blocks, runner.settings.block_size, prefix_caching)
        config = replace(runner.settings, max_batch_tokens=max_batch_tokens, max_sequences=64)
        self.scheduler = Scheduler(config, self.blocks)

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """`count` tokens after each prompt; they arrive in order."""
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        requests = [Request(str(i), p, params, float(i)) for i, p in enumerate(prompts)]
        for request in requests:
            self.scheduler.add(request)
        while not all(request.finished for request in requests):
            batch = self.scheduler.schedule()
            best = self.runner.execute(batch).argmax(-1).tolist()
            pairs = self.scheduler.fork_samples(batch)
            self.scheduler.update(batch, [best[row] for row, _ in pairs])
            self.blocks.check()
        return [request.sequences[0].output_ids for request in requests]
