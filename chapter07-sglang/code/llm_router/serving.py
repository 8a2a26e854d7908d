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
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with listening(args.host, args.port, "--port") as data, \
            listening(args.host, args.control_port, "--control-port") as control:  # fmt: skip
        server = await loop.create_server(lambda: Client(router), sock=data, backlog=BACKLOG)
        admin = Admin(uvicorn.Config(
            control_app(router, mirrors), log_config=None, access_log=False, ws="none"
        ))  # fmt: skip
        serving = loop.create_task(admin.serve([control]))
        watch = Watch(router)
        # Two requests in flight make no garbage that lives: look for it seldom, and not in what
        # was there before the first.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        for name, socket_ in (("control plane", control), ("router", data)):
            print("{} at http://{}:{}".format(name, *socket_.getsockname()[:2]), flush=True)
        await stop.wait()
        server.close()
        await router.stop(args.grace)
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


@contextmanager
def listening(host: str, port: int, flag: str) -> Iterator[socket.socket]:
    try:
        made = socket.create_server((host, port), backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise RunError(f"{flag} {port} cannot be used ({error}); choose another, or 0") from error
    with made, suppress(OSError):
        yield made
