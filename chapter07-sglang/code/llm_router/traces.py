"""Conversations that share their beginnings, by Zipf's law: what prefix caches are for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm_router.fake_model import WORDS, Words

SYSTEM_PROMPTS, SYSTEM_TOKENS = 5, 256
USER_TOKENS, ANSWER_TOKENS, MOST_TOKENS = 48, 32, 1280


@dataclass(frozen=True)
class Turn:
    """A request of a conversation: all of it so far, and the answer that will follow."""

    conversation: int
    tokens: list[int]
    answer: list[int]

    @property
    def prompt(self) -> str:
        return " ".join(f"w{token}" for token in self.tokens)


def zipf_trace(requests: int, seed: int, conversations: int = 40) -> list[Turn]:
    """Each request goes on with a conversation drawn by 1 / rank; a new one, below a system prompt
    drawn by 1 / rank, takes the place of one that has become too long."""
    return list(_turns(requests, np.random.default_rng(seed), conversations))


def _turns(requests: int, draw: np.random.Generator, conversations: int) -> Iterator[Turn]:
    def words(count: int) -> list[int]:
        return [int(token) for token in draw.integers(0, WORDS, count)]

    popular, systems_popular = zipf(conversations), zipf(SYSTEM_PROMPTS)
    systems = [words(SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
    so_far: dict[int, list[int]] = {}
    for _ in range(requests):
        which = int(draw.choice(conversations, p=popular))
        tokens = so_far.get(which)
        if tokens is None or len(tokens) + USER_TOKENS + ANSWER_TOKENS > MOST_TOKENS:
            tokens = [*systems[int(draw.choice(SYSTEM_PROMPTS, p=systems_popular))]]
        tokens = [*tokens, *words(USER_TOKENS)]
        following = Words(tokens, None)
        answer = [int(following.next()[2:]) for _ in range(ANSWER_TOKENS)]
        yield Turn(which, tokens, answer)
        so_far[which] = [*tokens, *answer]


def zipf(count: int) -> np.ndarray:
    """Probabilities [count] proportional to 1 / rank."""
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()
