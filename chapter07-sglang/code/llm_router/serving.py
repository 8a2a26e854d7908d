"""The router as a process: both planes in one loop, until SIGTERM and the last answer."""

import asyncio
import gc
import signal
import socket
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import uvicorn
import uvloop

from distlab.errors import RunError, UsageError
from distlab.host import allow_open_files
from llm_router.balancer import Router, Settings
from llm_router.cache_aware import CacheAware
from llm_router.client import Client
from llm_router.control import control_app
from llm_router.health import Watch
from llm_router.mirror import Mirrors
from llm_router.policies import make_policy
from llm_router.prompts import PromptKeys
from llm_router.worker import Worker

BACKLOG = 1024
OPEN_FILES = 65536  # a client's and a worker's connection for each request, and those kept


def serve(args: Namespace, settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises `UsageError` or `RunError` before it is ready."""
    workers = make_workers(args.workers, args.kv_events)
    keys = PromptKeys(args.tokenizer, args.block_size)
    policy = make_policy(args.policy, lambda: CacheAware(keys, guess_blocks=args.guess_blocks))
    uvloop.run(_serve(args, settings, workers, policy))


def make_workers(urls: Sequence[str], kv_events: Sequence[str] | None) -> list[Worker]:
    if kv_events and len(kv_events) != len(urls):
        raise UsageError(
            f"--kv-events has {len(kv_events)} endpoints for {len(urls)} --workers; give one each"
        )
    endpoints = [*kv_events] if kv_events else [None] * len(urls)
    made = [Worker(url, endpoint) for url, endpoint in zip(urls, endpoints, strict=True)]
    if len({worker.url for worker in made}) < len(made):
        raise UsageError("--workers names a worker twice")
    return made


async def _serve(
    args: Namespace, settings: Settings, workers: list[Worker], policy: object
) -> None:
    loop = asyncio.get_running_loop()
    router = Router(policy, settings)  # type: ignore[arg-type]
    mirrors = Mirrors(policy.index, args.block_size) if isinstance(policy, CacheAware) else None
    for worker in workers:
        router.add(worker)
        if mirrors is not None:
            mirrors.follow(worker)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    allow_open_files(OPEN_FILES)
    admin_at = args.control_host, args.control_port
    with (
        listening(args.host, args.port, "--port") as data,
        listening(*admin_at, "--control-port") as control,
    ):
        server = await loop.create_server(lambda: Client(router), sock=data, backlog=BACKLOG)
        admin = Admin(uvicorn.Config(
            control_app(router, mirrors), log_config=None, access_log=False, ws="none",
            timeout_graceful_shutdown=1,
        ))  # fmt: skip
        serving = loop.create_task(admin.serve([control]))
        watch = Watch(router)
        # Two requests in flight make no garbage that lives: look for it seldom, and not in what
        # was there before the first.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        for name, socket_ in (("control plane", control), ("router", data)):
            print("{} at http://{}:{}".format(name, *written(socket_)), flush=True)
        await stop.wait()
        server.close()
        await router.stop(args.grace, hurry)
        await watch.close()
        admin.should_exit = True
        await serving
        if mirrors is not None:
            mirrors.close()


class Admin(uvicorn.Server):
    """uvicorn's server, without its hand on the process's signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def written(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()[:2]
    return (f"[{host}]" if ":" in host else host), port


@contextmanager
def listening(host: str, port: int, flag: str) -> Iterator[socket.socket]:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise RunError(f"{flag} {port} cannot be used ({error}); choose another, or 0") from error
    with made, suppress(OSError):
        yield made
