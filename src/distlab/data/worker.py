"""One token shard from its documents: as a function, and as a process that answers jobs.

The process answers each JSON job on its standard input with a JSON line. It imports no torch, so
that it starts in a fraction of a second, and it ends with its input.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from distlab.data.tokenizer import END_OF_TEXT_ID, load_tokenizer
from distlab.errors import RunError
from distlab.files import atomic_write


@dataclass(frozen=True)
class Job:
    """Write the tokens of `texts` to `path`."""

    path: str
    texts: Sequence[str]


def write_shard(job: Job, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Tokenize the job's texts, each followed by the end-of-text token, into its file.

    Returns the shard's entry for the index: file, tokens, documents, sha256. Raises `RunError`
    when the file cannot be written; none is left then.
    """
    ids: list[int] = []
    for text in job.texts:
        ids.extend(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        ids.append(END_OF_TEXT_ID)
    content = np.array(ids, dtype=dtype).tobytes()
    try:
        with atomic_write(job.path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise RunError(f"cannot write {job.path}: {error.strerror}") from error
    return {
        "file": Path(job.path).name,
        "tokens": len(ids),
        "documents": len(job.texts),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


class Pool:
    """Writes shards on `workers` processes, up when it is entered; 1 means this process itself."""

    def __init__(self, tokenizer_path: Path, dtype: str, workers: int) -> None:
        self._tokenizer_path = tokenizer_path
        self._dtype = dtype
        self._workers = workers
        self._processes: list[WorkerProcess] = []

    def __enter__(self) -> Self:
        try:
            for _ in range(self._workers if self._workers > 1 else 0):
                self._processes.append(WorkerProcess(self._tokenizer_path, self._dtype))
            for process in self._processes:
                process.wait_until_ready()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def write(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """Write every job's shard; yields the index entries as they are done.

        Each process takes the next job when it is free. Raises `RunError` at the first that fails.
        """
        if not self._processes:
            tokenizer = load_tokenizer(self._tokenizer_path)
            for job in jobs:
                yield write_shard(job, tokenizer, self._dtype)
            return
        idle: SimpleQueue[WorkerProcess] = SimpleQueue()
        for process in self._processes:
            idle.put(process)

        def run(job: Job) -> dict[str, Any]:
            process = idle.get()
            try:
                return process.write_shard(job)
            finally:
                idle.put(process)

        with ThreadPoolExecutor(self._workers) as threads:
            try:
                for future in as_completed([threads.submit(run, job) for job in jobs]):
                    yield future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._close()  # a process that is still busy is killed, and its thread ends
                raise

    def _close(self) -> None:
        for process in self._processes:
            process.close()


class WorkerProcess:
    """A process that runs this file. It does not see Ctrl-C: whoever started it ends it."""

    def __init__(self, tokenizer_path: Path, dtype: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(_SOURCES), str(tokenizer_path), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )

    def write_shard(self, job: Job) -> dict[str, Any]:
        """As the function of that name, in the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"path": job.path, "texts": job.texts}) + "\n")
            self.process.stdin.flush()
        return self._answer(f"while it wrote {job.path}")

    def wait_until_ready(self) -> None:
        """Wait until the process has read the tokenizer."""
        self._answer("when it started")

    def close(self) -> None:
        """Kill the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _answer(self, when: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RunError(
                f"a tokenizer process died (status {self.process.wait()}) {when}; "
                "run again: the finished shards are kept"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RunError(answer["error"])
        return answer


_SOURCES = Path(__file__).resolve().parents[2]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from distlab.data import worker; "
    "worker.serve(sys.argv[2], sys.argv[3])"
)


def serve(tokenizer_path: str, dtype: str) -> None:
    """Say that it is ready, then answer one job a line until the input ends, or the first failure.

    When whoever started this process is gone, it ends without a word.
    """
    try:
        for answer in _answers(tokenizer_path, dtype):
            print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answers(tokenizer_path: str, dtype: str) -> Iterator[dict[str, Any]]:
    try:
        tokenizer = load_tokenizer(tokenizer_path)
        yield {"ready": True}
        for line in sys.stdin:
            yield write_shard(Job(**json.loads(line)), tokenizer, dtype)
    except RunError as failure:
        yield {"error": str(failure)}
