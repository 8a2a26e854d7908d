"""HTTP as clients and attackers write it, the OpenAI client, and the control plane."""

import asyncio
import subprocess
import sys

import openai
import orjson
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from distlab.errors import UsageError
from llm_router.balancer import Router
from llm_router.client import Client
from llm_router.control import control_app
from llm_router.http import ChunkedBody, HttpError, RequestHead, chunk, ends_with_a_chunk
from llm_router.policies import RoundRobin
from llm_router.worker import Worker
from router_helper import (
    CHUNKED_SSE,
    COMPLETIONS,
    DONE,
    SSE,
    Fake,
    Stream,
    piece,
    routed,
    run,
    scripted,
    until,
    whole,
)

BODY = orjson.dumps({"model": "fake", "prompt": "w1 w2", "max_tokens": 2, "temperature": 0})


def post(body=BODY, *fields, path=COMPLETIONS, version="1.1"):
    lines = [f"POST {path} HTTP/{version}", "host: a", *fields, f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00", 400),  # TLS
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nbad name: 1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\na: 1\n b: 2\r\n\r\n", 400),
        (b"POST /v1/x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\na: " + b"x" * 70000, 431),
        (b"GET /shutdown HTTP/1.1\r\nhost: a\r\n\r\n", 404),
        (b"DELETE /metrics HTTP/1.1\r\nhost: a\r\n\r\n", 405),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no host, or two
        (b"GET /health HTTP/1.1\r\nhost: a\r\nHost: b\r\n\r\n", 400),
        (post(b"{"), 400),
    ],
)  # fmt: skip
def test_bad_input_gets_its_status_and_the_router_lives(data, status):
    async def test():
        async with routed(1) as it:
            got = await it.raw(data, limit_s=0.3)
            assert int(got.split()[1]) == status
            assert (await it.client.post(COMPLETIONS, content=BODY)).status_code == 200

    run(test)


def test_a_client_that_asks_for_http2_is_closed():
    async def test():
        async with routed(1) as it:
            with pytest.raises(ConnectionError):
                assert await it.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == b""
                raise ConnectionResetError

    run(test)


def test_requests_in_one_piece_in_many_and_in_chunks():
    async def test():
        async with routed(2) as it:
            pipelined = await it.raw(post() + post() + post(), 0.5)
            assert pipelined.count(b"HTTP/1.1 200 OK") == 3
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            chunked = (
                b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
                + chunk(BODY[:5]) + chunk(BODY[5:]) + b"0\r\n\r\n"
            )  # fmt: skip
            for data in (post(), chunked):
                for i in range(len(data)):
                    writer.write(data[i : i + 1])
                    await asyncio.sleep(0)
                top = await reader.readuntil(b"\r\n\r\n")
                assert top.startswith(b"HTTP/1.1 200")
                length = int(top.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                assert orjson.loads(await reader.readexactly(length))["choices"]
            writer.close()
            assert b"100 Continue" in await it.raw(post(BODY, "expect: 100-continue")[:-5], 0.3)

    run(test)


def test_connections_close_when_asked_to():
    async def test():
        async with routed(1) as it:
            assert b"connection: close" in await it.raw(post(BODY, "connection: close"))
            assert b"connection: close" in await it.raw(post(BODY, version="1.0"))
            stream = orjson.dumps({**orjson.loads(BODY), "stream": True})
            got = await it.raw(post(stream, version="1.0"))
            assert got.endswith(b"data: [DONE]\n\n") and b"chunked" not in got

    run(test)


def test_request_ids_go_through_and_are_given():
    async def test():
        async with routed(1) as it:
            ids = [(await it.client.post(COMPLETIONS, content=BODY)).headers["x-request-id"]
                   for _ in range(3)]  # fmt: skip
            assert len(set(ids)) == 3
            own = {"x-request-id": "mine"}
            answer = await it.client.post(COMPLETIONS, content=BODY, headers=own)
            assert answer.headers["x-request-id"] == "mine"

    run(test)


def test_the_openai_client():
    async def test():
        async with (
            routed(2) as it,
            openai.AsyncOpenAI(
                base_url=f"{it.client.base_url}/v1", api_key="none", max_retries=0
            ) as client,
        ):
            assert [model.id async for model in client.models.list()] == ["fake"]
            made = await client.completions.create(model="fake", prompt="w1", max_tokens=3)
            assert len(made.choices[0].text.split()) == 3
            chat = {"model": "fake", "messages": [{"role": "user", "content": "w1"}]}
            stream = await client.chat.completions.create(**chat, max_tokens=3, stream=True)
            pieces = [chunk.choices[0].delta.content async for chunk in stream]
            assert len("".join(pieces).split()) == 3
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="fake", prompt="", max_tokens=3)

    run(test)


