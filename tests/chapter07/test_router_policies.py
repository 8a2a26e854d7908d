"""Who is chosen; the index against a plain model of it; the mirror of a cache by its KV events."""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import msgspec
import orjson
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from distlab.errors import UsageError
from llm_router.cache_aware import CacheAware, Costs, Prefill
from llm_router.fake_model import MOST_HASH, BlockCache, save_tokenizer, tokens_of
from llm_router.mirror import Mirrors
from llm_router.policies import ConsistentHash, LeastLoaded, PowerOfTwo, RoundRobin, make_policy
from llm_router.prefix_index import PrefixIndex, block_keys
from llm_router.prompts import PromptKeys, RecentTokens
from llm_router.simulation import Clock, SimRequest, Simulation, keys_of
from llm_router.traces import zipf_trace
from llm_router.worker import Worker
from router_helper import Fake, routed, run, until


def workers(count=4):
    return [Worker(f"http://127.0.0.1:{9000 + i}") for i in range(count)]


def request(user="a", **body):
    return SimpleNamespace(parsed={"user": user, **body}, keys=None)


def test_in_turns_and_by_load():
    some = workers(3)
    turns = RoundRobin()
    assert Counter(turns.choose(request(), some) for _ in range(9)) == dict.fromkeys(some, 3)
    some[0].load, some[1].load, some[2].load = 3, 1, 2
    assert LeastLoaded().choose(request(), some) is some[1]
    two = PowerOfTwo()
    chosen = Counter(two.choose(request(), some) for _ in range(300))
    assert some[0] not in chosen and chosen[some[1]] > chosen[some[2]] > 0
    assert two.choose(request(), some[:1]) is some[0]


def test_power_of_two_keeps_the_fullest_far_below_random():
    some = workers(16)
    two = PowerOfTwo()
    for _ in range(1600):
        two.choose(request(), some).load += 1
    assert max(worker.load for worker in some) <= 104


def test_consistent_hashing_moves_only_who_must():
    some, ring = workers(4), ConsistentHash()
    users = [f"user {i}" for i in range(400)]
    before = {user: ring.choose(request(user), some) for user in users}
    assert min(Counter(before.values()).values()) > 50
    after = {user: ring.choose(request(user), some[1:]) for user in users}
    assert all(after[u] is before[u] for u in users if before[u] is not some[0])
    assert before == {user: ring.choose(request(user), some) for user in users}


def test_a_policy_that_does_not_exist():
    with pytest.raises(UsageError, match="--policy best is unknown; use round_robin"):
        make_policy("best", CacheAware)
    with pytest.raises(UsageError, match="is no address"):
        Worker("localhost")


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=12)), max_size=25)
)
def test_the_index_mirrors_caches_exactly(sent):
    index, caches = PrefixIndex[int](), [BlockCache(5, 2) for _ in range(3)]
    index.stored(0, ["x"], None, [9, 9], 2)  # so that all are known to publish
    index.removed(0, ["x"])
    for worker, tokens in sent:
        caches[worker].use(tokens)
        for event in caches[worker].events:
            if event["type"] == "BlockRemoved":
                index.removed(worker, event["block_hashes"])
            else:
                parent = event["parent_block_hash"]
                index.stored(worker, event["block_hashes"], parent, event["token_ids"], 2)
        caches[worker].events = []
        for _, other in sent:
            keys = block_keys(other, 2)
            held = [_found(cache, other) for cache in caches]
            assert index.match(keys, [0, 1, 2]) == held


def _found(cache, tokens):
    key, found, size = 0, 0, cache.block_size
    for at in range(0, len(tokens) - size + 1, size):
        key = hash((key, *tokens[at : at + size])) & MOST_HASH  # as the cache names a block
        if key not in cache.held:
            break
        found += 1
    return found


def test_a_guess_is_bounded_and_keeps_the_beginnings():
    index = PrefixIndex[str](guess_blocks=4)
    index.expect("w", [1, 2, 3])
    index.expect("w", [1, 2, 4, 5])
    assert len(index) == 4 and index.match([1, 2, 4, 5], ["w"]) == [4]
    assert index.match([1, 2, 3], ["w"]) == [2]
    index.forget("w")
    assert len(index) == 0


def test_guesses_stay_until_events_take_their_place():
    index = PrefixIndex[str]()
    index.expect("w", [7, 8])
    index.stored("w", ["b"], "a", [1, 1], 2)  # "a" was stored before we listened
    assert index.match([7, 8], ["w"]) == [2] and not index.mirror("w").exact
    index.stored("w", ["c"], None, [1, 1], 2)
    assert index.match([7, 8], ["w"]) == [1] and index.mirror("w").exact
    index.stored("w", ["d"], "c", [2, 2], 2)
    assert index.match([7], ["w"]) == [0]
    assert index.match(block_keys([1, 1, 2, 2], 2), ["w"]) == [2]


