"""The server's answers, on an engine without a model that is known token by token."""

import asyncio
import json
from typing import Any

import pytest

from fake_engine import CHAT_TEMPLATE, continuation, fake_engine, tiny_tokenizer
from server_helper import CHAT, COMPLETIONS, ask, in_process, is_empty, until

TOKENIZER = tiny_tokenizer()
GREEDY = {"max_tokens": 12, "temperature": 0}
HELLO = [{"role": "user", "content": "hello"}]


def expected(prompt: str, count: int = 12) -> str:
    return TOKENIZER.decode(continuation(TOKENIZER.encode(prompt), count))


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_what_the_engine_makes_and_counts_its_tokens():
    answer = ask(COMPLETIONS, {"prompt": "hello", **GREEDY}).json()
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0, "text": expected("hello"), "logprobs": None, "finish_reason": "length"
    }  # fmt: skip
    assert answer["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert (answer["object"], answer["model"]) == ("text_completion", "fake")


@pytest.mark.parametrize(
    "prompt",
    ["one", ["one", "three"], TOKENIZER.encode("one"), [TOKENIZER.encode(p) for p in ("one", "x")]],
    ids=["string", "strings", "token ids", "lists of token ids"],
)
def test_every_kind_of_prompt(prompt):
    answer = ask(COMPLETIONS, {"prompt": prompt, **GREEDY}).json()
    one = isinstance(prompt, str) or isinstance(prompt[0], int)
    texts = [
        p if isinstance(p, str) else TOKENIZER.decode(p) for p in ([prompt] if one else prompt)
    ]
    assert [choice["text"] for choice in answer["choices"]] == [expected(text) for text in texts]


def test_samples_of_several_prompts_stand_in_order():
    body = {"prompt": ["ab", "cd"], "n": 3, "max_tokens": 5, "seed": 7}
    first, again = (ask(COMPLETIONS, body).json()["choices"] for _ in range(2))
    assert [choice["index"] for choice in first] == list(range(6))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    assert len({choice["text"] for choice in first}) == 6


def test_a_stop_string_ends_the_text_before_it():
    whole = expected("hello")
    stop = whole[4:6]
    (choice,) = ask(COMPLETIONS, {"prompt": "hello", "stop": stop, **GREEDY}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole.partition(stop)[0], "stop")


def test_logprobs_name_the_chosen_token_and_the_likeliest():
    body = {"prompt": "hello", "logprobs": 3, **GREEDY}
    (choice,) = ask(COMPLETIONS, body).json()["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == list(range(12))
    rows = zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    )
    for token, logprob, top in rows:  # greedy: the chosen one is the likeliest
        assert (len(top), max(top.values())) == (3, top[token]) == (3, logprob)


def test_a_chat_goes_through_the_template():
    answer = ask(CHAT, {"messages": HELLO, **GREEDY}).json()
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": expected("user: hello\nassistant:")}


def test_a_chat_without_max_tokens_fills_the_context():
    engine = fake_engine(max_model_len=40)
    usage = ask(CHAT, {"messages": HELLO}, {"engine": engine}).json()["usage"]
    assert usage["total_tokens"] == 40


def test_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "user", "content": parts}], **GREEDY}
    text = ask(CHAT, body).json()["choices"][0]["message"]["content"]
    assert text == expected("user: hello\nassistant:")


def test_no_chat_template_is_a_refusal_and_a_file_mends_it():
    def engine_without():
        engine = fake_engine()
        engine.tokenizer.chat_template = None
        return engine

    refused = ask(CHAT, {"messages": HELLO}, {"engine": engine_without()})
    assert refused.status_code == 400
    assert "--chat-template" in refused.json()["error"]["message"]
    mended = {"engine": engine_without(), "chat_template": CHAT_TEMPLATE}
    assert ask(CHAT, {"messages": HELLO, **GREEDY}, mended).status_code == 200


def test_a_template_may_refuse_the_messages():
    template = "{{ raise_exception('roles must alternate') }}"
    refused = ask(CHAT, {"messages": HELLO}, {"chat_template": template})
    assert refused.status_code == 400
    assert "roles must alternate" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_makes_the_same_text_token_by_token(path):
    question = {"prompt": "hello"} if path == COMPLETIONS else {"messages": HELLO}
    body = {**question, **GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(ask(path, body).text)
    if path == COMPLETIONS:
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(texts) == expected("hello")
    else:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta["content"] for delta in deltas) == expected("user: hello\nassistant:")
        assert ["role" in delta for delta in deltas] == [True] + [False] * 11
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 11 + ["length"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 12)


def test_the_prefix_cache_shows_in_usage_and_metrics():
    async def twice() -> tuple[int, str]:
        async with in_process() as served:
            for _ in range(2):
                answer = await served.client.post(COMPLETIONS, json={"prompt": "a" * 20, **GREEDY})
            cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            await until(lambda: is_empty(served.engine))
            await asyncio.sleep(0.1)  # the engine's thread publishes its counts after the step
            return cached, (await served.client.get("/metrics")).text

    cached, text = asyncio.run(twice())
    assert cached == 16  # whole blocks of 4 tokens; at least one token is computed
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = '{model_name="fake"}'
    of = {name: float(values[f"paged_engine:{name}{label}"]) for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
        "prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
    )}  # fmt: skip
    assert list(of.values()) == [0, 0, 0, 40, 16, 0, 40, 24, 2, 22, 2]
    success = 'paged_engine:request_success_total{finished_reason="length",model_name="fake"}'
    assert float(values[success]) == 2