def test_metrics_are_what_prometheus_reads():
    from prometheus_client.parser import text_string_to_metric_families

    async def test():
        async with routed(2) as it:
            for _ in range(4):
                await it.client.post(COMPLETIONS, content=BODY)
            text = (await it.client.get("/metrics")).text
            families = {family.name: family for family in text_string_to_metric_families(text)}
            assert families["llm_router_requests"].samples[0].value == 4
            assert [s.value for s in families["llm_router_worker_requests"].samples] == [2, 2]
            up = [s for s in families["llm_router_worker_state"].samples if s.value == 1]
            assert [sample.labels["state"] for sample in up] == ["up", "up"]
            assert any(s.name.endswith("_count") and s.value == 4
                       for s in families["llm_router_request_seconds"].samples)  # fmt: skip

    run(test)


def test_the_control_plane_adds_and_removes_workers():
    import httpx

    async def test():
        async with routed(1) as it:
            app = control_app(it.router, None)
            transport = httpx.ASGITransport(app=app)
            more = await Fake().start()
            async with httpx.AsyncClient(transport=transport, base_url="http://c") as control:
                assert (await control.post("/workers", json={"url": "x"})).status_code == 422
                added = await control.post("/workers", json={"url": more.url})
                assert added.status_code == 201 and added.json()["state"] == "down"
                await until(lambda: len(it.router.usable) == 2)
                gone = await control.delete("/workers", params={"url": it.fakes[0].url})
                assert gone.json()["state"] == "draining"
                assert [w["url"] for w in (await control.get("/workers")).json()] == [more.url]
                assert (await control.delete("/workers?url=x")).status_code == 404
                assert (await control.get("/health")).json() == {"workers": 1, "usable": 1}
            assert (await it.client.post(COMPLETIONS, content=BODY)).status_code == 200
            more.kill()

    run(test)


