"""A job under torchrun on a virtual cluster, and the hand that disturbs it."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from _elastic_log import Line, read_log

from distlab.cluster import VirtualCluster
from distlab.cluster.commands import NodeProcess
from distlab.errors import RunError
from distlab.process import marked

SCRIPT = Path(__file__).with_name("elastic_train.py")
SHARE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LAB_RECORD_DIR": ""}
POLL_S = 0.05
PORT = 29500
MAX_RESTARTS = 4
GO_ON = "go-on"
# A dead node is given up after 2 s * 3: less than the process group's timeout, so it costs nothing.
RENDEZVOUS = {
    "last_call_timeout": 3,
    "keep_alive_interval": 2,
    "keep_alive_max_attempt": 3,
    "join_timeout": 60,
}
FOR_THE_JOB = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "corpus",
    "corpus_mb", "batch_size", "seq_len", "steps", "learning_rate", "checkpoint_every",
    "step_seconds", "seed", "timeout",
)  # fmt: skip


class ElasticJob:
    """An agent on each node of `cluster`, which keeps a worker running there.

    With `fewest` below the number of nodes the job goes on with fewer. It writes to `folder`. Every
    wait ends `args.limit` seconds after the start, with a `RunError` that says what was awaited.
    With `shared_store` the workers meet in a store that their agents keep, as torch has it; else
    rank 0 of each generation makes one. Rank 0 is `late` seconds late when it is started again.
    """

    def __init__(
        self,
        cluster: VirtualCluster,
        args: Namespace,
        folder: Path,
        fewest: int,
        shared_store: bool = False,
        late: float = 0.0,
    ) -> None:
        self.cluster = cluster
        self.folder = folder
        self.limit = args.limit
        self.deadline = time.monotonic() + args.limit
        self.agents: dict[str, NodeProcess] = {}
        flags = ["--hold", str(hold_before(args)), "--late", str(late)]
        self._command = [
            *torchrun(fewest, len(cluster.names)), *job_command(args, folder)[1:], *flags
        ]  # fmt: skip
        self._environment = {**ENVIRONMENT, SHARE: "0" if shared_store else "1"}
        for node in cluster.names:
            self.start(node)

    def start(self, node: str) -> None:
        """Start a node's agent, which meets the others at node0's."""
        self.agents[node] = self.cluster.start(node, self._command, env=self._environment)

    def log(self) -> list[Line]:
        return read_log(self.folder)

    def worker(self, node: str) -> psutil.Process:
        """The worker that the node's agent runs."""
        for process in marked(self.agents[node].mark):
            with suppress(psutil.NoSuchProcess):
                if "TORCHELASTIC_RUN_ID" in process.environ():
                    return process
        raise RunError(f"{node} has no worker: {self.last_words(node)}")

    def until(self, happened: Callable[[], bool], what: str) -> float:
        """Wait for it; the time (of the log's clock) at which it was seen."""
        while not happened():
            if time.monotonic() > self.deadline:
                raise RunError(f"{what}: not within the run's limit of {self.limit:g} s")
            ended = [node for node, agent in self.agents.items() if agent.poll() not in (None, 0)]
            if ended:
                raise RunError(f"{what}: never, {ended[0]}'s agent ended: "
                               f"{self.last_words(ended[0])}")  # fmt: skip
            time.sleep(POLL_S)
        return time.time()

    def power_off(self, node: str) -> None:
        """The agent and the worker are gone at once, and no connection is closed."""
        del self.agents[node]
        self.cluster.power_off(node)

    def power_on(self, node: str) -> None:
        self.cluster.power_on(node)
        self.start(node)

    def go_on(self) -> None:
        """Let the job train its last steps."""
        (self.folder / GO_ON).touch()

    def finish(self) -> None:
        """Wait for the agents' own end."""
        for node, agent in self.agents.items():
            status = agent.wait(max(0.0, self.deadline - time.monotonic()))
            if status != 0:
                raise RunError(f"{node}'s agent ended with {status}: {self.last_words(node)}")

    def errors(self, node: str) -> list[str]:
        """What the node's workers have said of their ends, a line each."""
        lines = self.agents[node].errors().splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    def last_words(self, node: str) -> str:
        lines = [line for line in self.agents[node].errors().splitlines() if line.strip()]
        return (self.errors(node) or lines or ["nothing was said"])[-1]


def torchrun(fewest: int, most: int) -> list[str]:
    """An agent's command line, up to the script."""
    settings = ",".join(f"{name}={value}" for name, value in RENDEZVOUS.items())
    return [
        sys.executable, "-m", "torch.distributed.run",
        f"--nnodes={fewest}:{most}", "--nproc-per-node=1", f"--max-restarts={MAX_RESTARTS}",
        "--rdzv-id=elastic", "--rdzv-backend=c10d", f"--rdzv-endpoint=node0:{PORT}",
        f"--rdzv-conf={settings}",
    ]  # fmt: skip


def job_command(args: Namespace, folder: Path) -> list[str]:
    """A worker's command line: the flags given here, on its node's CPU."""
    flags = ["--backend", "gloo", "--device", "cpu", "--folder", str(folder)]
    for name in FOR_THE_JOB:
        if (value := getattr(args, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return [sys.executable, str(SCRIPT), *flags]


def hold_before(args: Namespace) -> int:
    """The step that the job does not begin before it was disturbed."""
    return args.steps - args.checkpoint_every // 2 - 1
