"""An OpenAI-compatible server for one model: completions and chats, streamed or whole.

Run:
    python -m paged_engine.server --model DIR            # or: python -m paged_engine --model DIR

You should see, once the model is loaded, `ready: http://127.0.0.1:8000/v1 serves NAME`. Then:

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "import os", "max_tokens": 32, "temperature": 0}'
    curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32,
             "stream": true, "stream_options": {"include_usage": true}}'
    curl http://127.0.0.1:8000/v1/models
    curl http://127.0.0.1:8000/health                    # 503 when the engine has failed
    curl http://127.0.0.1:8000/metrics                   # Prometheus; vLLM's names, our prefix

and /openapi.json describes every field. What to know before others may use it:

- It listens on 127.0.0.1. Before `--host 0.0.0.0`, set PAGED_ENGINE_API_KEY: /v1/* then needs
  `Authorization: Bearer KEY`. /health, /metrics and /version stay open.
- It takes at most --max-sequences + --max-queue sequences; the next request gets 429 with
  Retry-After. A client that leaves takes its sequences out of the engine at the next step.
- SIGTERM or Ctrl-C: no new connections, what runs may finish within --drain-seconds, the rest is
  cancelled; a second Ctrl-C does not wait.
- Each request is one line in the log, with its X-Request-Id (the client's, or a new one). No
  prompt and no answer is ever logged.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from distlab import script
from distlab.errors import RunError, UsageError
from distlab.host import allow_open_files
from paged_engine.async_engine import AsyncEngine, Unavailable
from paged_engine.config import EngineConfig, dedicate_process
from paged_engine.engine import Engine
from paged_engine.limits import Gate, Limits
from paged_engine.metrics import Metrics
from paged_engine.prompting import Prompts
from paged_engine.routes import Service, build_app

API_KEY = "PAGED_ENGINE_API_KEY"
FAREWELL_SECONDS = 5.0  # after the drain, for the last answers to be written
OWN_FILES = 64  # open in the server beside its connections
REPEAT_SECONDS = 10.0  # between two lines about the same shortage
LIMITS: list[tuple[str, Any, Any, str]] = [  # flag, type, default, help
    ("max-queue", script.non_negative_int, 256, "sequences that may wait; more get status 429"),
    ("max-body-bytes", script.positive_int, 2**20, "of a request's body"),
    ("request-seconds", script.positive_float, 600.0, "after which a request is given up"),
    ("drain-seconds", script.positive_float, 30.0, "for what runs when the server is to stop"),
]
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
log = logging.getLogger("paged_engine.server")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", level=args.log_level.upper()
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # we tell what happens ourselves
    api_key = read_api_key()
    template = read_template(args.chat_template)
    name = args.served_model_name or args.model.resolve().name
    with (
        listening_socket(args.host, args.port) as listener,
        Engine(engine_config(args)) as engine,
    ):
        log.info("%s", engine.runner.description)
        dedicate_process()
        app = serve_engine(
            engine,
            name,
            api_key=api_key,
            chat_template=template,
            max_queue=args.max_queue,
            request_seconds=args.request_seconds,
            limits=Limits(body_bytes=args.max_body_bytes),
            cors_origins=args.cors_origin,
        )
        if args.host not in LOCAL_HOSTS and not api_key:
            log.warning("whoever reaches %s may use this server; set %s", args.host, API_KEY)
        return Server(app, listener, name, args.drain_seconds).run_to_end()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script.OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face's")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the folder's name")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja, for all chats")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: a free one")
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="whose pages may ask, https://host, or * for all; again for more",
    )  # fmt: skip
    parser.add_argument("--log-level", choices=["debug", "info", "warning"], default="info")
    _add_engine_flags(parser.add_argument_group("the engine"))
    limits = parser.add_argument_group("limits")
    for name, kind, default, meaning in LIMITS:
        _add_flag(limits, name, kind, default, meaning)
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not a port; use 0 to 65535")
    return args


def _add_engine_flags(group: Any) -> None:
    """A flag for each field of EngineConfig but the model."""
    for field in dataclasses.fields(EngineConfig)[1:]:
        name, default, meaning = field.name.replace("_", "-"), field.default, field.metadata["help"]
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(f"--{name}", action=action, default=default, help=meaning)
        else:
            kind = str if isinstance(default, str) else script.positive_int
            _add_flag(group, name, kind, default, meaning)


def _add_flag(group: Any, name: str, kind: Any, default: Any, meaning: str) -> None:
    shown = f"{meaning} (default: {default})" if default is not None else meaning
    group.add_argument(f"--{name}", type=kind, default=default, help=shown)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    names = [field.name for field in dataclasses.fields(EngineConfig)[1:]]
    return EngineConfig(args.model, **{name: getattr(args, name) for name in names})


def serve_engine(
    engine: Engine,
    name: str,
    *,
    api_key: str | None = None,
    chat_template: str | None = None,
    max_queue: int = 256,
    request_seconds: float = 600.0,
    limits: Limits | None = None,
    cors_origins: Sequence[str] = (),
) -> Gate:
    """The ASGI application for an engine, which it closes at its end."""
    asynchronous = AsyncEngine(engine, max_queue, request_seconds, Metrics(name))
    prompts = Prompts(engine.tokenizer, chat_template)
    service = Service(name, asynchronous, prompts, created=int(time.time()))
    gate = Gate(build_app(service), limits or Limits(), asynchronous, api_key)
    gate.allow_origins(cors_origins)
    return gate


def read_api_key() -> str | None:
    """Raises UsageError for an empty one: who sets it does not want an open server."""
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise UsageError(f"{API_KEY} is set, but empty; give it a key, or unset it")
    return key


def read_template(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"--chat-template {file} cannot be read: {problem}") from None


def listening_socket(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded, so that a port in use is known at once.

    It listens only when the server is ready: who connects earlier is refused, and does not wait.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio turns Nagle's algorithm off for each connection. Else a
    # stream's first token waits 40 ms for the client to acknowledge the headers.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as problem:
        bound.close()
        raise _port_error(host, port, problem) from None
    return bound


def _port_error(host: str, port: int, problem: OSError) -> UsageError:
    if problem.errno == errno.EADDRINUSE:
        return UsageError(f"--port {port} is in use on {host}; choose another")
    return UsageError(f"--host {host} --port {port} is not possible: {problem.strerror}")


class Server(uvicorn.Server):
    """Uvicorn with a drain that tells the clients, and a status instead of a signal at the end."""

    def __init__(self, app: Gate, listener: socket.socket, name: str, drain_seconds: float) -> None:
        engine = app.engine
        connections = 2 * engine.capacity + 64
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            loop="asyncio",  # uvloop closes a socket that it cannot listen on, without a word
            limit_concurrency=connections,
            timeout_graceful_shutdown=int(drain_seconds + FAREWELL_SECONDS),
        )
        super().__init__(config)
        self.open_files = connections + OWN_FILES
        self.next_complaint = 0.0
        self.engine = engine
        self.listener = listener
        self.name = name
        self.drain_seconds = drain_seconds
        self.signal_number: int | None = None

    def run_to_end(self) -> int:
        """0 after SIGTERM, 130 after Ctrl-C. Raises RunError when it could not start."""
        try:
            self.run(sockets=[self.listener])
        except SystemExit:
            raise RunError("the server could not start; the log says why") from None
        except OSError as problem:  # another process began to listen while the model was loaded
            host, port = self.listener.getsockname()[:2]
            raise _port_error(host, port, problem) from None
        finally:
            self.engine.stop()
        return script.INTERRUPTED if self.signal_number == signal.SIGINT else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.open_files = allow_open_files(self.open_files)
        asyncio.get_running_loop().set_exception_handler(self.tell_problem)
        await super().startup(sockets)
        host, port = self.listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"ready: http://{shown}:{port}/v1 serves {self.name}", flush=True)

    def tell_problem(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A connection that there is no file for waits. asyncio tells that with a traceback, 2,000
        times a second; we in a line now and then."""
        problem = context.get("exception")
        if not isinstance(problem, OSError) or problem.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() >= self.next_complaint:
            self.next_complaint = loop.time() + REPEAT_SECONDS
            line = "new connections wait: %s; raise ulimit -n, which is %d, or send fewer at once"
            log.warning(line, problem.strerror, self.open_files)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("no new connections; what runs may take %g s", self.drain_seconds)
        cancelling = asyncio.create_task(self._cancel_later())
        await super().shutdown(sockets)
        cancelling.cancel()

    async def _cancel_later(self) -> None:
        await asyncio.sleep(self.drain_seconds)
        self.engine.fail_all(Unavailable("The server is shutting down"))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised once more when all is done."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        self.signal_number = self.signal_number or sig
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


if __name__ == "__main__":
    script.exit(main)
