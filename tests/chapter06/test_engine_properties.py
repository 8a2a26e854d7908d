"""Greedy output is the same however the engine got there: real model, real cache, any traffic."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fake_engine import random_model
from paged_engine.engine import Engine, EngineConfig
from paged_engine.sampling_params import SamplingParams

LONGEST = 24
ENDS = 0
PREFIXES = ([], [7, 7, 7, 7, 7, 7, 7, 7], [9, 3, 4, 5, 6])


@dataclass
class Traffic:
    """A request: its prompt, and when (in steps) it comes and, perhaps, leaves."""

    prefix: int
    tail: list[int]
    max_tokens: int
    arrives: int
    leaves: int | None
    n: int

    @property
    def prompt(self):
        return [*PREFIXES[self.prefix], *self.tail]


traffic = st.builds(
    Traffic,
    prefix=st.integers(0, len(PREFIXES) - 1),
    tail=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    max_tokens=st.integers(1, 10),
    arrives=st.integers(0, 12),
    leaves=st.none() | st.none() | st.integers(0, 15),
    n=st.sampled_from([1, 1, 2, 3]),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose outputs vary, its directory, and the texts that it has continued."""
    directory = tmp_path_factory.mktemp("model") / "random"
    return random_model(directory), directory, {}


def continuation(model, prompt):
    """The tokens by a dense model without any cache of blocks."""
    llama, _, known = model
    key = tuple(prompt)
    if key not in known:
        found = llama.generate(torch.tensor([prompt]), LONGEST)[0, len(prompt) :].tolist()
        known[key] = found[: found.index(ENDS) + 1] if ENDS in found else found
    return known[key]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    requests=st.lists(traffic, min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 4, 16]),
    spare_blocks=st.sampled_from([0, 1, 5, 60]),
    max_batch_tokens=st.sampled_from([1, 3, 8, 64]),
    max_sequences=st.integers(3, 8),
    prefix_caching=st.booleans(),
    prefix_cache=st.sampled_from(["hash", "radix"]),
)
@example([Traffic(1, [5, 6], 10, i % 2, None, 3) for i in range(5)], 3, 0, 8, 6, True, "hash")
@example([Traffic(1, [5, 6], 10, i % 2, None, 1) for i in range(5)], 4, 0, 64, 6, False, "hash")
def test_greedy_output_is_the_same_however_the_engine_got_there(
    model, requests, block_size, spare_blocks, max_batch_tokens, max_sequences, prefix_caching,
    prefix_cache,
):  # fmt: skip
    longest = max(len(one.prompt) + one.max_tokens for one in requests)
    config = EngineConfig(
        model[1],
        block_size=block_size,
        num_blocks=-(-longest // block_size) + spare_blocks,  # 0 spare: one sequence at a time
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        prefix_caching=prefix_caching,
        prefix_cache=prefix_cache,
        max_model_len=64,
    )
    with Engine(config) as engine:
        tokens, reasons = run(engine, requests)
        assert engine.stats().num_running == engine.stats().num_waiting == 0
        assert engine.blocks.num_free == engine.blocks.num_blocks
    for number, one in enumerate(requests):
        expected = continuation(model, one.prompt)[: one.max_tokens]
        for index in range(one.n):
            found, reason = tokens[number, index], reasons.get((number, index))
            if reason is None:
                assert one.leaves is not None and found == expected[: len(found)]
            else:
                ended = ENDS in expected
                assert (found, reason) == (expected, "stop" if ended else "length")


def run(engine, requests):
    """Play the traffic, checking the invariants before each step; tokens and reasons by sample."""
    tokens = {(i, index): [] for i, one in enumerate(requests) for index in range(one.n)}
    reasons = {}
    for step in range(1000):
        for number, one in enumerate(requests):
            if one.arrives == step:
                params = SamplingParams(temperature=0, max_tokens=one.max_tokens, n=one.n)
                engine.add_request(one.prompt, params, str(number))
            if one.leaves is not None and one.arrives + one.leaves == step:
                engine.cancel(str(number))
        engine.scheduler.check()
        if not engine.has_work and step > 30:
            return tokens, reasons
        for output in engine.step():
            key = int(output.request_id), output.index
            assert key not in reasons, "a token after the end"
            tokens[key] += output.token_ids
            if output.finish_reason:
                reasons[key] = output.finish_reason
    raise AssertionError("a request starves")
