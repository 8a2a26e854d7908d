"""The radix cache: a tree of prefixes beside a dictionary of hashes, and beside SGLang's own.

Chapter 6's engine finds a common beginning by the hash of each full block. SGLang keeps a radix
tree (radix/tree.py, on one page), which matches at any token. Both find what a formula says as long
as the cache holds everything. Then it gets smaller, and they have to choose what to give up. Where
SGLang is installed, the same operations go through its RadixCache.

Run:
    python chapter07-sglang/code/radix_cache.py --figures build/figures

in the environment sglang for the comparison with SGLang's. You should see: hits as predicted, to
the token; more of them the smaller a block is; with SGLang's tree the same matches and the same
evictions; and the engine's greedy answers the same under every policy.
"""

import importlib.util
import random
from argparse import Namespace
from array import array
from typing import Any

import torch

from distlab import script
from distlab.errors import UsageError
from distlab.run import Run
from distlab.serving.tiny_model import model_directory
from paged_engine.block_manager import BlockManager, block_policy
from paged_engine.llm import LLM
from paged_engine.sampling_params import SamplingParams
from radix.traces import Trace, chat, few_shot, replay, tree_of_thoughts
from radix.tree import Node, RadixTree

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"size": "smoke", "users": 4, "operations": 300},
    "laptop": {"size": "smoke", "users": 16, "operations": 5000},
    "gpu": {"size": "smoke", "users": 16, "operations": 5000},
}
POLICIES = [
    ("hash", 16),
    ("radix", 16),
    ("radix", 1),
]  # vLLM's way, the tree with its pages, SGLang
SHARES = [1.0, 0.75, 0.5, 0.375, 0.25, 0.125]  # of the room that the trace's tokens need
VOCABULARY = 4  # so few that random sequences share beginnings
LONGEST = 24
ANSWER = 8  # tokens of the engine's


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        traces = [
            few_shot(4 * args.users, shots=200, question=30, answer=20),
            chat(args.users, turns=6, system=100, message=40, answer=30),
            tree_of_thoughts(args.users // 2, question=100, breadth=3, depth=3, thought=37),
        ]
        find_all(run, traces)
        find_in_less(run, traces[1:])
        serve(run, args)
        compare_with_sglang(run, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face folder (default: tiny)")
    parser.add_argument("--size", help="of the tiny model")
    parser.add_argument("--users", type=script.positive_int, help="of the chat; 2 or more")
    parser.add_argument("--operations", type=script.positive_int, help="on both trees")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.users < 2:
        raise UsageError("--users 1 shares nothing with anyone; use 2 or more")
    return args


def find_all(run: Run, traces: list[Trace]) -> None:
    """Every policy on every trace, in a cache that has room for everything."""
    rows: list[list[Any]] = []
    wrong = 0
    for trace in traces:
        for name, page in POLICIES:
            hits = sum(replay(blocks_of(trace, name, page, 1.0), trace.pairs))
            predicted = trace.hits(page)
            wrong += abs(predicted - hits)
            total = trace.prompt_tokens
            rows.append([trace.name, f"{name}, {page}", predicted / total, hits / total])
    run.table(
        "hits",
        ["trace", "policy, tokens of a block", "predicted hit rate", "measured hit rate"], rows,
        caption="cached tokens to tokens of prompts, in a cache that holds all",
    )  # fmt: skip
    run.check_equal("tokens by which a prediction is wrong", wrong, 0)


def find_in_less(run: Run, traces: list[Trace]) -> None:
    """The same in caches that are too small: what each policy gives up first."""
    series: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for trace in traces:
        for name, page in POLICIES:
            rates = []
            for share in SHARES:
                hits = sum(replay(blocks_of(trace, name, page, share), trace.pairs))
                rates.append(hits / trace.prompt_tokens)
            rows.append([trace.name, f"{name}, {page}", *rates])
            label = f"{trace.name}: {name}, {page}"
            series.append({"label": label, "x": [100 * s for s in SHARES], "y": rates})
    run.table(
        "small", ["trace", "policy, tokens of a block", *(f"{100 * s:g} %" for s in SHARES)], rows,
        caption="hit rate by the cache's size, in parts of what all tokens of the trace need",
    )  # fmt: skip
    run.figure(
        "small", kind="line", title="Hit rate of a cache too small",
        x_label="size, % of what all tokens need", y_label="hit rate", series=series,
    )  # fmt: skip


def blocks_of(trace: Trace, policy: str, page: int, share: float) -> BlockManager:
    """Room for `share` of the trace's distinct tokens, and never less than its longest request."""
    distinct = RadixTree()
    for prompt, answer in trace.pairs:
        tokens = [*prompt, *answer]
        distinct.insert(tokens, range(len(tokens)))
    longest = max(len(prompt) + len(answer) for prompt, answer in trace.pairs)
    blocks = max(-(-longest // page), round(share * distinct.evictable / page))
    if share == 1.0:
        blocks += len(trace.pairs) * (page > 1)  # a tail of each that fills no block
    return block_policy(policy)(blocks, page)


def serve(run: Run, args: Namespace) -> None:
    """The engine with a model: the same answers, and hits as on the trace without one."""
    folder = model_directory(args)
    trace = few_shot(6, shots=70, question=9, answer=ANSWER, seed=args.seed)
    vocabulary = 256
    prompts = [[token % vocabulary for token in prompt] for prompt, _ in trace.pairs]
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    rows: list[list[Any]] = []
    answers, wrong = [], 0
    for policy, page in POLICIES:
        blocks = 4096 // page
        with LLM(folder, dtype="float32", prefix_cache=policy, num_blocks=blocks,
                 block_size=page) as llm:  # fmt: skip
            made = [llm.generate([prompt], params)[0] for prompt in prompts]
        answers.append([one.outputs[0].token_ids for one in made])
        cached = sum(one.num_cached_tokens for one in made)
        wrong += abs(cached - trace.hits(page))
        rows.append([f"{policy}, {page}", trace.hits(page), cached])
    run.table(
        "served", ["policy, tokens of a block", "predicted hits", "hits in the engine"], rows,
        caption=f"{len(prompts)} prompts of {len(prompts[0])} tokens, one after the other",
    )  # fmt: skip
    run.check_equal("tokens by which the engine's hits differ", wrong, 0)
    run.check_equal("greedy answers are the same", answers[1:], answers[:-1])


def compare_with_sglang(run: Run, args: Namespace) -> None:
    """Random matches, insertions, locks and evictions on both trees; each result is compared."""
    if importlib.util.find_spec("sglang") is None:
        run.print("SGLang's tree: not here; the environment sglang has it")
        return
    for page in (1, 4):
        ours, theirs = Ours(page), Theirs(page)
        draw = random.Random(args.seed)
        differ = 0
        for step in range(args.operations):
            tokens = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, LONGEST))]
            action = draw.choice(["match", "insert", "insert", "lock", "unlock", "evict"])
            number = draw.randrange(1, LONGEST)
            values = [step * LONGEST + place for place in range(len(tokens))]
            both = [tree.do(action, tokens, values, number) for tree in (ours, theirs)]
            differ += both[0] != both[1]
        run.check_equal(f"results that differ from SGLang's, pages of {page}", differ, 0)
        sizes = (ours.tree.evictable * page, ours.tree.protected * page)
        run.check_equal(f"evictable and protected tokens, pages of {page}", sizes, theirs.sizes())


class Ours:
    """Our tree, asked as SGLang's is: a value for each token, of which a page's first is kept."""

    def __init__(self, page: int) -> None:
        self.page, self.tree = page, RadixTree(page)
        self.locked: list[Node] = []

    def do(self, action: str, tokens: list[int], values: list[int], number: int) -> Any:
        if action == "match":
            return self.tree.match(tokens)[0]
        if action == "insert":
            return len(self.tree.insert(tokens, values[:: self.page])[0]) * self.page
        if action == "lock":
            found, node = self.tree.match(tokens)
            self.tree.lock(node)
            self.locked.append(node)
            return found
        if action == "unlock":
            if self.locked:
                self.tree.unlock(self.locked.pop(number % len(self.locked)))
            return self.tree.evictable * self.page
        return sorted(self.tree.evict(-(-number // self.page)))


class Theirs:
    """SGLang's RadixCache, without its pools; what it frees is noted by a stand-in for them."""

    def __init__(self, page: int) -> None:
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.page, self.freed, self.locked = page, list[int](), list[Any]()
        self.tree = RadixCache.create_simulated(mock_allocator=self, page_size=page)

    device = torch.device("cpu")

    def free_segment(self, values: torch.Tensor, start_pos: int = 0) -> None:
        self.freed += values.tolist()

    def sizes(self) -> tuple[int, int]:
        return self.tree.evictable_size(), self.tree.protected_size()

    def do(self, action: str, tokens: list[int], values: list[int], number: int) -> Any:
        from sglang.srt.mem_cache.base_prefix_cache import (
            EvictParams,
            InsertParams,
            MatchPrefixParams,
        )
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(array("q", tokens))
        if action == "insert":
            stored = torch.tensor(values)
            return self.tree.insert(InsertParams(key=key, value=stored)).prefix_len
        if action in ("match", "lock"):
            node = self.tree.match_prefix(MatchPrefixParams(key=key)).last_device_node
            if action == "lock":
                self.tree.inc_lock_ref(node)
                self.locked.append(node)
            return self.tree.path_device_indices(node).tolist()[:: self.page]
        if action == "unlock":
            if self.locked:
                self.tree.dec_lock_ref(self.locked.pop(number % len(self.locked)))
            return self.tree.evictable_size()
        self.freed = []
        self.tree.evict(EvictParams(num_tokens=number))
        return sorted(self.freed[:: self.page])


if __name__ == "__main__":
    script.exit(main)
