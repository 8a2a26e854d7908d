"""The agent in a rank: a thread that writes what the rank does, as JSON lines, for diagnose.py.

It samples where the main thread is 20 times a second, tells 4 times a second what it saw, and once
a second what the flight recorder has got. The stacks of all threads and of the collectives, which
cost more, are told only when the rank waits, or fails. What must survive the process's sudden death
stands in a black box: a file mapped into memory, which the kernel keeps.
"""

import atexit
import faulthandler
import fcntl
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import diagnose_frames as frames
import diagnose_hooks
import torch.distributed as dist

TICK_S = 0.05
PULSE, TOLD = 5, 20  # ticks: of a sign of life, and of news from the flight recorder
BOX_SLOT, BOX_SLOTS = 512, 8  # bytes of a call, calls
TCP_ESTABLISHED = "01"


class Agent:
    """What a rank tells. Hooks call `tell` and `note` from its threads; a thread writes."""

    def __init__(self, folder: Path, rank: int, stall_after: float) -> None:
        self.stall_after = stall_after
        self.listening = True  # diagnose_overhead.py switches it off and on
        self.events: deque[dict[str, Any]] = deque()
        self.writing = threading.Lock()
        self.counts: Counter[str] = Counter()  # of steps, backward passes, batches drawn
        self.samples: Counter[tuple[frames.Place | None, str]] = Counter()
        self.told_record = -1
        self.same: tuple[Any, float] = (None, time.time())
        self.reported: Any = None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        stem = folder / f"attempt{attempt}-rank{rank}"
        self.alive = os.open(f"{stem}.alive", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.lockf(self.alive, fcntl.LOCK_EX)  # the kernel lets go of it when the process ends
        self.box = _mapped(Path(f"{stem}.box"))
        self.crash = os.open(f"{stem}.crash", os.O_WRONLY | os.O_CREAT, 0o644)
        faulthandler.enable(self.crash)  # a line for SIGABRT and SIGSEGV, which Python never sees
        faulthandler.register(signal.SIGUSR2, self.crash, all_threads=True)
        self.asked = Path(f"{stem}.ask")  # touched by who wants a report
        self.file = os.open(f"{stem}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.tell(
            "hello", rank=rank, world=int(os.environ.get("WORLD_SIZE", 1)), pid=os.getpid(),
            host=socket.gethostname(), cores=_cores(),
        )  # fmt: skip
        self.flush()

    def tell(self, kind: str, **data: Any) -> None:
        self.events.append({"kind": kind, "t": time.time(), **data})

    def note(self, call: int, **data: Any) -> None:
        """Write the main thread's `call`-th collective into the black box."""
        text = json.dumps({"call": call, "t": time.time(), **data}).encode()[: BOX_SLOT - 1] + b"\n"
        begin = call % BOX_SLOTS * BOX_SLOT
        self.box[begin : begin + len(text)] = text

    def flush(self) -> None:
        with self.writing:
            lines = []
            while self.events:
                lines.append(json.dumps(self.events.popleft(), default=str))
            if lines:
                os.write(self.file, ("\n".join(lines) + "\n").encode())

    def run(self) -> None:
        tick = 0
        while True:
            time.sleep(TICK_S)
            if not self.listening:
                continue
            tick += 1
            self.samples[frames.main_place()] += 1
            if tick % PULSE == 0:
                self.pulse()
                if self.asked.exists():
                    self.asked.unlink()
                    self.report("is asked")
                    self.tell("answered")
            if tick % TOLD == 0 and dist.is_initialized():
                self.collectives(stacks=False)
            self.flush()

    def pulse(self) -> None:
        groups = {}
        if dist.is_initialized():
            for group, status in frames.flight_recorder(False, False)["pg_status"].items():
                enqueued = status["last_enqueued_collective"]
                groups[group] = [enqueued, status["last_completed_collective"]]
        place, leaf = frames.main_place()
        now = time.time()
        state = [groups, place, leaf, dict(self.counts)]
        if state != self.same[0]:
            self.same = (state, now)
        pending = any(enqueued > completed for enqueued, completed in groups.values())
        self.tell(
            "pulse", groups=groups, pending=pending, place=place, leaf=leaf, since=self.same[1],
            cpu=time.process_time(), counts=dict(self.counts),
            samples=[[*key, count] for key, count in self.samples.items()],
        )  # fmt: skip
        self.samples.clear()
        if now - self.same[1] > self.stall_after / 3 and self.reported != state:
            self.reported = state
            self.report("waits")

    def report(self, why: str) -> None:
        """All that is known, at a cost: stacks, connections, then the collectives' lines."""
        self.tell("report", why=why, threads=frames.threads(), unanswered=unanswered())
        self.flush()
        if dist.is_initialized():
            self.collectives(stacks=True)

    def collectives(self, stacks: bool) -> None:
        """Those that are new, or with `stacks` all that the recorder has, with their lines."""
        entries = frames.flight_recorder(True, stacks).get("entries", [])
        rows = []
        for entry in entries:
            if not stacks and entry["record_id"] <= self.told_record:
                continue
            own = [
                (frame["filename"], frame["line"], frame["name"])
                for frame in entry.get("frames", [])
                if frames.is_own(frame["filename"])
            ]
            rows.append(
                [
                    entry["process_group"][0],
                    entry["collective_seq_id"],
                    entry["is_p2p"],
                    entry["profiling_name"].rpartition(":")[2],
                    entry["input_sizes"],
                    entry["input_dtypes"],
                    entry["time_created_ns"] / 1e9,
                    entry["retired"],
                    entry.get("thread_id"),
                    own[:1],
                ]  # fmt: skip
            )
        if entries:
            self.told_record = max(self.told_record, entries[-1]["record_id"])
        if rows:
            self.tell("collectives", rows=rows)

    def last_words(self, status: int | None, error: str | None = None, place: Any = None) -> None:
        """The end of the process, as its own thread saw it come."""
        devices = diagnose_hooks.cuda_device()
        self.tell("exit", status=status, error=error, place=place, devices=devices)
        if dist.is_initialized() or self.told_record >= 0:
            self.collectives(stacks=False)
        self.flush()
        if status or error:
            self.report("failed")
            self.flush()


def activate() -> Agent:
    """Watch this rank from now on; torch has just been imported."""
    folder, rank = os.environ["DIAGNOSE_DIR"], int(os.environ["RANK"])
    agent = Agent(Path(folder), rank, float(os.environ["DIAGNOSE_STALL_AFTER"]))
    diagnose_hooks.install(agent)
    _hear_last_words(agent)
    threading.Thread(target=agent.run, name="diagnose", daemon=True).start()
    return agent


def _hear_last_words(agent: Agent) -> None:
    pid, leave, show = os.getpid(), os._exit, sys.excepthook

    def leave_at_once(status: int) -> None:
        if os.getpid() == pid:  # not a child that this rank forked
            agent.last_words(status)
        leave(status)

    def show_error(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        place = None
        while trace is not None:
            if frames.is_own(trace.tb_frame.f_code.co_filename):
                place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno,
                         trace.tb_frame.f_code.co_name)  # fmt: skip
            trace = trace.tb_next
        agent.last_words(1, f"{kind.__name__}: {error}"[:500], place)
        show(kind, error, trace)

    def leave_in_order() -> None:
        if os.getpid() == pid:
            agent.tell("exit", status=None, error=None, place=None, devices=None)
            agent.flush()

    os._exit, sys.excepthook = leave_at_once, show_error  # type: ignore[assignment]
    atexit.register(leave_in_order)


def _mapped(path: Path) -> mmap.mmap:
    path.write_bytes(b"\n" * BOX_SLOT * BOX_SLOTS)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def unanswered() -> list[str]:
    """This process's TCP peers to which data was sent again and again without an answer (Linux)."""
    own = _open_files()
    peers = []
    for name, width in (("tcp", 8), ("tcp6", 32)):
        table = Path(f"/proc/self/net/{name}")
        for row in table.read_text().splitlines()[1:] if table.exists() else []:
            _, _, peer, state, _, _, retransmits, _, _, inode, *_ = row.split()
            if state == TCP_ESTABLISHED and int(retransmits, 16) and f"socket:[{inode}]" in own:
                peers.append(_address(peer, width))
    return peers


def _open_files() -> set[str]:
    """What this process's file descriptors lead to, such as `socket:[4711]`."""
    found = set()
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return found


def _address(text: str, width: int) -> str:
    """`0B01A8C0:1F90` as 192.168.1.11: the kernel writes four bytes at a time, the last first."""
    raw = bytes.fromhex(text.partition(":")[0][:width])
    words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    if len(words) == 16 and words[:12] == b"\0" * 10 + b"\xff\xff":
        words = words[12:]
    family = socket.AF_INET if len(words) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, words)
