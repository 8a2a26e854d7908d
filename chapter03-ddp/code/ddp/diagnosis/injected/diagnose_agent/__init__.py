"""The agent in a rank: a thread that writes what the rank does, as JSON lines, for diagnose.py.

It samples where the main thread is 20 times a second, tells 4 times a second what it saw, and once
a second what the flight recorder has got. The stacks of all threads and of the collectives, which
cost more, are told only when the rank waits, or fails. What must survive the process's sudden death
stands in a black box: a file mapped into memory, which the kernel keeps.
"""

import faulthandler
import fcntl
import json
import mmap
import os
import pickle
import signal
import site
import socket
import sys
import sysconfig
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

TICK_S = 0.05
PULSE, TOLD = 5, 20  # ticks: of a sign of life, and of news from the flight recorder
BOX_SLOT, BOX_SLOTS = 512, 8  # bytes of a call, calls
TCP_ESTABLISHED = "01"

Place = tuple[str, int, str]  # file, line, function

FOLDERS = {
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *site.getsitepackages(),
    site.getusersitepackages(),
    str(Path(__file__).parents[1]),  # this agent and its sitecustomize
    str(Path(dist.__file__).parents[2]),
}
LIBRARIES = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in FOLDERS)
BENCH = f"{os.sep}distlab{os.sep}"  # this book's library is one too
_own: dict[str, bool] = {}


class Agent:
    """What a rank tells. Hooks call `tell` and `note` from its threads; a thread writes."""

    def __init__(self, folder: Path, rank: int, stall_after: float) -> None:
        self.stall_after = stall_after
        self.listening = True  # diagnose_overhead.py switches it off and on
        self.events: deque[dict[str, Any]] = deque()
        self.writing = threading.Lock()
        self.counts: Counter[str] = Counter()  # of steps, backward passes, batches drawn
        self.samples: Counter[tuple[Place | None, str]] = Counter()
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
            self.samples[main_place()] += 1
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
            for group, status in flight_recorder(False, False)["pg_status"].items():
                enqueued = status["last_enqueued_collective"]
                groups[group] = [enqueued, status["last_completed_collective"]]
        place, leaf = main_place()
        now = time.time()
        state = [groups, place, leaf, dict(self.counts)]
        if state != self.same[0]:
            self.same = (state, now)
        pending = any(enqueued > completed for enqueued, completed in groups.values())
        self.tell(
            "pulse", groups=groups, pending=pending, place=place, leaf=leaf, since=self.same[1],
            cpu=_wanted(), counts=dict(self.counts),
            samples=[[*key, count] for key, count in self.samples.items()],
        )  # fmt: skip
        self.samples.clear()
        if now - self.same[1] > self.stall_after / 3 and self.reported != state:
            self.reported = state
            self.report("waits")

    def report(self, why: str) -> None:
        """All that is known, at a cost: stacks, connections, then the collectives' lines."""
        self.tell("report", why=why, threads=threads(), unanswered=unanswered())
        self.flush()
        if dist.is_initialized():
            self.collectives(stacks=True)

    def collectives(self, stacks: bool) -> None:
        """Those that are new, or with `stacks` all that the recorder has, with their lines."""
        entries = flight_recorder(True, stacks).get("entries", [])
        rows = []
        for entry in entries:
            if not stacks and entry["record_id"] <= self.told_record:
                continue
            own = [
                (frame["filename"], frame["line"], frame["name"])
                for frame in entry.get("frames", [])
                if is_own(frame["filename"])
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
        devices = cuda_device()
        self.tell("exit", status=status, error=error, place=place, devices=devices)
        if dist.is_initialized() or self.told_record >= 0:
            self.collectives(stacks=False)
        self.flush()
        if status or error:
            self.report("failed")
            self.flush()


def _mapped(path: Path) -> mmap.mmap:
    path.write_bytes(b"\n" * BOX_SLOT * BOX_SLOTS)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _wanted() -> float:
    """Seconds of the processor that this process had, or that its main thread waited for (Linux).

    On a busy machine one that computes may get a tenth of the time; it is no idle one for that.
    """
    waits = Path("/proc/self/schedstat")
    waited = int(waits.read_text(encoding="utf-8").split()[1]) / 1e9 if waits.exists() else 0.0
    return time.process_time() + waited


def unanswered() -> list[str]:
    """This process's TCP peers to which data was sent again and again without an answer (Linux)."""
    own = _open_files()
    peers = []
    for name, width in (("tcp", 8), ("tcp6", 32)):
        table = Path(f"/proc/self/net/{name}")
        for row in table.read_text(encoding="utf-8").splitlines()[1:] if table.exists() else []:
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


def cuda_device(device: torch.device | None = None) -> dict[str, Any] | None:
    """The CUDA device that this rank uses: its number, identity, and how many there are."""
    if not torch.cuda.is_initialized() or (device is not None and device.type != "cuda"):
        return None
    index = device.index if device is not None else torch.cuda.current_device()
    identity = str(torch.cuda.get_device_properties(index).uuid)
    return {"index": index, "uuid": identity, "count": torch.cuda.device_count()}


def is_own(filename: str) -> bool:
    """Whether a file is the user's: no library's, and no frozen or generated code."""
    known = _own.get(filename)
    if known is None:
        real = os.path.realpath(filename)
        known = not (filename.startswith("<") or real.startswith(LIBRARIES) or BENCH in real)
        _own[filename] = known
    return known


def own_place(frame: FrameType | None) -> Place | None:
    """The innermost own line of a running frame."""
    while frame is not None:
        code: CodeType = frame.f_code
        if is_own(code.co_filename):
            return code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back
    return None


def caller() -> Place | None:
    """The own line that led to whoever calls this."""
    return own_place(sys._getframe(1))


def own_frame() -> FrameType | None:
    """The innermost own frame of the calling thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_own(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def main_place() -> tuple[Place | None, str]:
    """Where the main thread is in the user's code, and the function at the very end."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return own_place(frame), frame.f_code.co_name if frame else ""


def threads() -> list[dict[str, Any]]:
    """Every thread's own lines, innermost first, and the function at the very end."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, frame in sys._current_frames().items():
        places, leaf = [], f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
        walk: FrameType | None = frame
        while walk is not None:
            if is_own(walk.f_code.co_filename):
                places.append((walk.f_code.co_filename, walk.f_lineno, walk.f_code.co_name))
            walk = walk.f_back
        if places:
            found.append({"ident": str(ident), "name": names.get(ident, "?"), "leaf": leaf,
                          "own": places})  # fmt: skip
    return found


def flight_recorder(collectives: bool, stacks: bool) -> dict[str, Any]:
    """torch's flight recorder: the last collectives of this rank, and the state of each group."""
    dump: Any = c10d._dump_fr_trace  # type: ignore[attr-defined]
    if dist.is_initialized() and "nccl" in dist.get_backend():
        dump = getattr(c10d, "_dump_nccl_trace", dump)
    return pickle.loads(dump(collectives, stacks, False))  # made in this process a moment ago
