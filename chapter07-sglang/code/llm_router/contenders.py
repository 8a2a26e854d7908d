"""Routers to compare, each started alike before the same fake workers, and the load upon them."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import psutil

from distlab.errors import RunError
from distlab.service import Service, await_that, free_port, service
from llm_router.traces import Turn

OURS = "llm_router"
READY = re.compile(r"^router at (http://\S+)", re.MULTILINE)
WORKER_READY = re.compile(r"^fake worker at (http://\S+)", re.MULTILINE)
# How each is started, its word for a warning, its policies that look at caches with their flags.
PEERS: dict[str, tuple[list[str], str, dict[str, list[str]]]] = {
    "sglang-router": (["-m", "sglang_router.launch_router"], "warn", {
        "cache_aware": [],
        "cache_aware, tuned": ["--balance-abs-threshold", "4"],  # 64 never happens among 16
    }),
    "smg": (["{bin}/smg", "launch"], "warn", {"cache_aware": []}),
    "vllm-router": (["{bin}/vllm-router"], "warning", {
        "sticky_least_loaded": [],
        "kv_aware": ["--kv-event-block-size", "16", "--kv-event-model", "fake"],
    }),
}  # fmt: skip
NOTICE = ["--health-check-interval-secs", "1"]  # theirs is 60
START_S = 60.0


@dataclass(frozen=True)
class Contender:
    """How a router is started."""

    name: str
    policy: str
    peers_python: Path | None = None

    @contextmanager
    def running(
        self, router: Path, workers: Sequence[Service], more: Sequence[str] = (), core: bool = False
    ) -> Iterator[Service]:
        """The router before `workers`, in front of which it stands ready; on one core if asked."""
        urls = [worker.url for worker in workers]
        pinned = ["taskset", "-c", "0"] if core and shutil.which("taskset") else []
        ready: re.Pattern[str] | str = READY
        if self.name == OURS:
            command = [sys.executable, str(router), "--policy", self.policy, "--port", "0",
                       "--control-port", "0", "--workers", *urls]  # fmt: skip
        else:
            assert self.peers_python is not None
            start, level, _ = PEERS[self.name]
            port, metrics = free_port(), free_port()
            first = [part.replace("{bin}", str(self.peers_python.parent)) for part in start]
            command = [str(self.peers_python)] if first[0] == "-m" else []
            command += [*first, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls,
                        "--policy", self.policy.partition(",")[0], "--log-level", level,
                        "--prometheus-port", str(metrics), *NOTICE]  # fmt: skip
            ready = f"http://127.0.0.1:{port}/health"
        with service([*pinned, *command, *more], ready, name=self.name, start_s=START_S) as started:
            if isinstance(ready, str):
                started.url = ready.removesuffix("/health")
            late = f"{self.name} answers no request"
            await_that(lambda: answers(started.url), START_S, late, started.check)
            yield started


def answers(url: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return (
            call(url + "/v1/completions", {"model": "fake", "prompt": "w1", "max_tokens": 1}) != {}
        )
    return False


def call(url: str, body: object = None, limit_s: float = 5.0) -> dict:
    """One small request; the answer's object. Raises OSError."""
    data = None if body is None else orjson.dumps(body)
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=limit_s) as answer:
        return dict(orjson.loads(answer.read()))


@contextmanager
def fake_workers(
    count: int, *flags: str, events: bool = False, core: bool = False, port: int = 0
) -> Iterator[tuple[list[Service], list[str]]]:
    """Fake workers, and where they publish their KV events."""
    with ExitStack() as stack:
        pinned = ["taskset", "-c", str(other_core())] if core and shutil.which("taskset") else []
        started, endpoints = [], []
        for i in range(count):
            command = [*pinned, sys.executable, "-m", "llm_router.fake_worker", "--port", str(port)]
            if events:
                endpoints.append(f"tcp://127.0.0.1:{free_port()}")  # vllm-router takes no other
                command += ["--kv-events", endpoints[-1]]
            started.append(
                stack.enter_context(service([*command, *flags], WORKER_READY, name=f"worker {i}"))
            )
        yield started, endpoints


def other_core() -> int:
    return min(1, (os.cpu_count() or 1) - 1)


def processor_seconds(pid: int) -> float:
    """Of a process and all that it started."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


# ---- how much work a second of the router's processor does


def by_wrk(url: str, body: object, connections: int, seconds: float) -> int:
    """Requests answered in so many seconds, by wrk on the other core. Raises `RunError`."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua", encoding="utf-8") as script:
        text = orjson.dumps(body).decode()
        script.write(
            'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
            f"wrk.body = [==[{text}]==]\n"
        )
        script.flush()
        pinned = ["taskset", "-c", str(other_core())] if shutil.which("taskset") else []
        command = [*pinned, "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s",
                   "-s", script.name, f"{url}/v1/completions"]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=seconds + 30
        )
    found = re.search(r"(\d+) requests in", done.stdout)
    if done.returncode or not found:
        raise RunError(f"wrk could not measure {url}: {(done.stderr or done.stdout).strip()[:300]}")
    if wrong := re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout):
        raise RunError(f"{url}: {wrong[1]} of {found[1]} answers were errors")
    return int(found[1])


