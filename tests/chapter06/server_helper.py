"""Servers on an engine without a model: in this process, and behind a real port."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from fake_engine import fake_engine
from paged_engine.engine import Engine
from paged_engine.server import serve_engine

LIMIT_S = 30.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@asynccontextmanager
async def in_process(
    engine: Engine | None = None, **options: Any
) -> AsyncIterator[SimpleNamespace]:
    """A client of the application, without a port; `.engine` is the engine behind it."""
    engine = engine or fake_engine()
    gate = serve_engine(engine, "fake", **options)
    transport = httpx.ASGITransport(app=gate, raise_app_exceptions=False)
    assert isinstance(gate.app, FastAPI)
    async with (
        gate.app.router.lifespan_context(gate.app),
        httpx.AsyncClient(transport=transport, base_url="http://fake", timeout=LIMIT_S) as client,
    ):
        yield SimpleNamespace(client=client, engine=engine, behind=gate.engine, gate=gate)


@contextmanager
def on_a_port(engine: Engine | None = None, **options: Any) -> Iterator[SimpleNamespace]:
    """The same application behind uvicorn, in a thread; `.url` is where."""
    engine = engine or fake_engine()
    gate = serve_engine(engine, "fake", **options)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        config = uvicorn.Config(gate, log_config=None, access_log=False, ws="none")
        config.timeout_graceful_shutdown = 2
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        host, port = listener.getsockname()
        try:
            yield SimpleNamespace(
                url=f"http://{host}:{port}", port=port, engine=engine, behind=gate.engine
            )
        finally:
            server.should_exit = True
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "the server did not stop"


def ask(path: str, body: Any, server: dict | None = None, **request: Any) -> httpx.Response:
    """One request to a server of its own."""

    async def one() -> httpx.Response:
        async with in_process(**server or {}) as served:
            return await served.client.post(path, json=body, **request)

    return asyncio.run(one())


def wait_until(holds: Any, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, f"not within {limit_s:g} s"
        time.sleep(0.01)


async def until(holds: Any, limit_s: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not holds():
            await asyncio.sleep(0.01)


def is_empty(engine: Engine) -> bool:
    """Whether no request is left in the engine, and every block of its cache is free."""
    stats = engine.stats()
    nothing_left = not engine.has_work and stats.num_running == stats.num_waiting == 0
    return nothing_left and engine.blocks.num_free == engine.blocks.num_blocks
