"""What the agents of all ranks have told so far, in order, and the verdict of a judge about it."""

import fcntl
import json
import linecache
import os
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Place = tuple[str, int, str]  # file, line, function
Signature = tuple[str, str, str]  # operation, shapes, dtypes
HISTORY = 2000  # collectives kept of each rank
PULSES = 400  # 100 s of them
BOX_SLOT = 512  # bytes, as the agent has it
CAUSES = {
    "rank_only_collective": "a collective that not every rank calls",
    "collective_order": "the ranks call collectives in different orders",
    "shape_mismatch": "the ranks bring different shapes or types to one collective",
    "lock_deadlock": "a lock is held while its holder waits in a collective",
    "uneven_last_batch": "a rank has more batches than another",
    "dead_link": "all ranks are in the same collective, and no data comes through",
    "killed_rank": "a rank was killed from outside",
    "crashed_rank": "a rank crashed below Python",
    "silent_rank": "a rank no longer answers: its interpreter is blocked",
    "same_device": "ranks share a device while others are free",
    "forgotten_set_device": "no rank has chosen its device, so all use the first",
    "unsynced_parameters": "the ranks train different models",
    "unsynced_buffers": "the ranks hold different buffers",
    "nan_on_one_rank": "one rank's loss became not finite, and spread",
    "straggler": "the other ranks wait for one that is slow",
    "forgotten_set_epoch": "every epoch has the same order of examples",
}


@dataclass(frozen=True)
class Call:
    """One collective of one rank, as its flight recorder has it."""

    group: str
    seq: int
    op: str
    shapes: str
    dtypes: str
    created: float  # by the rank's clock, in seconds
    thread: str | None
    place: Place | None = None  # known once the rank has told its stacks

    @property
    def signature(self) -> Signature:
        return self.op, self.shapes, self.dtypes

    def __str__(self) -> str:
        return f"{self.op} of {self.dtypes or 'nothing'} {self.shapes}"


@dataclass
class Rank:
    """One rank's story."""

    number: int
    hello: dict[str, Any]
    crash_file: Path  # where faulthandler writes the stacks
    heard: float = field(default_factory=time.time)  # when it last told something
    calls: dict[tuple[str, int], Call] = field(default_factory=dict)
    pulses: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=PULSES))
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    box: list[dict[str, Any]] = field(default_factory=list)  # its last calls, once it has died
    crash: str = ""
    died: float | None = None  # when diagnose saw that the process was gone

    @property
    def pulse(self) -> dict[str, Any]:
        return self.pulses[-1] if self.pulses else {}

    @property
    def host(self) -> str:
        return str(self.hello["host"])

    @property
    def name(self) -> str:
        return f"rank {self.number}"

    def told(self, kind: str) -> list[dict[str, Any]]:
        return self.events.get(kind, [])

    @property
    def lives(self) -> bool:
        return self.exit is None and self.died is None

    def ask(self) -> None:
        """Have it tell all that it knows, the lines of its collectives too, and `answered`."""
        self.crash_file.with_suffix(".ask").touch()

    @property
    def exit(self) -> dict[str, Any] | None:
        return self.told("exit")[0] if self.told("exit") else None

    @property
    def failed(self) -> bool:
        """Whether it said that it ends with an error."""
        return any(words["error"] or words["status"] for words in self.told("exit"))

    @property
    def place(self) -> Place | None:
        """Where its main thread was when last heard of."""
        return as_place(self.pulse.get("place"))

    def stuck_since(self) -> float | None:
        """When it began to wait: in a collective, or idle in one line. None while it works."""
        if self.exit is not None:
            return float(self.exit["t"])
        if self.died is not None:
            return self.died
        since = float(self.pulse.get("since", time.time()))
        if self.pulse.get("pending"):
            return since
        before = [pulse for pulse in self.pulses if pulse["t"] >= since]
        busy = before[-1]["cpu"] - before[0]["cpu"] if before else 0.0
        waited = self.pulse.get("t", since) - since
        return since if waited > 0 and busy < 0.3 * waited else None

    def pending(self) -> list[Call]:
        """Its collectives that wait, the oldest first."""
        groups = self.pulse.get("groups", {})
        waiting = [
            call for (group, seq), call in self.calls.items()
            if seq > groups.get(group, [0, 1 << 62])[1]
        ]  # fmt: skip
        return sorted(waiting, key=lambda call: call.created)


