"""The engine and LLM on a fake model: texts, ends, seeds, cancelled requests, errors."""

import subprocess
import sys

import pytest
import torch

from distlab.errors import RunError, UsageError
from fake_engine import (
    END_OF_TEXT,
    continuation,
    fake_engine,
    fake_runner,
    next_logits,
)
from paged_engine import LLM, Engine, EngineConfig, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def test_many_prompts_at_once_are_continued_as_each_alone():
    llm = LLM(engine=fake_engine())
    prompts = ["a", "a longer prompt " * 12, "a longer prompt " * 12, "😀"]
    answers = llm.generate(prompts, GREEDY)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = llm.tokenizer.encode(prompt)
        assert (answer.prompt, answer.prompt_token_ids) == (prompt, ids)
        (only,) = answer.outputs
        assert only.token_ids == continuation(ids, 20)
        assert only.text == llm.tokenizer.decode(only.token_ids)
        assert only.finish_reason == "length" and only.token_times == sorted(only.token_times)


def test_seeded_samples_are_the_same_after_preemption_and_in_other_company():
    how = SamplingParams(n=3, seed=4, max_tokens=30)
    alone = LLM(engine=fake_engine()).generate("together", how)[0]
    crowded = LLM(engine=fake_engine(num_blocks=24, max_batch_tokens=9))
    company = [SamplingParams(max_tokens=25, top_p=0.9), SamplingParams(n=2, max_tokens=9), how]
    answers = crowded.generate(["one", "two", "together"], company)
    assert crowded.engine.stats().num_preemptions > 0
    texts = [output.text for output in alone.outputs]
    assert [output.text for output in answers[2].outputs] == texts
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_text_before_it_and_frees_its_blocks():
    engine = fake_engine()
    llm = LLM(engine=engine)
    whole = llm.generate("stop here", SamplingParams(temperature=0, max_tokens=40))[0].outputs[0]
    stop = whole.text[10:14]
    how = SamplingParams(temperature=0, max_tokens=40, stop=("never", stop))
    cut = llm.generate(["stop here", "stop here"], [how, GREEDY])[0].outputs[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert engine.blocks.num_free == engine.blocks.num_blocks
    # Complete with the very last token that is allowed: still a stop.
    how = SamplingParams(temperature=0, max_tokens=len(cut.token_ids), stop=stop)
    assert llm.generate("stop here", how)[0].outputs[0].finish_reason == "stop"
    # One token before that, what was held back belongs to the text.
    how = SamplingParams(temperature=0, max_tokens=len(cut.token_ids) - 1, stop=stop)
    last = llm.generate("stop here", how)[0].outputs[0]
    assert (last.finish_reason, last.text) == ("length", whole.text[: len(last.text)])
    assert len(last.text) == len(last.token_ids)


def test_the_token_that_stops_is_no_text():
    llm = LLM(engine=fake_engine(eos_bias=2.0))
    ids = llm.tokenizer.encode("ends")
    expected = continuation(ids, 200, eos_bias=2.0)
    assert expected[-1] == END_OF_TEXT, "the table of this test must end the text"
    answer = llm.generate("ends", SamplingParams(temperature=0, max_tokens=200))[0].outputs[0]
    assert (answer.token_ids, answer.finish_reason) == (expected, "stop")
    assert answer.text == llm.tokenizer.decode(expected[:-1])
    stop = expected[3]
    how = SamplingParams(temperature=0, max_tokens=200, stop_token_ids=(stop,))
    answer = llm.generate("ends", how)[0].outputs[0]
    length = expected.index(stop) + 1
    assert (answer.token_ids, answer.finish_reason) == (expected[:length], "stop")
    assert answer.text == llm.tokenizer.decode(expected[: length - 1])
    how = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    assert len(llm.generate("ends", how)[0].outputs[0].token_ids) == 200
    how = SamplingParams(temperature=0, max_tokens=200, min_tokens=len(expected) + 3)
    assert len(llm.generate("ends", how)[0].outputs[0].token_ids) >= len(expected) + 3


def test_a_step_brings_each_running_sequence_one_token():
    engine = fake_engine()
    name = engine.add_request("hello", SamplingParams(temperature=0, max_tokens=3, logprobs=2))
    outputs = []
    while engine.has_work:
        (output,) = engine.step()
        outputs.append(output)
    ids = engine.encode("hello")
    assert [output.request_id for output in outputs] == [name] * 3
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
    assert sum((output.token_ids for output in outputs), []) == continuation(ids, 3)
    first = torch.log_softmax(next_logits(ids), -1)
    sampled = outputs[0].logprobs[0]
    assert sampled.logprob == pytest.approx(first.max().item(), abs=1e-5)
    assert list(sampled.top) == first.topk(2).indices.tolist()
    assert outputs[0].arrival < outputs[0].time < outputs[1].time
    assert engine.step() == []


def test_what_was_cancelled_is_never_heard_of_again():
    engine = fake_engine()
    for name in ("stays", "goes"):
        engine.add_request("one " * 9, SamplingParams(temperature=0, max_tokens=9, n=2), name)
    engine.step()
    assert engine.cancel("goes") and not engine.cancel("goes") and not engine.cancel("unknown")
    seen = set()
    while engine.has_work:
        seen |= {(output.request_id, output.index) for output in engine.step()}
    assert seen == {("stays", 0), ("stays", 1)}
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert not engine._texts and not engine._requests


def test_stats_count_tokens_and_the_prefix_cache():
    engine = fake_engine()
    llm = LLM(engine=engine)
    llm.generate("x" * 41, SamplingParams(temperature=0, max_tokens=5))
    again = llm.generate("x" * 41, SamplingParams(temperature=0, max_tokens=5))[0]
    stats = engine.stats()
    assert again.num_cached_tokens == 40 and stats.prefix_cache_hits == 40
    assert (stats.prompt_tokens, stats.generation_tokens) == (82, 10)
    assert stats.steps == engine.runner.steps and stats.kv_cache_usage == 0
    engine.add_request("y" * 40, GREEDY)
    engine.step()
    assert engine.stats().num_running == 1
    assert engine.stats().kv_cache_usage == pytest.approx(10 / 256)
    engine.close()
    assert engine.stats().num_running == 0


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", {}, "no tokens"),
        ([], {}, "no tokens"),
        ("x" * 64, {}, "shorten"),
        ([1, 257], {}, "token id 257"),
        ([-1], {}, "token id -1"),
        ("x", {"n": 65}, "n 65"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_and_the_engine_goes_on(prompt, params, words):
    engine = fake_engine(max_model_len=64)
    engine.add_request("before", GREEDY)
    with pytest.raises(UsageError, match=words) as refusal:
        engine.add_request(prompt, SamplingParams(**params))
    assert "\n" not in str(refusal.value)
    answer = LLM(engine=fake_engine(max_model_len=64)).generate("after", GREEDY)[0].outputs[0]
    engine.add_request("after", GREEDY, "after")
    tokens = []
    while engine.has_work:
        tokens += [t for o in engine.step() if o.request_id == "after" for t in o.token_ids]
    assert tokens == answer.token_ids


def test_a_cache_too_small_for_one_prompt_is_told():
    engine = fake_engine(num_blocks=2)
    with pytest.raises(UsageError, match="KV cache, 8 tokens"):
        engine.add_request("x" * 8, GREEDY)
    (answer,) = LLM(engine=engine).generate("x" * 5, GREEDY)
    assert answer.outputs[0].finish_reason == "length" and len(answer.outputs[0].token_ids) == 3


def test_an_id_in_use_is_refused():
    engine = fake_engine()
    engine.add_request("a", GREEDY, "name")
    with pytest.raises(UsageError, match="'name' is in use"):
        engine.add_request("b", GREEDY, "name")
    while engine.has_work:
        engine.step()
    engine.add_request("b", GREEDY, "name")


def test_generate_takes_what_vllm_takes():
    llm = LLM(engine=fake_engine())
    ids = llm.tokenizer.encode("hello")
    text, tokens = llm.generate("hello", GREEDY), llm.generate(ids, GREEDY, progress=True)
    assert text[0].outputs[0].text == tokens[0].outputs[0].text and tokens[0].prompt is None
    assert [a.prompt_token_ids for a in llm.generate([ids, [5]])] == [ids, [5]]
    assert llm.generate([]) == []
    short = SamplingParams(temperature=0, max_tokens=1)
    both = llm.generate(["hello", "hello"], [short, GREEDY])
    assert [len(answer.outputs[0].token_ids) for answer in both] == [1, 20]
    with pytest.raises(UsageError, match="1 sampling parameters do not fit 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_nothing_remains_of_a_list_with_a_bad_prompt_or_an_interrupted_one(monkeypatch):
    llm = LLM(engine=fake_engine())
    with pytest.raises(UsageError):
        llm.generate(["good", ""], GREEDY)
    assert not llm.engine.has_work

    def interrupted(batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["good", "too"], GREEDY)
    assert not llm.engine.has_work
    assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks


def test_a_chat_is_its_template():
    llm = LLM(engine=fake_engine())
    chat = [{"role": "user", "content": "hi"}]
    (answer,) = llm.chat(chat, GREEDY)
    assert answer.prompt_token_ids == llm.tokenizer.encode("user: hi\nassistant:")
    assert len(llm.chat([chat, chat], GREEDY)) == 2
    llm.tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(UsageError, match="refuses these messages: only users"):
        llm.chat(chat, GREEDY)
    llm.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="fake has no chat template"):
        llm.chat(chat, GREEDY)


def test_a_model_without_tokenizer_takes_token_ids(tmp_path):
    engine = Engine(EngineConfig(tmp_path, num_blocks=8), runner=fake_runner(8, 16))
    with pytest.raises(UsageError, match="has no tokenizer; give token ids"):
        engine.add_request("text")
    (answer,) = LLM(engine=engine).generate([1, 2, 3], GREEDY)
    assert answer.outputs[0].text == ""
    assert answer.outputs[0].token_ids == continuation([1, 2, 3], 20)


def test_bad_settings_and_a_damaged_tokenizer_are_told_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="block_size 0 is not possible"):
        fake_engine(block_size=0)
    with pytest.raises(UsageError, match="LLM needs a model directory"):
        LLM()
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(RunError, match="tokenizer in .* cannot be read") as told:
        Engine(EngineConfig(tmp_path), runner=fake_runner(8, 16))
    assert "\n" not in str(told.value)


def test_the_package_is_light_until_it_is_used():
    check = (
        "import sys, paged_engine; paged_engine.SamplingParams; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
    with pytest.raises(ImportError):
        from paged_engine import Unknown  # noqa: F401
