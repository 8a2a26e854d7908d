"""Prefill and decode on different workers: a worker around an engine, and who sends it requests.

Every worker is a whole engine, so that any can do all of a request: alone (`whole`), or its prompt
(`prefill`), or what follows (`reserve`, then blocks come from the other). Who does what, the router
says over a connection of its own to each; the blocks go from worker to worker (`kv_transfer`).

    router                 decode worker            prefill worker
      reserve ----------------->| takes blocks
      <------------- reserved --|
      prefill ------------------------------------------>| computes a chunk
      <------------------------------------------ piece -|   (the blocks go to the decode worker,
      piece ------------------->| waits for it            |    while the next chunk is computed)
      <------------------------------------------ first -| the first token, to the client at once
      first ------------------->| decodes
      <-------------- tokens ---|

Reserving comes first, as in SGLang: a prompt that nobody has room for need not be computed.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from torch import Tensor
from torch.distributed import Store

from distlab.errors import RunError
from distlab.runtime import Runtime
from paged_engine.config import EngineConfig
from paged_engine.engine import Engine
from paged_engine.request import Sequence as EngineSequence
from paged_engine.sampling_params import SamplingParams
from radix.kv_transfer import ExportingRunner, Layout, Mover

BEAT_S = 0.25  # a worker says something at least so often
ADDRESS = "disaggregated/router"  # where the router listens, in the workers' store


def tell(connection: Connection, kind: str, **what: Any) -> None:
    connection.send_bytes(json.dumps({"kind": kind, **what}).encode())


def heard(connection: Connection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


@dataclass
class Arriving:
    """A reserved request at a decode worker: its blocks come in pieces, and its first token."""

    sequence: EngineSequence
    missing: int  # blocks
    token: int | None = None


class Worker:
    """One engine that does as the router says, until the router is gone."""

    def __init__(self, config: EngineConfig, router: Connection, job: Runtime) -> None:
        self.router, self.rank = router, job.rank
        self.runner = ExportingRunner(config, self._hand_over)
        self.engine = Engine(config, runner=self.runner)
        self.layout = Layout.of(self.runner.cache)
        self.mover = Mover(self.layout, self.runner.shard.device, job.backend)
        self.peers: dict[str, int] = {}  # request -> the worker that gets the prompt's blocks
        self.waiting: deque[dict[str, Any]] = deque()  # for room in the cache
        self.arriving: dict[str, Arriving] = {}
        tell(router, "hello", rank=self.rank, layout=asdict(self.layout))

    def run(self) -> None:
        said, is_busy = time.monotonic(), False
        while True:
            for ready in wait([self.router, self.mover.wake], 0 if is_busy else BEAT_S / 2):
                if ready is self.router and not self._hear_all():
                    return
            self._take_arrivals()
            self._reserve()
            is_busy = self._step()
            if time.monotonic() - said > BEAT_S:
                said = time.monotonic()
                tell(self.router, "beat")

    def _hear_all(self) -> bool:
        """Do what the router asks; False: it is gone."""
        try:
            while self.router.poll():
                message = heard(self.router)
                getattr(self, f"on_{message['kind']}")(message)
        except (EOFError, ConnectionError):
            return False
        return True

    def on_whole(self, message: dict[str, Any]) -> None:
        self.engine.add_request(message["prompt"], _greedy(message["count"]), message["name"])

    def on_reserve(self, message: dict[str, Any]) -> None:
        self.waiting.append(message)

    def on_prefill(self, message: dict[str, Any]) -> None:
        name = message["name"]
        self.peers[name] = message["peer"]
        self.runner.export(name, message["first"])
        self.engine.add_request(message["prompt"], _greedy(1), name)

    def on_piece(self, message: dict[str, Any]) -> None:
        self.mover.expect(message["peer"], message["name"], message["first"], message["count"])

    def on_first(self, message: dict[str, Any]) -> None:
        if (one := self.arriving.get(message["name"])) is not None:
            one.token = message["token"]
            self._adopt(message["name"], one)

    def on_cancel(self, message: dict[str, Any]) -> None:
        name = message["name"]
        self.waiting = deque(one for one in self.waiting if one["name"] != name)
        self.arriving.pop(name, None)
        self.peers.pop(name, None)
        self.runner.forget(name)
        self.engine.cancel(name)

    def _hand_over(self, name: str, first: int, contents: Tensor) -> None:
        peer = self.peers[name]
        tell(self.router, "piece", name=name, first=first, count=len(contents), peer=peer)
        self.mover.send(peer, name, first, contents)

    def _reserve(self) -> None:
        while self.waiting:
            message = self.waiting[0]
            name, prompt = message["name"], message["prompt"]
            sequence = self.engine.reserve(prompt, _greedy(message["count"]), name)
            if sequence is None:
                return
            self.waiting.popleft()
            first = sequence.computed // self.layout.block_size
            self.arriving[name] = Arriving(sequence, len(sequence.block_table) - first)
            tell(self.router, "reserved", name=name, first=first)

    def _take_arrivals(self) -> None:
        for arrival in self.mover.arrivals():
            if arrival.contents is None:
                tell(self.router, "lost", name=arrival.name)
            elif (one := self.arriving.get(arrival.name)) is not None:
                count = len(arrival.contents)
                table = one.sequence.block_table[arrival.first : arrival.first + count]
                self.runner.cache.write(table, arrival.contents)
                one.missing -= count
                self._adopt(arrival.name, one)

    def _adopt(self, name: str, one: Arriving) -> None:
        if one.missing == 0 and one.token is not None:
            del self.arriving[name]
            output = self.engine.adopt(name, one.token)
            tell(self.router, "adopted", name=name, is_last=output.finish_reason is not None)

    def _step(self) -> bool:
        """One step of the engine; whether it computed anything."""
        before = self.engine.stats().steps
        made = []
        for output in self.engine.step():
            name, token = output.request_id, output.token_ids[0]
            if self.peers.pop(name, None) is not None:
                tell(self.router, "first", name=name, token=token)
            else:
                made.append((name, token, output.finish_reason is not None))
        if made:
            tell(self.router, "tokens", made=made)
        return self.engine.stats().steps > before


def _greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def work(config: EngineConfig, store: Store, job: Runtime) -> None:
    """Be a worker of the router that `store` names, until it closes the connection."""
    host, port = json.loads(store.get(ADDRESS))
    with Client((host, port)) as router:
        worker = Worker(config, router, job)
        with worker.engine:
            worker.run()


@dataclass
class Job:
    """A request as its client sees it; times are seconds since the load began."""

    prompt: list[int]
    count: int  # tokens wanted
    arrival: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the tokens
    pieces: list[tuple[float, int]] = field(default_factory=list)  # announced at, blocks
    adopted: float | None = None
    attempts: int = 0
    by: tuple[int | None, int | None] = (None, None)  # workers: of the prompt, of what follows

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival

    @property
    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / max(1, self.count - 1)


class Router:
    """Sends jobs to the workers, to the least loaded of a kind, and again where one is lost.

    A worker is dead when its connection ends, or when it has said nothing for `silent_s`. What it
    had is computed again by others, from the prompt and the tokens that the client has already.
    """

    def __init__(
        self, listener: Listener, store: Store, workers: int, limit_s: float, silent_s: float
    ) -> None:
        self.listener, self.limit_s, self.silent_s = listener, limit_s, silent_s
        store.set(ADDRESS, json.dumps(listener.address))
        self.connections: dict[int, Connection] = {}
        self.layouts: dict[int, Layout] = {}
        self.heard: dict[int, float] = {}
        self.dead: list[int] = []
        self._accept(workers)

    def _accept(self, workers: int) -> None:
        deadline = time.monotonic() + self.limit_s
        server: Any = self.listener._listener._socket  # type: ignore[attr-defined]
        for _ in range(workers):
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = self.listener.accept()
            except TimeoutError as error:
                raise RunError(
                    f"{len(self.connections)} of {workers} workers came within {self.limit_s:g} s"
                ) from error
            if not connection.poll(self.limit_s):
                raise RunError(f"a worker did not start within {self.limit_s:g} s")
            try:
                hello = heard(connection)
            except EOFError as error:
                raise RunError("a worker ended before it was ready") from error
            self.connections[hello["rank"]] = connection
            self.layouts[hello["rank"]] = Layout(**hello["layout"])

    def serve(
        self,
        jobs: Sequence[Job],
        prefills: Sequence[int],
        decodes: Sequence[int],
        after: Callable[[Job], None] = lambda job: None,
    ) -> None:
        """Have all jobs done, each from its arrival on; `after` is called with each new token.

        Without `prefills` the `decodes` do everything. Raises `UsageError` where the two cannot
        understand each other's blocks, before anything is sent, and `RunError` at the limit.
        """
        for giver in prefills:
            for taker in decodes:
                self.layouts[giver].refuse_other(self.layouts[taker])
        alive = self.connections.keys()
        kinds = [[rank for rank in kind if rank in alive] for kind in (prefills, decodes)]
        _Load(self, kinds[0], kinds[1], after).run(jobs)

    def close(self) -> None:
        """Let the workers end, each with what it has begun given up."""
        for connection in self.connections.values():
            connection.close()
        self.connections.clear()


class _Load:
    """One call of `Router.serve`."""

    def __init__(
        self,
        router: Router,
        prefills: list[int],
        decodes: list[int],
        after: Callable[[Job], None],
    ) -> None:
        self.router, self.prefills, self.decodes, self.after = router, prefills, decodes, after
        self.names: dict[str, Job] = {}  # of each job's last attempt; earlier ones are forgotten
        self.started = time.monotonic()

    def run(self, jobs: Sequence[Job]) -> None:
        router, coming = self.router, deque(sorted(jobs, key=lambda job: job.arrival))
        router.heard = dict.fromkeys(router.connections, self.started)
        while coming or self.names:
            while coming and coming[0].arrival <= self.now():
                self.dispatch(coming.popleft())
            if self.now() > router.limit_s:
                raise RunError(f"{len(self.names)} requests had no end after {router.limit_s:g} s")
            pause = coming[0].arrival - self.now() if coming else BEAT_S
            by_connection = {one: rank for rank, one in router.connections.items()}
            for ready in wait(list(by_connection), min(BEAT_S, max(0.0, pause))):
                self.hear(by_connection[ready])  # type: ignore[index]
            for rank, last in list(router.heard.items()):
                if time.monotonic() - last > router.silent_s:
                    self.bury(rank)

    def now(self) -> float:
        return time.monotonic() - self.started

    def dispatch(self, job: Job) -> None:
        """Choose its workers and begin, or begin again with the tokens that it has."""
        job.attempts += 1
        name = f"{id(job)}.{job.attempts}"
        self.names[name] = job
        job.pieces, job.adopted = [], None
        rest = {"name": name, "prompt": job.prompt + job.tokens,
                "count": job.count - len(job.tokens)}  # fmt: skip
        if self.prefills and self.decodes and job.attempts <= len(self.router.connections):
            job.by = self.least_loaded(self.prefills, 0), self.least_loaded(self.decodes, 1)
            self.tell(job.by[1], "reserve", **rest)
            return
        everyone = self.decodes or self.prefills
        if not everyone:
            raise RunError(f"no worker is left; {len(self.names)} requests are not answered")
        job.by = None, self.least_loaded(everyone, 1)
        self.tell(job.by[1], "whole", **rest)

    def least_loaded(self, workers: list[int], part: int) -> int:
        """Prompt tokens count for who computes prompts, requests for who decodes."""
        mine = [(job.by[part], len(job.prompt) if part == 0 and not job.tokens else 1)
                for job in self.names.values()]  # fmt: skip
        return min(workers, key=lambda rank: sum(n for by, n in mine if by == rank))

    def tell(self, rank: int | None, kind: str, **what: Any) -> None:
        if rank in self.router.connections:
            try:
                tell(self.router.connections[rank], kind, **what)
            except OSError:
                self.bury(rank)

    def hear(self, rank: int) -> None:
        connection = self.router.connections.get(rank)
        try:
            while connection is not None and connection.poll():
                message = heard(connection)
                self.router.heard[rank] = time.monotonic()
                getattr(self, f"on_{message['kind']}")(rank, message)
                connection = self.router.connections.get(rank)
        except (EOFError, OSError):
            self.bury(rank)

    def bury(self, rank: int) -> None:
        """Go on without this worker: what it had begun is begun again elsewhere."""
        if rank not in self.router.connections:
            return
        self.router.connections.pop(rank).close()
        self.router.heard.pop(rank, None)
        self.router.dead.append(rank)
        for workers in (self.prefills, self.decodes):
            if rank in workers:
                workers.remove(rank)
        for name, job in list(self.names.items()):
            # Who computes prompts has done its part once all blocks are at the other.
            if job.by[1] == rank or (job.by[0] == rank and job.adopted is None):
                self.again(name)

    def again(self, name: str) -> None:
        if (job := self.names.pop(name, None)) is not None:
            for rank in job.by:
                self.tell(rank, "cancel", name=name)
            self.dispatch(job)

    def on_beat(self, rank: int, message: dict[str, Any]) -> None:
        pass

    def on_reserved(self, rank: int, message: dict[str, Any]) -> None:
        if (job := self.names.get(message["name"])) is not None:
            self.tell(job.by[0], "prefill", name=message["name"], prompt=job.prompt + job.tokens,
                      first=message["first"], peer=rank)  # fmt: skip

    def on_piece(self, rank: int, message: dict[str, Any]) -> None:
        """Also of a job that is given up: what the one side sends the other has to receive."""
        if (job := self.names.get(message["name"])) is not None:
            job.pieces.append((self.now(), message["count"]))
        self.tell(message["peer"], **{**message, "peer": rank})

    def on_first(self, rank: int, message: dict[str, Any]) -> None:
        if (job := self.names.get(message["name"])) is not None:
            self.tell(job.by[1], "first", name=message["name"], token=message["token"])
            self.add(job, message["token"])

    def on_adopted(self, rank: int, message: dict[str, Any]) -> None:
        if (job := self.names.get(message["name"])) is not None:
            job.adopted = self.now()
            if message["is_last"]:
                del self.names[message["name"]]

    def on_tokens(self, rank: int, message: dict[str, Any]) -> None:
        for name, token, is_last in message["made"]:
            if (job := self.names.get(name)) is not None:
                if is_last:
                    del self.names[name]
                self.add(job, token)

    def on_lost(self, rank: int, message: dict[str, Any]) -> None:
        self.again(message["name"])

    def add(self, job: Job, token: int) -> None:
        job.tokens.append(token)
        job.times.append(self.now())
        self.after(job)
