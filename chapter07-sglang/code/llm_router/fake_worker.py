"""A worker without a model, for tests and comparisons of routers: an engine's times and its cache.

It computes nothing: a prompt takes --prefill-us for each token that its block cache has not, one
request after the other; the answer takes --decode-ms, or that long for each event with
--per-token. Its cache is vLLM's: blocks of 16 tokens, found by the hashes of their prefixes, the
longest unused given up first, and told in KV events. A word is a token, and the next word follows
from all words before it (and from a seed and its place, where there is one), so that a continued
answer can be compared with an unbroken one.

    python -m llm_router.fake_worker --port 0

POST /fault {"mode": "hang"} makes it misbehave; see `MODES`.
"""

import argparse
import asyncio
import os
import time
from typing import Any

import msgspec
import orjson
import uvloop
import zmq

from distlab.errors import RunError
from llm_router import http
from llm_router.fake_model import BlockCache, Words, prompt_of
from llm_router.http import HEAD_END, RequestHead

MODES = (
    "ok", "hang", "silent", "status", "nonsense", "half-event", "half-answer", "cut", "no-continue",
)  # fmt: skip


class Engine:
    """The worker's state, of all of its connections."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.mode, self.status, self.after = "ok", 400, 4
        self.cache = BlockCache(args.cache_blocks, args.block_size)
        self.free_at = 0.0  # when the prefill of all that waits is done
        self.running = self.peak = self.requests = self.aborted = self.missed = 0
        self.fixed = orjson.dumps({
            "id": "cmpl-fixed", "object": "text_completion", "created": 1, "model": args.model,
            "choices": [{"index": 0, "text": "x" * 700, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 64, "total_tokens": 164},
        })  # fmt: skip
        self.publisher: zmq.Socket[bytes] | None = None
        self._sequence = 0
        if args.kv_events:
            self.publisher = zmq.Context.instance().socket(zmq.PUB)
            self.publisher.bind(args.kv_events)

    def publish(self) -> None:
        """As vLLM's and SGLang's publishers: topic, sequence number, msgpack of a batch."""
        events, self.cache.events = self.cache.events, []
        if self.publisher is not None and events:
            batch = msgspec.msgpack.encode([time.time(), events, 0])
            number = self._sequence.to_bytes(8, "big")
            self.publisher.send_multipart([b"", number, batch])
            self._sequence += 1

    def reset(self) -> None:
        """An empty cache, and nothing counted."""
        self.cache = BlockCache(self.args.cache_blocks, self.args.block_size)
        self.cache.events.append({"type": "AllBlocksCleared"})
        self.publish()
        self.peak = self.requests = self.aborted = self.missed = 0

    def stats(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(), "running": self.running, "peak": self.peak,
            "requests": self.requests, "aborted": self.aborted, "missed": self.missed,
            "queried": self.cache.queried, "hit": self.cache.hit,
        }  # fmt: skip


class Connection(asyncio.Protocol):
    """One connection of a router's, or a client's."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.args = engine, engine.args
        self.transport: Any = None
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None
        self._left = 0
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._task is not None and not self._task.done():
            self.engine.aborted += 1
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        end = data.find(HEAD_END)
        if end < 0:
            self._buffer = data
            return
        if self.args.fixed and (at := data.find(b"ontent-")) >= 0:  # the quickest way
            at = data.lower().find(b"content-length: ", at, end)
            whole = end + 4 + int(data[at + 16 : data.find(b"\r", at)])
            if data.startswith(b"POST /v1/completions") and len(data) >= whole:
                self._buffer = data[whole:]
                self._answer_fixed(b'"stream":true' in data or b'"stream": true' in data)
                return
        head = RequestHead(data[: end + 4])
        whole = end + 4 + (head.fields.length or 0)
        if len(data) < whole:
            self._buffer = data
            return
        self._buffer = data[whole:]
        self._route(head, data[end + 4 : whole])

    def _answer_fixed(self, stream: bool) -> None:
        if stream:
            self.transport.write(STREAM_HEAD)
            self._left = self.args.events
            self._next_fixed()
        else:
            body = self.engine.fixed
            self.transport.write(JSON_HEAD % (len(body)) + body)

    def _next_fixed(self) -> None:
        """One event for each turn of the loop: each is written, and read, alone."""
        if self._left:
            self._left -= 1
            self.transport.write(FIXED_EVENT)
            self._loop.call_soon(self._next_fixed)
        else:
            self.transport.write(http.chunk(b"data: [DONE]\n\n") + http.LAST_CHUNK)

    def _route(self, head: RequestHead, body: bytes) -> None:
        engine, path = self.engine, head.path
        if path in (b"/health", b"/v1/models", b"/stats", b"/get_model_info", b"/server_info"):
            card = {"id": self.args.model, "object": "model", "created": 1, "owned_by": "fake"}
            replies: dict[bytes, Any] = {
                b"/health": {}, b"/stats": engine.stats(),
                b"/v1/models": {"object": "list", "data": [card]},
            }  # fmt: skip
            info = {"model_path": self.args.model, "served_model_name": self.args.model}
            self._json(200 if engine.mode != "sick" else 503, replies.get(path, info))
        elif path == b"/reset":
            engine.reset()
            self._json(200, {})
        elif path == b"/fault":
            wanted = orjson.loads(body)
            engine.mode = wanted["mode"]
            engine.status = wanted.get("status", engine.status)
            engine.after = wanted.get("after", engine.after)
            self._json(200, {})
        elif path.endswith(b"/render"):  # vLLM's: what a request's prompt is in tokens
            made = {"token_ids": prompt_of(orjson.loads(body))}
            self._json(200, made if b"/chat/" in path else [made])
        elif head.method == b"POST":
            self._task = self._loop.create_task(self._answer(path, body))
        else:
            self._json(405, {"error": {"message": "use POST"}})

    def _json(self, status: int, value: Any) -> None:
        body = orjson.dumps(value)
        reply = http.Reply(status, body)
        self.transport.write(reply.wire())

    async def _answer(self, path: bytes, raw: bytes) -> None:
        engine = self.engine
        engine.requests += 1
        engine.running += 1
        engine.peak = max(engine.peak, engine.running)
        try:
            await self._respond(path, raw)
        finally:
            engine.running -= 1

    async def _respond(self, path: bytes, raw: bytes) -> None:
        engine, mode = self.engine, self.engine.mode
        if mode == "hang" or mode == "silent" and b'"stream":true' not in raw:
            await asyncio.sleep(3600)
        if mode == "nonsense":
            self.transport.write(b"\x00\x01 this is no HTTP\r\n\r\n")
            return
        if mode == "status":
            self._json(engine.status, {"error": {"message": f"status {engine.status}"}})
            return
        try:
            body = orjson.loads(raw)
            tokens = prompt_of(body)
            count = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
            if not tokens or not 0 < count < 100_000:
                raise ValueError("nothing to compute, or too much")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._json(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
            return
        if mode == "no-continue" and body.get("continue_final_message"):
            self._json(400, {"error": {"message": "continue_final_message is not supported"}})
            return
        words = Words(tokens, body.get("seed") if body.get("temperature", 1) else None)
        texts = [words.next() for _ in range(count)]
        await self._prefill(tokens, [int(text[2:]) for text in texts])
        if not body.get("stream"):
            await asyncio.sleep(self.args.decode_ms / 1000)
        answer = Answer(path, self.args.model, body, len(tokens))
        if body.get("stream"):
            await self._stream(answer, texts)
            return
        whole = answer.whole("".join(texts), count)
        if mode == "half-answer":
            self.transport.write(JSON_HEAD % len(whole) + whole[: len(whole) // 2])
            os._exit(1)
        self.transport.write(JSON_HEAD % len(whole) + whole)

    async def _prefill(self, tokens: list[int], answer: list[int]) -> None:
        engine = self.engine
        missed = engine.cache.use(tokens)
        engine.cache.use(tokens + answer, counted=False)
        engine.missed += missed
        now = self._loop.time()
        engine.free_at = max(now, engine.free_at) + missed * self.args.prefill_us / 1e6
        await asyncio.sleep(engine.free_at - now)
        engine.publish()

    async def _stream(self, answer: "Answer", texts: list[str]) -> None:
        engine, count = self.engine, len(texts)
        self.transport.write(STREAM_HEAD)
        for event in answer.opening():
            self.transport.write(http.chunk(event))
        for i, text in enumerate(texts):
            if i or not self.args.per_token:
                share = 1 if self.args.per_token else count
                await asyncio.sleep(self.args.decode_ms / 1000 / share)
            event = http.chunk(answer.event(text, "length" if i == count - 1 else None))
            if i == engine.after and engine.mode in ("half-event", "cut"):
                self.transport.write(
                    event[: len(event) // 2] if engine.mode == "half-event" else b""
                )
                self.transport.close()
                return
            if i == engine.after and engine.mode == "silent":
                await asyncio.sleep(3600)
            self.transport.write(event)
        for event in answer.ending(count):
            self.transport.write(http.chunk(event))
        self.transport.write(http.LAST_CHUNK)


class Answer:
    """The objects of the OpenAI API."""

    def __init__(self, path: bytes, model: str, body: dict[str, Any], prompt: int) -> None:
        self.chat = path.endswith(b"chat/completions")
        self.prompt = prompt
        kind = "chat.completion" if self.chat else "text_completion"
        self.base = {
            "id": f"cmpl-{os.urandom(6).hex()}", "object": kind, "created": int(time.time()),
            "model": model,
        }  # fmt: skip
        self.usage_wanted = (body.get("stream_options") or {}).get("include_usage")
        if self.chat and body.get("stream"):
            self.base["object"] = "chat.completion.chunk"

    def usage(self, count: int) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": count,
                "total_tokens": self.prompt + count}  # fmt: skip

    def whole(self, text: str, count: int) -> bytes:
        part = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **part, "finish_reason": "length"}
        return orjson.dumps({**self.base, "choices": [choice], "usage": self.usage(count)})

    def opening(self) -> list[bytes]:
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._data(choices=[{"index": 0, "delta": delta, "finish_reason": None}])]

    def event(self, text: str, reason: str | None) -> bytes:
        part = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._data(choices=[{"index": 0, **part, "finish_reason": reason}])

    def ending(self, count: int) -> list[bytes]:
        usage = [self._data(choices=[], usage=self.usage(count))] if self.usage_wanted else []
        return [*usage, b"data: [DONE]\n\n"]

    def _data(self, **more: Any) -> bytes:
        return b"data: " + orjson.dumps({**self.base, **more}) + b"\n\n"


JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
FIXED_EVENT = http.chunk(
    b'data: {"id":"cmpl-fixed","object":"text_completion","created":1,"model":"fake","choices":'
    b'[{"index":0,"text":" token","logprobs":null,"finish_reason":null}]}\n\n'
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0)
    add("--model", default="fake")
    add("--cache-blocks", type=int, default=512)
    add("--block-size", type=int, default=16)
    add("--prefill-us", type=float, default=50.0, help="for each token that is not cached")
    add("--decode-ms", type=float, default=16.0, help="for an answer")
    add("--per-token", action="store_true", help="--decode-ms is for each token of a stream")
    add("--kv-events", metavar="ENDPOINT", help="publish them there, such as tcp://127.0.0.1:5557")
    add("--fixed", action="store_true", help="the same answer at once: to measure a router")
    add("--events", type=int, default=64, help="of a stream with --fixed")


async def serve(args: argparse.Namespace) -> None:
    loop, engine = asyncio.get_running_loop(), Engine(args)
    try:
        server = await loop.create_server(lambda: Connection(engine), args.host, args.port)
    except OSError as error:
        raise RunError(f"--port {args.port}: {error}") from error
    port = server.sockets[0].getsockname()[1]
    print(f"fake worker at http://{args.host}:{port}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser)
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