def test_events_of_arrays_adapters_and_other_blocks(capsys):
    index = PrefixIndex()
    [worker] = workers(1)
    mirrors, keys = Mirrors(index, 2), block_keys([1, 1], 2)
    stored = ["BlockStored", [1], None, [1, 1], 2, None, "CPU"]
    mirrors.apply(worker, stored)
    assert index.match(keys, [worker]) == [0]  # in the host's memory
    mirrors.apply(worker, [*stored[:5], 3, "GPU"])
    mirrors.apply(worker, [*stored[:5], None, "GPU", None, [["image"]]])
    assert index.match(keys, [worker]) == [0]
    mirrors.apply(worker, [*stored[:5], None, "GPU", None, [None]])
    mirrors.apply(worker, ["BlockRemoved", [1], "CPU"])
    assert index.match(keys, [worker]) == [1]
    mirrors.apply(worker, ["BlockRemoved", [1], "GPU"])
    assert index.match(keys, [worker]) == [0]
    for _ in range(2):
        mirrors.apply(worker, ["BlockStored", [1], None, [1] * 4, 4])
    assert mirrors.unread == 2 and capsys.readouterr().err.count("--block-size") == 1


def test_what_is_expected_counts_until_the_events_have_come():
    index = PrefixIndex[str]()
    index.stored("w", ["a"], None, [0, 0], 2)
    index.expect("w", [7, 8])
    assert index.match([7, 8], ["w"]) == [2]
    index.arrived("w", [7, 8], now=1.0)
    index.settle(now=1.1)
    assert index.match([7, 8], ["w"]) == [2]
    index.settle(now=2.0)
    assert index.match([7, 8], ["w"]) == [0]


def test_the_time_of_a_prefill_is_learned():
    prefill = Prefill(1e-3)
    for tokens in range(10, 900, 30):
        prefill.learn(tokens, 0.016 + tokens * 5e-5)
    assert prefill.slope == pytest.approx(5e-5)


def test_cache_aware_goes_where_the_prefix_is_until_the_queue_is_longer():
    clock, some = Clock(), workers(2)
    policy = CacheAware(keys_of, Costs(prefill=1e-3), now=clock)
    first = SimRequest("a", list(range(160)))
    home = policy.choose(first, some)
    clock.seconds = 10.0
    assert policy.choose(SimRequest("b", [*range(160), *range(50)]), some) is home
    cost = policy.prefill.slope * 160 * (1 + policy.costs.copy)
    policy._loads[home].free_at = clock.seconds + 2 * cost
    assert policy.choose(SimRequest("c", list(range(160))), some) is not home


def test_on_the_trace_it_hits_more_than_others_and_keeps_the_load_even():
    turns = [SimRequest(str(t.conversation), t.tokens, t.answer) for t in zipf_trace(800, 1)]
    clock = Clock()
    aware = Simulation(CacheAware(keys_of, now=clock), clock, 4, 512).run(turns, 16)
    plain = Simulation(LeastLoaded(), Clock(), 4, 512).run(turns, 16)
    assert aware.hit_rate > plain.hit_rate + 0.15 and aware.imbalance < 1.25
    assert aware.rate > 1.5 * plain.rate


def test_prompts_are_cut_as_the_worker_cuts_them(tmp_path):
    save_tokenizer(tmp_path)
    keys = PromptKeys(str(tmp_path), 2)
    text = "w1 w2 w3 w4 strange"
    ids = tokens_of(text)
    assert keys(request(prompt=text)) == (block_keys(ids, 2), 5, 2)
    assert keys(request(prompt=ids)) == (block_keys(ids, 2), 5, 2)
    chat = keys(request(messages=[{"role": "user", "content": "w1 w2"}]))
    assert chat == (block_keys(tokens_of("<user> w1 w2 <assistant>"), 2), 4, 2)
    for odd in ({}, {"prompt": 7}, {"prompt": []}, {"messages": 3}, {"messages": [None]}):
        assert keys(request(**odd))[1] >= 0
    plain = PromptKeys(None, 2)
    assert plain(request(prompt="abcdefgh" * 4))[1] == 8
    with pytest.raises(UsageError, match="has no tokenizer.json"):
        PromptKeys(str(tmp_path / "none"), 2)


def _with_bos(folder):
    from tokenizers import Tokenizer, processors

    save_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    [bos] = tokens_of("<user>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", bos)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return bos