@pytest.mark.slow
def test_schemathesis_finds_no_500(tmp_path):
    """The data plane as described here, and the control plane as it describes itself."""
    content = {"application/json": {"schema": {
        "type": "object", "required": ["prompt"],
        "properties": {
            "prompt": {"type": "string"}, "max_tokens": {"type": "integer", "maximum": 50},
            "stream": {"type": "boolean"}, "model": {"type": "string"},
        },
    }}}  # fmt: skip
    anything = {"responses": {"default": {"description": "any"}}}
    schema = {
        "openapi": "3.1.0", "info": {"title": "data plane", "version": "1"},
        "paths": {
            COMPLETIONS: {"post": {"requestBody": {"content": content}, **anything}},
            "/v1/models": {"get": anything}, "/health": {"get": anything},
            "/metrics": {"get": anything},
        },
    }  # fmt: skip
    (tmp_path / "schema.json").write_bytes(orjson.dumps(schema))

    def command(*words):
        done = subprocess.run(
            _schemathesis(*words), cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=50, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        return done.stdout

    async def test():
        async with routed(1) as it:
            config = uvicorn.Config(control_app(it.router, None), port=0, log_config=None)
            admin = uvicorn.Server(config)
            serving = asyncio.ensure_future(admin.serve())
            await until(lambda: admin.started)
            port = admin.servers[0].sockets[0].getsockname()[1]
            url = str(it.client.base_url)
            data = await asyncio.to_thread(command, "schema.json", "--url", url)
            schema_url = f"http://127.0.0.1:{port}/openapi.json"
            control = await asyncio.to_thread(command, schema_url)
            assert "Tested: 4" in data and "Tested: 5" in control
            for url in [*it.router.workers]:
                if url != it.fakes[0].url:
                    del it.router.workers[url]
            it.router.add(Worker(it.fakes[0].url))  # it may have been deleted, by what GET told
            await until(lambda: it.router.usable)
            assert (await it.client.post(COMPLETIONS, content=BODY)).status_code == 200
            admin.should_exit = True
            await serving

    run(test)


def _schemathesis(*target):
    return [
        sys.executable, "-m", "schemathesis.cli", "run", *target, "--phases", "fuzzing",
        "--checks", "not_a_server_error", "--max-examples", "6", "--no-shrink", "--no-color",
        "--generation-deterministic", "--suppress-health-check", "all", "--warnings", "off",
        "--request-timeout", "20",
    ]  # fmt: skip


# ---- one connection, many requests


class Wire:
    """A client's transport that keeps what is written."""

    def __init__(self):
        self.sent = b""

    def write(self, data):
        self.sent += data

    def is_closing(self):
        return False

    def resume_reading(self): ...

    def close(self):
        self.sent += b"<closed>"


def test_data_does_not_overtake_what_waits_in_the_buffer():
    async def test():
        async with routed(1) as it:
            client, wire = Client(it.router), Wire()
            client.connection_made(wire)
            second = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
            client.data_received(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" + second[:9])
            client.data_received(second[9:])  # before the loop had its turn
            await asyncio.sleep(0)
            assert wire.sent.count(b"HTTP/1.1 200") == 2 and b"closed" not in wire.sent
            client.connection_lost(None)

    run(test)


def test_a_connection_that_waited_for_a_slow_client_is_read_again(monkeypatch):
    async def test():
        write = Client.write

        def slow(client, data):
            write(client, data)
            client.pause_writing()

        async with scripted(
            lambda n: [whole() if n else CHUNKED_SSE + DONE]
        ) as it:  # the head, which pauses, and the end come in one read
            with monkeypatch.context() as patched:
                patched.setattr(Client, "write", slow)
                assert (await it.ask(prompt="a")).text
            async with asyncio.timeout(2):
                assert b"200 OK" in await it.raw(post(BODY, "connection: close"))

    run(test)


def test_a_kept_connection_that_the_worker_closes_is_no_fault():
    async def test():
        async with scripted(lambda n: [None if n else whole()]) as it:
            assert [(await it.ask(prompt="a")).status_code for _ in range(3)] == [200] * 3
            assert it.workers[0].failures == 0 and len(it.asked) == 5
        async with scripted([whole(version=b"1.0")]) as it:
            answer = await it.ask(prompt="a")
            assert answer.http_version == "HTTP/1.1" and not it.workers[0].idle

    run(test)


def test_clients_of_http_1_0():
    async def test():
        kept = [b"connection: keep-alive"]
        async with scripted([CHUNKED_SSE + DONE], [whole()]) as it:
            ask = post(BODY, "connection: keep-alive", "expect: 100-continue", version="1.0")
            got = await it.raw(ask, 0.3)
            assert kept[0] in got and b"100 Continue" not in got
            async with asyncio.timeout(2):  # the end of a stream is the connection's
                got = await it.raw(ask)
            assert got.endswith(b"[DONE]\n\n") and b"connection: close" in got
            assert all(each.split(b"\r\n")[0].endswith(b"HTTP/1.1") for each in it.asked)

    run(test)


@pytest.mark.parametrize(
    "answer",
    [
        [SSE + b"content-length: %d\r\n\r\n" % len(piece("a") + b"data: [DONE]\n\n"),
         piece("a"), b"data: [DONE]\n\n"],
        [CHUNKED_SSE, chunk(piece("a").replace(b"\n\n", b"\r\n\r")), chunk(b"\n"), DONE],
        [CHUNKED_SSE, chunk(piece("a")), chunk(b"data: [DONE]\n") + b"0\r\n\r\n"],
        [CHUNKED_SSE, chunk(piece("a")), DONE[:-2] + b"x-trailer: 1\r\n\r\n"],
    ],
    ids=["length", "crlf-in-two", "one-newline", "trailer"],
)  # fmt: skip
def test_streams_of_other_front_ends(answer):
    async def test():
        async with scripted(answer) as it:
            stream = Stream((await it.ask(prompt="a", stream=True)).text)
            assert stream.text == "a" and it.workers[0].failures == 0
            assert b"accept-encoding: identity\r\n" in it.asked[0]
            assert it.asked[0].lower().count(b"accept-encoding") == 1

    run(test)


def test_slow_and_idle_clients():
    async def test():
        async with routed(1, settings={"head_timeout": 0.4, "idle_timeout": 0.4}) as it:
            assert (await it.raw(post()[:-5])).startswith(b"HTTP/1.1 408")
            data = post()
            assert b"200 OK" in await it.raw(data, 3.0)  # and then closed
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            for byte in (data[:-8], data[-8:-6], data[-6:-4], data[-4:-2]):
                writer.write(byte)
                await asyncio.sleep(0.25)
            writer.write(data[-2:])
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()

    run(test)


def test_what_else_the_rfc_allows():
    async def test():
        async with routed(1) as it:
            target = f"http://x{COMPLETIONS}"
            got = await it.raw(b"\r\n" + post(path=target) + b"\r\n" + post(), 0.4)
            assert got.count(b"HTTP/1.1 200") == 2
            trailers = (
                b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
                + chunk(BODY) + b"0\r\na: b\r\n\r\n"
            )  # fmt: skip
            assert (await it.raw(trailers + post(), 0.4)).count(b"HTTP/1.1 200") == 2
            got = await it.raw(b"PUT /health HTTP/1.1\r\nhost: a\r\n\r\n", 0.2)
            assert b"\r\nallow: GET, HEAD\r\n" in got

    run(test)


@pytest.mark.parametrize(
    "url", ["http://a:0", "http://u:p@a:1", "http://a:1?x=1", "http://a", "https://a:1"]
)
def test_no_address_of_a_worker(url):
    with pytest.raises(UsageError, match="is no address"):
        Worker(url)


# ---- framing


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.integers(1, 9))
def test_chunks_are_put_together_however_they_arrive(pieces, step):
    wire = b"".join(map(chunk, pieces)) + b"0\r\n\r\nrest"
    body, got = ChunkedBody(), b""
    for at in range(0, len(wire), step):
        got += body.feed(wire[at : at + step])
        if body.done:
            break
    assert got == b"".join(pieces) and body.done
    assert b"rest".startswith(body.rest)
    assert ends_with_a_chunk(b"".join(map(chunk, pieces)))
    assert not pieces or not ends_with_a_chunk(b"".join(map(chunk, pieces))[:-1])


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_no_head_breaks_the_parser(data):
    try:
        RequestHead(b"GET / HTTP/1.1\r\n" + data + b"\r\n\r\n")
    except HttpError as error:
        assert error.status == 400


def test_what_belongs_to_one_connection_is_not_forwarded():
    head = RequestHead(
        b"GET /a?b HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\nTE: x\r\nX: 1\r\n\r\n"
    )
    assert head.forward == b"GET /a?b HTTP/1.1\r\nHost: h\r\nX: 1"
    assert head.path == b"/a" and head.keeps_alive


def test_a_connection_names_what_is_its_own():
    head = RequestHead(b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: close, X-A\r\nx-a: 1\r\n\r\n")
    assert head.forward == b"GET /a HTTP/1.1\r\nHost: h" and not head.keeps_alive


def test_a_huge_chunk_is_put_together_once():
    body, piece = ChunkedBody(), b"x" * 1000
    assert body.feed(b"%x\r\n" % (len(piece) * 5000)) == b""
    for _ in range(5000):
        assert body.feed(piece) == b"" and len(body.rest) < 100
    assert body.held > 5_000_000
    assert len(body.feed(b"\r\n0\r\n\r\n")) == 5_000_000 and body.done


def test_a_router_needs_a_loop():
    with pytest.raises(RuntimeError):
        Router(RoundRobin())
