"""The workers' KV events: what each of their prefix caches holds, told as it changes.

vLLM and SGLang publish them alike (ZMQ PUB: a topic, a sequence number, and msgpack of
[time, events, rank]; the events are maps, or arrays in older versions, tagged with their name).
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from distlab.errors import UsageError
from llm_router.prefix_index import PrefixIndex
from llm_router.worker import Worker

FIELDS = {  # of the events that are arrays
    "BlockStored": (
        "type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
        "lora_name", "extra_keys",
    ),
    "BlockRemoved": ("type", "block_hashes", "medium"),
}  # fmt: skip
MOST_AT_ONCE = 256  # messages, before requests have their turn again
DEVICE = (None, "GPU", "gpu")  # other media are farther away than the cache that is mirrored


class Mirrors:
    """Subscribes to every worker that names an endpoint, and keeps the index as they say."""

    def __init__(self, index: PrefixIndex[Worker], block_size: int) -> None:
        self.index, self.block_size = index, block_size
        self.events = self.gaps = self.unread = 0
        self.other_size = False  # has been told
        self._sockets: dict[Worker, zmq.Socket[bytes]] = {}
        self._next: dict[Worker, int] = {}

    def follow(self, worker: Worker) -> None:
        """Raises `UsageError` where its endpoint is none."""
        if worker.kv_events is None or worker in self._sockets:
            return
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            socket.connect(worker.kv_events)
        except zmq.ZMQError as error:
            socket.close(0)
            raise UsageError(f"KV events at {worker.kv_events!r}: {error}") from error
        self._sockets[worker] = socket
        loop = asyncio.get_running_loop()
        loop.add_reader(socket.fileno(), self._read, worker)
        loop.call_soon(self._read, worker)

    def leave(self, worker: Worker) -> None:
        if (socket := self._sockets.pop(worker, None)) is not None:
            asyncio.get_running_loop().remove_reader(socket.fileno())
            socket.close(0)
            self._next.pop(worker, None)

    def close(self) -> None:
        for worker in [*self._sockets]:
            self.leave(worker)

    def _read(self, worker: Worker) -> None:
        """ZMQ's file descriptor tells of a change, not of a message: read until there is none."""
        if (socket := self._sockets.get(worker)) is None:
            return
        for _ in range(MOST_AT_ONCE):
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._message(worker, parts)
        asyncio.get_running_loop().call_soon(self._read, worker)

    def _message(self, worker: Worker, parts: list[bytes]) -> None:
        try:
            *_, number, payload = parts
            self._in_order(worker, int.from_bytes(number, "big"))
            for event in msgspec.msgpack.decode(payload)[1]:
                self.apply(worker, event)
        except (ValueError, TypeError, KeyError, IndexError, msgspec.DecodeError):
            self.unread += 1  # what cannot be read is not believed, nor anything before it
            self.index.clear(worker)

    def _in_order(self, worker: Worker, number: int) -> None:
        """After a gap, or a restart, nothing is known."""
        if number != self._next.get(worker, number):
            self.gaps += 1
            self.index.clear(worker)
        self._next[worker] = number + 1

    def apply(self, worker: Worker, event: dict[str, Any] | Sequence[Any]) -> None:
        if not isinstance(event, dict):
            names = FIELDS.get(event[0], ("type",))
            event = dict(zip(names, event, strict=False))
        self.events += 1
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self.index.clear(worker)
        elif event.get("medium") not in DEVICE:
            return
        elif kind == "BlockStored" and event["block_size"] != self.block_size:
            if not self.other_size:
                told = f"{worker.url} has blocks of {event['block_size']} tokens"
                print(f"{told}; use --block-size, or its events are not read", file=sys.stderr)
            self.other_size = True
            self.unread += 1
        elif kind == "BlockStored" and not _is_of_more_than_tokens(event):
            self.index.stored(
                worker, event["block_hashes"], event["parent_block_hash"], event["token_ids"],
                self.block_size,
            )  # fmt: skip
        elif kind == "BlockRemoved":
            self.index.removed(worker, event["block_hashes"])


def _is_of_more_than_tokens(event: dict[str, Any]) -> bool:
    """An adapter's keys and values, or those of an image: plain requests do not find them."""
    adapter = event.get("lora_id") is not None or event.get("lora_name") is not None
    return adapter or any(key is not None for key in event.get("extra_keys") or ())
