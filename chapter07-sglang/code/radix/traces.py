"""Requests whose beginnings repeat, as three kinds of users send them, and what a cache can save.

A trace is a list of prompts with their answers, as token ids, in the order in which they come. Each
says beforehand how many of its tokens a cache without limits would have, matched in pages of
`page` tokens: of a prompt its last token is always computed, since its logits are wanted.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import count

import numpy as np

from distlab.errors import UsageError
from paged_engine.block_manager import BlockManager
from paged_engine.request import Request, Sequence
from paged_engine.sampling_params import SamplingParams

VOCABULARY = 30_000
Pair = tuple[list[int], list[int]]  # a prompt and its answer


@dataclass(frozen=True)
class Trace:
    """`hits(page)`: predicted tokens of all prompts that are cached, by arithmetic."""

    name: str
    pairs: list[Pair]
    hits: Callable[[int], int]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt, _ in self.pairs)


def few_shot(requests: int, shots: int, question: int, answer: int, seed: int = 0) -> Trace:
    """The same examples before each question: all but the first find `shots` tokens."""
    draw = _tokens(seed)
    examples = draw(shots)
    pairs = [([*examples, *draw(question)], draw(answer)) for _ in range(requests)]
    return Trace("few-shot", pairs, lambda page: (requests - 1) * (shots // page * page))


def chat(users: int, turns: int, system: int, message: int, answer: int, seed: int = 0) -> Trace:
    """Conversations side by side, a turn of each in turn, below one system prompt.

    A turn finds all of the turn before but its answer's last token, of which nobody has needed the
    key and value; the first turns find the system prompt, but for the very first.
    """
    draw = _tokens(seed)
    histories = [draw(system)] * users
    pairs = []
    for _ in range(turns):
        for user in range(users):
            prompt = [*histories[user], *draw(message)]
            said = draw(answer)
            pairs.append((prompt, said))
            histories[user] = prompt + said

    def hits(page: int) -> int:
        whole = [system + turn * (message + answer) - 1 for turn in range(1, turns)]
        return (users - 1) * (system // page * page) + users * sum(
            known // page * page for known in whole
        )

    return Trace("chat", pairs, hits)


def tree_of_thoughts(
    problems: int, question: int, breadth: int, depth: int, thought: int, seed: int = 0
) -> Trace:
    """Each of `breadth` thoughts is gone on with `breadth` times, level by level, `depth` deep.

    A branch is its parent's prompt and one of the parent's answers. All of a problem's branches
    find the question, and below it the path that they share with a branch before them.
    """
    draw = _tokens(seed)
    pairs: list[Pair] = []
    for _ in range(problems):
        level = [draw(question)]
        for _ in range(depth):
            following = []
            for prompt in level:
                for _ in range(breadth):
                    said = draw(thought)
                    pairs.append((prompt, said))
                    following.append([*prompt, *said])
            level = following

    def hits(page: int) -> int:
        found = 0
        for rank in range(depth):
            length = question + rank * thought
            nodes = breadth**rank
            first = length - 1 if rank else 0  # of its parent's answer, which has just ended
            rest = length - 1  # a branch of the same prompt: all but the token that is computed
            found += nodes * (first // page * page) + nodes * (breadth - 1) * (rest // page * page)
        return problems * found

    return Trace("tree of thoughts", pairs, hits)


def _tokens(seed: int) -> Callable[[int], list[int]]:
    """Runs of tokens, each beginning with one of its own, so that no two share it by chance."""
    random, first = np.random.default_rng(seed), count(VOCABULARY)
    return lambda length: [next(first), *random.integers(VOCABULARY, size=length - 1).tolist()]


def replay(blocks: BlockManager, pairs: List[Pair]) -> Iterator[int]:
    """Play a trace on a cache without a model, one request at a time; cached tokens of each.

    As the engine does it: the prompt is matched and computed, then a token a step.
    """
    for name, (prompt, answer) in enumerate(pairs):
        request = Request(str(name), prompt, SamplingParams(max_tokens=len(answer)))
        sequence = request.sequences[0]
        cached = blocks.match_prefix(sequence)
        _compute(blocks, sequence, len(prompt))
        for token in answer[:-1]:  # the last one's key and value nobody asks for
            sequence.token_ids.append(token)
            _compute(blocks, sequence, len(sequence.token_ids))
        blocks.free(sequence)
        yield cached


def _compute(blocks: BlockManager, sequence: Sequence, upto: int) -> None:
    if blocks.allocate(sequence, upto) is None:
        raise UsageError(f"{upto} tokens do not fit into {blocks.num_blocks} blocks")
    blocks.computed(sequence, upto)
