"""What the server refuses: each mistake with its status, in the OpenAI API's shape."""

import asyncio
import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from fake_engine import fake_engine
from paged_engine.limits import Limits
from server_helper import CHAT, COMPLETIONS, ask, in_process, on_a_port


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with on_a_port() as served, httpx.Client(base_url=served.url, timeout=30) as one:
        yield one


BAD = [
    ({"foo": 1}, "foo", "Unrecognized request argument supplied: foo"),
    ({"best_of": 2}, "best_of", "best_of is not supported here; leave it out"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": True}, "n", "valid integer"),
    ({"n": 65}, "n", "--max-sequences 64"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 600}, "max_tokens", "context"),
    ({"min_tokens": 20}, "min_tokens", "between 0 and max_tokens"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"echo": True}, "echo", "not supported"),
    ({"stop": [""]}, "stop", "at least 1 character"),
    ({"foo": 0}, "foo", "Unrecognized"),
    ({"best_of": True}, "best_of", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": []}, "prompt", "at least 1 item"),
    ({"prompt": [1, "a"]}, "prompt", "valid"),
    ({"prompt": [[1], []]}, "prompt", "at least 1 item"),
    ({"prompt": [257]}, None, "not in the vocabulary"),
    ({"prompt": "a" * 512}, "prompt", "one must be left"),
    ({"prompt": ["a"] * 321}, None, "at most 320"),
    ({"prompt": None}, "prompt", "valid"),
]


@pytest.mark.parametrize(("change", "param", "message"), BAD, ids=lambda value: str(value)[:30])
def test_a_wrong_field_is_named(client, change, param, message):
    answer = client.post(COMPLETIONS, json={"prompt": "hello", **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least 1 item"),
        ([{"role": "robot", "content": "x"}], "'user'"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "'text'"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "tool_calls is not supported"),
        ([{"role": "user", "content": "x", "foo": 1}], "Unrecognized"),
        ([{"role": "assistant", "content": "x", "refusal": "no"}], "refusal is not supported"),
        ([{"role": "user", "content": None}], "valid"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": [{"type": "text", "text": "a\udfff"}]}], "surrogate"),
    ],
)
def test_a_wrong_message_is_refused(client, messages, message):
    body = json.dumps({"messages": messages})  # in ASCII: half of a surrogate pair can be sent
    answer = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 50_000, b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}',
     b'{"prompt": "a", "temperature": NaN}', b'{"prompt": [' + b"null," * 99_999 + b"null]}"],
    ids=lambda content: str(content[:20]),
)  # fmt: skip
def test_a_broken_body_is_refused(client, content):
    answer = client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_model_route_and_method_have_the_same_shape(client):
    answers = [
        client.post(COMPLETIONS, json={"prompt": "a", "model": "other"}),
        client.get("/v1/models/other"),
        client.get("/v2"),
        client.get(COMPLETIONS),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 404, 405]
    codes = [answer.json()["error"]["code"] for answer in answers]
    assert codes == ["model_not_found", "model_not_found", "not_found", "method_not_allowed"]


def test_a_large_body_is_refused_declared_or_not():
    limits = Limits(body_bytes=1000)

    async def chunked():
        for _ in range(50):
            yield b" " * 100

    body = {"prompt": "a" * 1000}
    assert ask(COMPLETIONS, body, {"limits": limits}).status_code == 413
    answer = ask(COMPLETIONS, None, {"limits": limits}, content=chunked())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_a_declared_length_is_refused_before_the_body_is_sent():
    with on_a_port() as served, socket.create_connection(("127.0.0.1", served.port), 10) as link:
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
        )
        assert link.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_not_waited_for():
    with (
        on_a_port(limits=Limits(body_seconds=0.1)) as served,
        socket.create_connection(("127.0.0.1", served.port), 10) as link,
    ):
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert link.recv(4096).startswith(b"HTTP/1.1 408")


def test_the_api_key_guards_what_costs_something():
    async def statuses() -> list[int]:
        async with in_process(api_key="sesame") as served:
            keys = [None, "Bearer wrong", "sesame", "Bearer sesame", "bearer sesame"]
            asked = [
                await served.client.get("/v1/models", headers={"authorization": key} if key else {})
                for key in keys
            ]
            asked += [await served.client.get(path) for path in ("/health", "/metrics")]
            return [answer.status_code for answer in asked]

    assert asyncio.run(statuses()) == [401, 401, 401, 200, 200, 200, 200]


def test_a_cache_too_small_for_a_request_is_a_refusal():
    async def two() -> list[int]:
        async with in_process(fake_engine(num_blocks=4)) as served:  # of 4 tokens each
            prompts = ("a" * 16, "a")
            asked = [{"prompt": prompt, "max_tokens": 2} for prompt in prompts]
            return [(await served.client.post(COMPLETIONS, json=a)).status_code for a in asked]

    assert asyncio.run(two()) == [400, 200]
