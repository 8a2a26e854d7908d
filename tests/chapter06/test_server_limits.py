"""What the server does when it has too much to do, too little time, no client, or no engine."""

import asyncio
import json
import logging
import socket
from typing import Any

import httpx
import pytest

from fake_engine import continuation, fake_engine, tiny_tokenizer
from paged_engine.limits import Limits
from server_helper import COMPLETIONS, ask, in_process, is_empty, on_a_port, until, wait_until

GREEDY = {"max_tokens": 12, "temperature": 0}


def test_a_full_queue_says_when_to_come_again_and_empties():
    async def crowd() -> list[httpx.Response]:
        engine = fake_engine(step_seconds=0.01, max_sequences=1)
        async with in_process(engine, max_queue=1) as served:
            body = {"prompt": "hello", **GREEDY}
            asking = [served.client.post(COMPLETIONS, json=body) for _ in range(5)]
            answers = await asyncio.gather(*asking)
            assert served.behind.reserved == 0
            return [*answers, await served.client.post(COMPLETIONS, json=body)]

    *answers, later = asyncio.run(crowd())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "queue_full"
    assert later.status_code == 200


def test_an_output_that_comes_with_the_cancellation_does_not_undo_it():
    """As asyncio.wait_for does before Python 3.12: the request would go on without its client."""

    async def race() -> None:
        async with in_process() as served:
            with served.behind.generation(1) as generation:
                waiting = asyncio.create_task(anext(generation))
                await asyncio.sleep(0.01)
                generation.items.put_nowait("an output")
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting

    asyncio.run(race())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_forgotten(stream):
    engine = fake_engine(step_seconds=0.01)
    body = {"prompt": "hello", "max_tokens": 500, "n": 2, "stream": stream}
    with on_a_port(engine) as served:
        with socket.create_connection(("127.0.0.1", served.port), 10) as link:
            content = json.dumps(body).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            link.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            wait_until(lambda: engine.stats().num_running == 2)
        wait_until(lambda: is_empty(engine))
        assert engine.stats().generation_tokens < 1000
        assert served.behind.reserved == 0
        engine.blocks.check()


def test_a_broken_engine_fails_every_request_and_its_health():
    async def broken() -> tuple[Any, ...]:
        engine = fake_engine(step_seconds=0.01)
        async with in_process(engine) as served:
            body = {"prompt": "hello", "max_tokens": 400}
            waiting = [
                asyncio.create_task(served.client.post(COMPLETIONS, json={**body, "stream": s}))
                for s in (True, False)
            ]
            await until(lambda: engine.stats().num_running == 2)
            engine.runner.execute = lambda batch: 1 / 0
            stream, whole = await asyncio.gather(*waiting)
            later = await served.client.post(COMPLETIONS, json=body)
            return stream, whole, later, await served.client.get("/health")

    stream, *others = asyncio.run(broken())
    last = stream.text.rstrip().split("\n\n")[-1].removeprefix("data: ")
    message = "The engine failed: ZeroDivisionError"
    assert json.loads(last)["error"]["message"] == message
    assert [answer.status_code for answer in others] == [503, 503, 503]
    assert others[0].json()["error"]["message"] == message


def test_a_request_may_not_last_for_ever():
    engine = fake_engine(step_seconds=0.02)
    body = {"prompt": "hello", "max_tokens": 500}
    answer = ask(COMPLETIONS, body, {"engine": engine, "request_seconds": 0.3})
    assert answer.status_code == 503
    assert "longer than 0.3 s" in answer.json()["error"]["message"]


def test_a_client_that_takes_nothing_is_given_up():
    async def stuck() -> None:
        async with in_process(limits=Limits(write_seconds=0.1)) as served:
            body = json.dumps({"prompt": "hello", "stream": True}).encode()
            scope = {
                "type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"",
                "headers": [(b"content-type", b"application/json")],
            }  # fmt: skip
            sent = [{"type": "http.request", "body": body}]

            async def receive() -> dict:
                return sent.pop() if sent else await asyncio.sleep(60, {})

            async def send(message: dict) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.sleep(60)

            await asyncio.wait_for(served.gate(scope, receive, send), 10)
            assert served.behind.reserved == 0
            await until(lambda: is_empty(served.engine))

    asyncio.run(stuck())


def test_the_log_has_the_requests_id_and_nothing_of_its_text(caplog):
    with caplog.at_level(logging.DEBUG, "paged_engine.server"):
        body = {"prompt": "secret words", **GREEDY}
        named = ask(COMPLETIONS, body, headers={"x-request-id": "mine-1"})
        forged = ask(COMPLETIONS, body, headers={"x-request-id": "a b\tc"})
        ask(COMPLETIONS, {"prompt": "secret words", "secret": 1})
    assert named.headers["x-request-id"] == "mine-1"
    assert forged.headers["x-request-id"].isalnum()
    lines = [record.getMessage() for record in caplog.records if "POST" in record.getMessage()]
    assert lines[0].startswith("mine-1 POST /v1/completions 200 ")
    assert lines[0].endswith("prompt=12 cached=0 output=12 tokens")
    assert lines[1].split()[0] == forged.headers["x-request-id"]
    tokenizer = tiny_tokenizer()
    answer = tokenizer.decode(continuation(tokenizer.encode("secret words"), 12))
    assert "secret" not in caplog.text and answer not in caplog.text
