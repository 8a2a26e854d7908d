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

from llm_router.balancer import Router
from llm_router.control import control_app
from llm_router.http import ChunkedBody, HttpError, RequestHead, chunk, ends_with_a_chunk
from llm_router.policies import RoundRobin
from llm_router.worker import Worker
from router_helper import COMPLETIONS, Fake, routed, run, until

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
        (b"POST /v1/x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\na: " + b"x" * 70000, 431),
        (b"GET /shutdown HTTP/1.1\r\n\r\n", 404),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
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
                b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
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


def test_a_router_needs_a_loop():
    with pytest.raises(RuntimeError):
        Router(RoundRobin())
