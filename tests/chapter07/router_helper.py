"""A router and fake workers in one event loop, so that a test sees all of their state."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson

from llm_router.balancer import Router, Settings
from llm_router.client import Client
from llm_router.fake_worker import Connection, Engine, add_flags
from llm_router.health import Watch
from llm_router.http import LAST_CHUNK, chunk
from llm_router.policies import PLAIN, Policy
from llm_router.worker import Worker

LIMIT_S = 15.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
QUICK = {"prefill_us": 1.0, "decode_ms": 1.0, "per_token": True}


class Fake:
    """A worker that can be killed, and come back at the same address."""

    def __init__(self, **flags: Any) -> None:
        parser = argparse.ArgumentParser()
        add_flags(parser)
        self.args = parser.parse_args([])
        vars(self.args).update({**QUICK, **flags})
        self.connections: list[Connection] = []

    async def start(self) -> "Fake":
        self.engine = Engine(self.args)

        def connection() -> Connection:
            self.connections.append(Connection(self.engine))
            return self.connections[-1]

        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(connection, "127.0.0.1", self.args.port)
        self.args.port = self.server.sockets[0].getsockname()[1]
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.args.port}"

    def kill(self) -> None:
        """As by SIGKILL: nobody listens, and all connections break off."""
        self.server.close()
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.abort()
        self.connections.clear()
        if self.engine.publisher is not None:
            self.engine.publisher.close(0)


class Routed:
    """What a test works with."""

    def __init__(self, router: Router, fakes: list[Fake], client: httpx.AsyncClient) -> None:
        self.router, self.fakes, self.client = router, fakes, client
        self.workers = list(router.workers.values())
        self.port = client.base_url.port
        self.asked: list[bytes] = []  # what scripted workers got

    async def ask(self, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def stream(self, path: str = COMPLETIONS, **body: Any) -> "Stream":
        text = (await self.ask(path, stream=True, **body)).text
        return Stream(text)

    async def raw(self, data: bytes, limit_s: float = 5.0) -> bytes:
        """What comes back for these bytes until the router closes, or is silent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        got = b""
        try:
            while piece := await asyncio.wait_for(reader.read(65536), limit_s):
                got += piece
        except TimeoutError:
            pass
        finally:
            writer.close()
        return got


class Stream:
    """A stream taken apart as a strict client would."""

    def __init__(self, text: str) -> None:
        parts = text.split("\n\n")
        assert parts.pop() == "", "it ended in half an event"
        assert all(part.startswith("data: ") for part in parts)
        data = [part.removeprefix("data: ") for part in parts]
        assert data.pop() == "[DONE]"
        self.events = [orjson.loads(one) for one in data]
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        self.pieces = [
            c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices
        ]
        self.text = "".join(self.pieces)
        self.reasons = [c["finish_reason"] for c in choices if c.get("finish_reason")]
        self.ids = {event.get("id") for event in self.events}
        self.errors = [event["error"] for event in self.events if "error" in event]
        self.usage = next((e["usage"] for e in self.events if e.get("usage")), None)


@asynccontextmanager
async def routed(
    count: int = 2,
    policy: str | Policy = "round_robin",
    fakes: list[Fake] | None = None,
    ready: bool = True,
    settings: dict[str, Any] | None = None,
    **flags: Any,
) -> AsyncIterator[Routed]:
    fakes = [Fake(**flags) for _ in range(count)] if fakes is None else fakes
    for fake in fakes:
        await fake.start()
    chosen = PLAIN[policy]() if isinstance(policy, str) else policy
    router = Router(chosen, Settings(**{"probe_interval": 0.1, **(settings or {})}))
    for fake in fakes:
        router.add(Worker(fake.url, fake.args.kv_events))
    watch = Watch(router)
    server = await asyncio.get_running_loop().create_server(lambda: Client(router), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    limits = httpx.Limits(max_connections=None)
    try:
        if ready:
            await until(lambda: len(router.usable) == len(fakes))
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S, limits=limits) as client:
            yield Routed(router, fakes, client)
            await until(lambda: router.running == 0 and not router.queue)
            assert all(worker.load == 0 for worker in router.workers.values()), "a leaked load"
    finally:
        await watch.close()
        server.close()
        await router.stop(0.5)
        for fake in fakes:
            fake.kill()


@asynccontextmanager
async def scripted(*answers: Any, settings: dict[str, Any] | None = None) -> AsyncIterator[Routed]:
    """A router with a worker for each of `answers`: what is written for a request, or a function
    of its number on its connection. None closes the connection. Nobody probes these workers."""
    router = Router(PLAIN["round_robin"](), Settings(**(settings or {})))
    servers, asked = [], []
    for answer in answers:

        async def serve(reader: Any, writer: Any, answer: Any = answer) -> None:
            number = 0
            try:
                while head := await reader.readuntil(b"\r\n\r\n"):
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    asked.append(head + await reader.readexactly(length))
                    for piece in answer(number) if callable(answer) else answer:
                        if piece is None:
                            return
                        writer.write(piece)
                        await asyncio.sleep(0.02)
                    number += 1
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))
        port = servers[-1].sockets[0].getsockname()[1]
        router.add(Worker(f"http://127.0.0.1:{port}")).healthy = True
    router.refresh()
    server = await asyncio.get_running_loop().create_server(lambda: Client(router), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=3.0) as client:
            it = Routed(router, [], client)
            it.asked = asked
            yield it
    finally:
        for each in (server, *servers):
            each.close()
        await router.stop(0.0)


def whole(body: bytes = b"{}", *fields: bytes, version: bytes = b"1.1") -> bytes:
    """A worker's answer."""
    top = b"\r\n".join((b"HTTP/%b 200 OK" % version, *fields, b"content-length: %d" % len(body)))
    return top + b"\r\n\r\n" + body


SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED_SSE = SSE + b"transfer-encoding: chunked\r\n\r\n"
DONE = chunk(b"data: [DONE]\n\n") + LAST_CHUNK


def piece(text: str, **more: Any) -> bytes:
    """An event of a completion's stream."""
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "text": text}], **more}) + b"\n\n"


async def until(holds: Callable[[], object], limit_s: float = LIMIT_S) -> float:
    """Wait for it; the seconds that it took."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < limit_s, f"not within {limit_s:g} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - started


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())