def test_a_chat_has_the_specials_of_its_template_only(tmp_path):
    bos = _with_bos(tmp_path)
    template = (
        "{% if tools %}{{ strftime_now('w%d')[:1] }}1 {% endif %}{{ bos_token }}"
        "{% for m in messages %} {{ m.content }}{% endfor %}{% if deep %} w7{% endif %}"
    )
    config = {"chat_template": [{"name": "default", "template": template},
                                {"name": "other", "template": ""}],
              "bos_token": {"content": "<user>"}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    keys, w = PromptKeys(str(tmp_path), 1), tokens_of("w1 w2 w7")
    chat = {"messages": [{"role": "user", "content": "w2"}]}

    def cut(**body):
        return keys(request(**body))[0]

    assert cut(prompt="w1 w2") == block_keys([bos, *w[:2]], 1)
    assert cut(prompt="w1 w2", add_special_tokens=False) == block_keys(w[:2], 1)
    assert cut(input_ids=[5, 6]) == cut(prompt=[5, 6]) == cut(input_ids=[[5, 6], [7]])
    assert cut(**chat) == block_keys([bos, w[1]], 1)
    deep = {"chat_template_kwargs": {"deep": True}}
    assert cut(**chat, **deep, tools=[{}]) == block_keys([w[0], bos, w[1], w[2]], 1)
    long = " ".join(["w1"] * 400)
    assert cut(prompt=long) == cut(prompt=long) == block_keys([bos] + w[:1] * 400, 1)


@pytest.mark.parametrize(
    "files",
    [{"tokenizer_config.json": "{"}, {"tokenizer_config.json": "[]"},
     {"chat_template.jinja": "{% for %}"}],
)  # fmt: skip
def test_a_broken_template_is_told_in_one_line(tmp_path, files):
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="broken chat template"):
        PromptKeys(str(tmp_path), 2)


def test_a_text_that_goes_on_is_tokenized_as_if_it_were_new():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source = Path(__file__).read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False)
    tokenizer.train_from_iterator([source], trainer)
    asked: list[int] = []

    def encode(text, add_special_tokens=False):
        asked.append(len(text))
        return tokenizer.encode(text)

    recent, draw = RecentTokens(encode), random.Random(0)
    for _ in range(6):
        at = draw.randrange(len(source) - 2000)
        text = source[at : at + 1500]
        for _ in range(8):
            assert recent.ids(text) == tokenizer.encode(text).ids
            at = draw.randrange(len(source) - 400)
            text += source[at : at + draw.randrange(1, 300)]
    assert sorted(asked)[len(asked) // 2] < 700  # mostly no more than the end
    recent.MOST = 0
    assert recent.ids(source) and not recent._known and recent._kept == 0


def test_the_router_follows_kv_events(tmp_path):
    async def test():
        save_tokenizer(tmp_path)
        policy = CacheAware(PromptKeys(str(tmp_path), 16))
        fakes = [Fake(kv_events=f"ipc://{tmp_path}/{i}", cache_blocks=8) for i in range(2)]
        async with routed(policy=policy, fakes=fakes) as it:
            mirrors = Mirrors(policy.index, 16)
            for worker in it.workers:
                mirrors.follow(worker)
            prompt = " ".join(f"w{i}" for i in range(64))
            body = {"prompt": prompt, "max_tokens": 1}

            async def subscribed():
                await it.ask(**{**body, "prompt": " ".join(["w7"] * 64)})
                return mirrors.events > 2

            for _ in range(50):
                if await subscribed():
                    break
                for fake in fakes:
                    fake.engine.reset()
            for _ in range(6):
                await it.ask(**body)
            counts = sorted(worker.requests for worker in it.workers)
            keys = block_keys(tokens_of(prompt), 16)

            def same():
                policy.index.settle(float("inf"))
                return policy.index.match(keys, it.workers) == [
                    4 if _has(fake.engine.cache, tokens_of(prompt)) else 0 for fake in fakes
                ]

            await until(same)
            assert counts[1] >= 6
            fakes[0].engine.reset()
            fakes[1].engine.reset()
            await until(lambda: policy.index.match(keys, it.workers) == [0, 0])
            mirrors.close()

    run(test)


def _has(cache, tokens):
    copy = BlockCache(cache.blocks, cache.block_size)
    copy._held = cache._held.copy()
    return copy.use(list(tokens)) == 1


def test_events_that_cannot_be_read_or_are_missing_empty_the_mirror(tmp_path):
    async def test():
        index = PrefixIndex()
        [worker] = workers(1)
        worker.kv_events = f"ipc://{tmp_path}/events"
        socket = zmq.Context.instance().socket(zmq.PUB)
        socket.bind(worker.kv_events)
        mirrors = Mirrors(index, 2)
        mirrors.follow(worker)
        number = 0

        def publish(*events, gap=0, raw=None):
            nonlocal number
            number += 1 + gap
            payload = msgspec.msgpack.encode([0.0, events]) if raw is None else raw
            socket.send_multipart([b"", number.to_bytes(8, "big"), payload])

        stored = ["BlockStored", [b"a", b"b"], None, [1, 1, 2, 2], 2]  # vLLM's older form
        keys = block_keys([1, 1, 2, 2], 2)

        def held():
            publish(stored)
            return index.match(keys, [worker]) == [2]

        for disturb in (
            lambda: publish(raw=b"\xc1"),
            lambda: publish(["BlockStored"]),
            lambda: publish(gap=3),
            lambda: publish({"type": "AllBlocksCleared"}),
            lambda: publish({"type": "BlockRemoved", "block_hashes": [b"a", b"b"]}),
        ):
            await until(held)
            disturb()
            await until(lambda: index.match(keys, [worker]) == [0])
        assert mirrors.gaps >= 1 and mirrors.unread >= 2
        mirrors.close()
        socket.close(0)

    run(test)
