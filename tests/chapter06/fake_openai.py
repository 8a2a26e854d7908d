"""A small OpenAI server in a thread, that answers as a test wants it to."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXT = ["def ", "answer", "(): ", "return ", "42"]


@dataclass
class Fake:
    """What the server does, and what it has done; a test may change it at any time."""

    prefix: str = "vllm:"
    status: int = 200
    delay_s: float = 0.0
    streamed_text: list[str] = field(default_factory=lambda: list(TEXT))
    models: list[str] = field(default_factory=lambda: ["fake"])
    metrics: str | None = None  # instead of the true ones
    miscounted: int = 0
    tells_usage: bool = True
    last_text_is_null: bool = False
    waiting: int = 0
    tokens: int = 0
    answers: int = 0
    running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def counted(self) -> str:
        """What /metrics says, in two lines for a metric, as of two engines."""
        values = {
            "num_requests_running": self.running,
            "num_requests_waiting": self.waiting if self.running else 0,
            "kv_cache_usage_perc": 0.25,
            "generation_tokens_total": self.tokens + self.miscounted,
            "request_success_total": self.answers,
            "time_to_first_token_seconds_sum": 0.5 * self.answers,
            "time_to_first_token_seconds_count": self.answers,
        }
        halves = [
            f'{self.prefix}{name}{{engine="{engine}"}} {value / 2}'
            for name, value in values.items()
            for engine in (0, 1)
        ]
        return "\n".join(["# a comment", *halves]) + "\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with 5, a load of more at once waits for TCP to try again

    def handle_error(self, *unused: Any) -> None:
        """A client that leaves is none of the server's faults; any other error is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*unused)


@contextmanager
def fake_openai(**settings: Any) -> Iterator[Fake]:
    fake = Fake(**settings)
    server = _Server(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *unused: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/metrics":
                text = fake.counted() if fake.metrics is None else fake.metrics
                return self.answer(text.encode(), "text/plain")
            listed = [{"id": name, "object": "model"} for name in fake.models]
            self.answer(json.dumps({"object": "list", "data": listed}).encode())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.running += 1
                fake.most_running = max(fake.most_running, fake.running)
            time.sleep(fake.delay_s)
            if fake.status == 200:
                self.complete(asked)
            with fake.lock:
                fake.running -= 1
            if fake.status != 200:
                error = {"error": {"message": "it is refused", "type": "test", "code": None}}
                self.answer(json.dumps(error).encode(), status=fake.status)

        def complete(self, asked: dict) -> None:
            pieces = fake.streamed_text if asked.get("stream") else TEXT
            told = {"prompt_tokens": 3, "completion_tokens": len(pieces), "total_tokens": 8}
            usage = told if fake.tells_usage else None
            with fake.lock:
                fake.tokens += len(pieces)
                fake.answers += 1
            if not asked.get("stream"):
                whole = _chunk("".join(pieces), "length") | {"usage": usage}
                return self.answer(json.dumps(whole).encode())
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            last = len(pieces) - 1
            chunks = [_chunk(p, "length" if i == last else None) for i, p in enumerate(pieces)]
            if fake.last_text_is_null:
                chunks.append(_chunk(None, None))
            if usage:
                chunks.append({**_chunk("", None), "choices": [], "usage": usage})
            for chunk in chunks:
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def answer(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _chunk(text: str | None, reason: str | None) -> dict:
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    return {
        "id": "x", "object": "text_completion", "created": 0, "model": "fake", "choices": [choice],
    }  # fmt: skip
