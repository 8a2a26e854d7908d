"""The official `openai` client, unmodified, against the server."""

from collections.abc import Iterator
from types import SimpleNamespace

import openai
import pytest

from fake_engine import continuation, fake_engine, tiny_tokenizer
from server_helper import is_empty, on_a_port, wait_until

TOKENIZER = tiny_tokenizer()
HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": "fake", "temperature": 0, "max_tokens": 10}


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    with on_a_port(fake_engine(), api_key="sesame") as one:
        yield one


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="sesame", max_retries=0, timeout=30)


def expected(prompt: str) -> str:
    return TOKENIZER.decode(continuation(TOKENIZER.encode(prompt), 10))


def test_completion(client):
    answer = client.completions.create(prompt="hello", **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (
        expected("hello"),
        "length",
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 10)
    assert answer._request_id


def test_streamed_completion_with_usage(client):
    stream = client.completions.create(
        prompt="hello", stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected("hello")
    assert [chunk.usage for chunk in chunks] == [None] * 10
    assert (last.choices, last.usage.total_tokens) == ([], 15)


def test_chat_with_logprobs(client):
    answer = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == expected("user: hello\nassistant:")
    assert choice.message.role == "assistant"
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    assert {len(token.top_logprobs) for token in choice.logprobs.content} == {2}
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_streamed_chat_with_usage(client):
    stream = client.chat.completions.create(
        messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = stream
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content for delta in deltas) == expected("user: hello\nassistant:")
    assert deltas[0].role == "assistant" and deltas[1].role is None
    assert last.usage.completion_tokens == 10


def test_the_answer_of_a_chat_can_be_sent_back(client):
    first = client.chat.completions.create(messages=HELLO, **GREEDY).choices[0].message
    again = [*HELLO, first, {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(messages=again, **GREEDY).usage.prompt_tokens > 20


def test_extra_parameters_of_vllm(client):
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}
    body = {**GREEDY, "temperature": 0.7}
    answer = client.completions.create(prompt="hello", extra_body=extra, **body)
    assert answer.usage.completion_tokens == 10


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == client.models.retrieve("fake").id == "fake"


def test_errors_are_the_clients_own(client, served):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(prompt="hello", extra_body={"foo": 1}, **GREEDY)
    assert (wrong.value.param, wrong.value.type) == ("foo", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(prompt="hello", model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(prompt="hello" * 200, **GREEDY)


def test_leaving_a_stream_frees_its_place(client, served):
    long = {**GREEDY, "max_tokens": 500}
    with client.completions.create(prompt="hello", stream=True, **long) as stream:
        next(iter(stream))
    wait_until(lambda: is_empty(served.engine))


def test_a_full_queue_and_a_broken_engine():
    engine = fake_engine(step_seconds=0.02, max_sequences=1)
    with on_a_port(engine, max_queue=0) as served:
        client = openai.OpenAI(
            base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=30
        )
        long = {**GREEDY, "max_tokens": 500}
        with client.completions.create(prompt="hello", stream=True, **long) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(prompt="hello", **GREEDY)
            assert int(full.value.response.headers["retry-after"]) >= 1
            engine.runner.execute = lambda batch: 1 / 0
            with pytest.raises(openai.APIError, match="The engine failed"):
                list(stream)
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(prompt="hello", **GREEDY)
        assert failed.value.status_code == 503