def as_place(value: Any) -> Place | None:
    return (str(value[0]), int(value[1]), str(value[2])) if value else None


class Watch:
    """Reads what the ranks write into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read_to: dict[Path, int] = {}
        self.ranks: dict[int, Rank] = {}
        self.attempt = -1

    def update(self) -> list[Rank]:
        """All ranks of the newest attempt, by number, as far as they have spoken."""
        for path in sorted(self.folder.glob("attempt*-rank*.jsonl")):
            attempt, _, number = path.stem.removeprefix("attempt").partition("-rank")
            if int(attempt) > self.attempt:
                self.attempt, self.ranks = int(attempt), {}
            if int(attempt) == self.attempt:
                gone = _is_gone(path.with_suffix(".alive"))  # asked first: then all is written
                self._read(path, int(number))
                if int(number) in self.ranks and gone:
                    self._bury(self.ranks[int(number)], path)
        return [self.ranks[number] for number in sorted(self.ranks)]

    def _read(self, path: Path, number: int) -> None:
        with path.open("rb") as file:
            file.seek(self.read_to.get(path, 0))
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read_to[path] = self.read_to.get(path, 0) + len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            if event["kind"] == "hello":
                self.ranks[number] = Rank(number, event, path.with_suffix(".crash"))
            elif number in self.ranks:
                _hear(self.ranks[number], event)

    def _bury(self, rank: Rank, path: Path) -> None:
        if rank.died is None:
            rank.died = time.time()
        rank.crash = rank.crash_file.read_text(errors="replace", encoding="utf-8")
        rank.box = _calls(path.with_suffix(".box").read_bytes())


def _hear(rank: Rank, event: dict[str, Any]) -> None:
    rank.heard = time.time()
    if event["kind"] == "pulse":
        rank.pulses.append(event)
    elif event["kind"] == "collectives":
        for group, seq, is_p2p, op, shapes, dtypes, created, _, thread, own in event["rows"]:
            known = rank.calls.get((group, seq))
            place = as_place(own[0]) if own else known.place if known else None
            if not is_p2p:
                rank.calls[group, seq] = Call(
                    group, seq, op, _shown(shapes), _shown(dtypes), created, thread, place
                )
        for key in list(rank.calls)[:-HISTORY]:
            del rank.calls[key]
    else:
        rank.events.setdefault(event["kind"], []).append(event)


def _shown(values: list[Any]) -> str:
    """`[[3, 4]]` as `[3, 4]`; several tensors with commas between."""
    return ", ".join(str(value) for value in values)


def _is_gone(path: Path) -> bool:
    """Whether the process that locked this file has ended: the kernel has let go of the lock."""
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _calls(box: bytes) -> list[dict[str, Any]]:
    """The calls in a black box, the oldest first; one that was being written is left out."""
    calls = []
    for slot in range(0, len(box), BOX_SLOT):
        text = box[slot : slot + BOX_SLOT].partition(b"\n")[0]
        with suppress(ValueError):
            calls.append(json.loads(text))
    return sorted(calls, key=lambda call: call["call"])


@dataclass(frozen=True)
class Verdict:
    """The finding of one judge."""

    cause: str  # a key of CAUSES
    rank: int | None  # the culprit, where there is one
    place: Place | None
    what: str  # the evidence, in a sentence or two
    remedy: str
    collective: str | None = None

    def __post_init__(self) -> None:
        assert self.cause in CAUSES

    @property
    def where(self) -> str:
        return shown(self.place)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "where": self.where, "source": source(self.place)}


def shown(place: Place | None) -> str:
    return f"{Path(place[0]).name}:{place[1]}" if place else "an unknown line"


def source(place: Place | None) -> str:
    return linecache.getline(place[0], place[1]).strip() if place else ""