# ---- a client of our own, for what wrk cannot do


@dataclass
class Outcome:
    """What a client saw of a request."""

    status: int
    at: float  # when it was sent
    seconds: float
    first: float  # seconds to the first event's byte
    complete: bool
    text: bytes = field(repr=False, default=b"")


async def ask(url: str, body: object, limit_s: float = 10.0) -> Outcome:
    """One request on a connection of its own; status 0 where none came in time."""
    host, port = url.removeprefix("http://").split(":")
    raw = orjson.dumps(body)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    started, first, got = time.monotonic(), 0.0, b""
    writer = None
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head.encode() + raw)
            while piece := await reader.read(65536):
                got += piece
                if not first and b"\r\n\r\n" in got and not got.endswith(b"\r\n\r\n"):
                    first = time.monotonic() - started
                if _is_complete(got):
                    break
    except (OSError, TimeoutError):
        pass
    finally:
        if writer is not None:
            writer.transport.abort()
    status = int(got[9:12]) if got[:7] == b"HTTP/1." and got[9:12].isdigit() else 0
    return Outcome(status, started, time.monotonic() - started, first, _is_complete(got), got)


def _is_complete(got: bytes) -> bool:
    top, end, body = got.partition(b"\r\n\r\n")
    if not end:
        return False
    if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", top):
        return len(body) >= int(length[1])
    return b"data: [DONE]" in body and b'"error"' not in body


@asynccontextmanager
async def kept(
    urls: Sequence[str],
) -> AsyncIterator[dict[str, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """A connection (reader, writer) to each."""
    opened = {}
    for url in urls:
        host, port = url.removeprefix("http://").split(":")
        opened[url] = await asyncio.open_connection(host, int(port))
    try:
        yield opened
    finally:
        for _, writer in opened.values():
            writer.transport.abort()


async def first_event(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: object, limit_s: float = 10.0
) -> float:
    """Seconds to a stream's first event; the stream is read to its end."""
    raw = orjson.dumps(body)
    async with asyncio.timeout(limit_s):
        started = time.monotonic()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(raw) + raw
        )
        await reader.readuntil(b"data: ")
        seconds = time.monotonic() - started
        await reader.readuntil(b"[DONE]")
        await reader.readuntil(b"0\r\n\r\n")
    return seconds


async def replay(url: str, turns: Sequence[Turn], concurrency: int) -> list[Outcome]:
    """The trace in its order, so many requests at once; each sender keeps its connection."""
    host, port = url.removeprefix("http://").split(":")
    todo, outcomes = iter(turns), list[Outcome]()

    async def sender() -> None:
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**20)
        for turn in todo:
            raw = orjson.dumps({
                "model": "fake", "prompt": turn.prompt, "max_tokens": len(turn.answer),
                "temperature": 0, "user": str(turn.conversation),
            })  # fmt: skip
            started = time.monotonic()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\n"
                b"x-session-id: %d\r\ncontent-length: %d\r\n\r\n"
                % (host.encode(), turn.conversation, len(raw)) + raw
            )  # fmt: skip
            top = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", top)
            if length is None:
                raise RunError(f"{url} answered without a length: {top[:100]!r}")
            await reader.readexactly(int(length[1]))
            seconds = time.monotonic() - started
            outcomes.append(Outcome(int(top[9:12]), started, seconds, seconds, True))
        writer.close()

    async with asyncio.timeout(120 + len(turns) / 10):
        await asyncio.gather(*(sender() for _ in range(concurrency)))
    return outcomes


async def load(
    url: str, body: dict, clients: int, seconds: float, during: Callable[[], Awaitable[None]],
    limit_s: float = 3.0,
) -> list[Outcome]:  # fmt: skip
    """`clients` who ask again and again for so many seconds, while `during` does its mischief."""
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds

    async def one(name: int) -> None:
        number = 0
        while time.monotonic() < end:
            prompt = f"w{name} w{number % 1000} w{number // 1000}"
            outcomes.append(await ask(url, {**body, "prompt": prompt}, limit_s))
            number += 1
            if outcomes[-1].status != 200:
                await asyncio.sleep(0.05)

    mischief = asyncio.ensure_future(during())
    await asyncio.gather(*(one(i) for i in range(clients)))
    await mischief
    return outcomes
