"""An engine in a process of its own, and the prompts that it gets: the same ones for every engine.

It is asked by a socket (`inference.engine_worker` is at the other end), and stopped while it is
another's turn.
"""

import json
import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from distlab.data.corpus import read_corpus
from distlab.errors import RunError
from distlab.process import Job, job, marked

START_S, ANSWER_S = 300.0, 300.0
POLL_S = 0.5
TEXT_BYTES = 400_000
SPREAD = 0.6  # lengths go from 0.4 to 1.6 times the average


@dataclass(frozen=True)
class Load:
    """What a load of requests came to. Times are in seconds, one for each request."""

    tokens: list[list[int]]
    ttft: list[float]
    tpot: list[float]
    seconds: float
    cached: int  # prompt tokens that the prefix cache had

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    def percentile(self, name: str, q: float) -> float:
        """Of `ttft` or `tpot`, in seconds."""
        return float(np.percentile(getattr(self, name), q))


class EngineProcess:
    """An engine that is ready. Between two loads its processes are stopped by a signal: an idle
    engine may spin, waiting for work, and would take a core from the one that is measured."""

    def __init__(self, name: str, running: Job, lines: Any) -> None:
        self.name = name
        self._job, self._lines = running, lines
        self.description = self._receive(START_S)["ready"]
        self._signal("suspend")

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, concurrency: int | None = None
    ) -> Load:
        """Greedy answers of `new_tokens` each, all at once or `concurrency` at a time."""
        asked = {
            "prompts": [list(prompt) for prompt in prompts],
            "new_tokens": new_tokens,
            "concurrency": concurrency or len(prompts),
        }
        self._signal("resume")
        try:
            self._lines.write(json.dumps(asked) + "\n")
            self._lines.flush()
            got = self._receive(ANSWER_S)
        finally:
            self._signal("suspend")
        columns = {key: [a[key] for a in got["answers"]] for key in ("tokens", "ttft", "tpot")}
        return Load(**columns, seconds=got["seconds"], cached=got["cached"])

    def resume(self) -> None:
        """Let it run again, so that it can end."""
        self._signal("resume")

    def _receive(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise RunError(f"{self.name} did not answer within {limit_s:g} s") from error
        if not line:
            raise RunError(f"{self.name} ended: {last_words(self._job)}")
        return json.loads(line)

    def _signal(self, what: str) -> None:
        for process in marked(self._job.mark):
            with suppress(psutil.NoSuchProcess):
                getattr(process, what)()


@contextmanager
def engine_process(
    engine: str,
    model: Path,
    dtype: str,
    options: Mapping[str, Any] | None = None,
    python: str | Path = sys.executable,
) -> Iterator[EngineProcess]:
    """Start `engine` (a name of engine_worker.ENGINES) with `options`; ended with the block.

    `python` is the environment's that has the engine.

    Raises `RunError`, in one line, when it does not come up within START_S.
    """
    asked = {"engine": engine, "model": str(model), "dtype": dtype, "options": dict(options or {})}
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        path = os.path.join(folder, "socket")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen(1)
            listening.settimeout(POLL_S)
            command = [str(python), "-m", "inference.engine_worker", path, json.dumps(asked)]
            with job(command, os.environ, Path.cwd()) as running:
                link = _accepted(listening, running, engine)
                link.settimeout(ANSWER_S)
                with link, link.makefile("rw", encoding="utf-8") as lines:
                    process = EngineProcess(engine, running, lines)
                    try:
                        yield process
                    finally:
                        process.resume()
                        link.shutdown(socket.SHUT_RDWR)
                        running.wait(10)


def _accepted(listening: socket.socket, running: Job, engine: str) -> socket.socket:
    for _ in range(int(START_S / POLL_S)):
        with suppress(TimeoutError):
            return listening.accept()[0]
        if running.process.poll() is not None:
            raise RunError(f"{engine} did not start: {last_words(running)}")
    raise RunError(f"{engine} did not start within {START_S:g} s: {last_words(running)}")


def last_words(running: Job) -> str:
    """The last line of the process's errors that says something."""
    lines = [line.strip() for line in running.texts["stderr"] if line.strip()]
    wrong = [line for line in lines if "Error" in line]
    return (wrong or lines or ["it said nothing"])[-1]


class Prompts:
    """Windows of the standard library's sources, in the tokens of the model at `model`.

    A `key` chooses the windows: another key, other prompts, the same ones in every run.
    """

    def __init__(self, model: Path, vocab_size: int, seed: int) -> None:
        from transformers import AutoTokenizer
        from transformers.utils.logging import set_verbosity_error

        set_verbosity_error()  # it warns that the text is longer than the model's context
        text = "\n".join(read_corpus("stdlib", TEXT_BYTES))
        ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
        self._tokens = [token for token in ids if token < vocab_size]
        self._seed = seed

    def mixed(self, count: int, average: int, key: str) -> list[list[int]]:
        """`count` prompts, their lengths uniform around `average`."""
        chance = random.Random(f"{self._seed} {key}")
        least, most = round(average * (1 - SPREAD)), round(average * (1 + SPREAD))
        return [self._window(chance, chance.randint(max(1, least), most)) for _ in range(count)]

    def shared(self, count: int, common: int, own: int, key: str) -> list[list[int]]:
        """`count` prompts that begin with the same `common` tokens, then have `own` each."""
        chance = random.Random(f"{self._seed} {key}")
        beginning = self._window(chance, common)
        return [beginning + self._window(chance, own) for _ in range(count)]

    def _window(self, chance: random.Random, length: int) -> list[int]:
        start = chance.randrange(len(self._tokens) - length)
        return self._tokens[start : start + length]
