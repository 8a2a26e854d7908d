"""The disturbances that `elastic_train.py` rehearses on a virtual cluster, and their outcomes."""

import os
import random
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ddp.elastic_log import History, Line, generations, global_batches, history, of_kind, read_log
from distlab.cluster import VirtualCluster
from distlab.cluster.commands import NodeProcess
from distlab.data import Tokens
from distlab.errors import RunError
from distlab.process import marked
from distlab.run import Run

LATE_S = 3.0  # longer than an attempt to connect takes
SCRIPT = Path(__file__).parents[1] / "elastic_train.py"
SHARE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LAB_RECORD_DIR": ""}
POLL_S = 0.05
GO_ON = "go-on"  # a file in the job's folder
HOLD = "ELASTIC_HOLD"  # to a worker: before this step, wait until that file is there
LATE = "ELASTIC_LATE"  # to rank 0: come back so many seconds late when you are started again
HOLD_LIMIT_S = 120.0
PORT = 29500
MAX_RESTARTS = 4
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
TOLERANCE = 1e-5  # float32: fewer ranks sum the same gradients in another order
EVENTS = {"worker killed": 1, "node off": 2, "node back": 3}


@dataclass(frozen=True)
class Event:
    """Something that happened to a job, and how it went on; seconds since it happened."""

    what: str
    ranks: int  # that went on
    noticed: float  # node0's worker of before has ended
    again: float  # the next generation has trained its first step
    repeated: int  # steps
    said: str  # by node0's worker


@dataclass(frozen=True)
class Outcome:
    """A disturbed run that came to its end."""

    all_ranks: bool  # were there in each generation
    events: list[Event]
    past: History


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
        self._command = [*torchrun(fewest, len(cluster.names)), *job_command(args, folder)[1:]]
        last = args.steps - args.checkpoint_every // 2 - 1  # not begun before the disturbance
        self._environment = {
            **ENVIRONMENT,
            SHARE: "0" if shared_store else "1",
            HOLD: str(last),
            LATE: str(late),
        }
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


def hold(folder: Path, step: int) -> None:
    """In a worker: a rehearsal's job is short and might end before it is disturbed, so it waits."""
    deadline = time.monotonic() + HOLD_LIMIT_S
    while str(step) == os.environ.get(HOLD) and not (folder / GO_ON).exists():
        if time.monotonic() > deadline:
            raise RunError(f"{folder / GO_ON} did not appear within {HOLD_LIMIT_S:g} s")
        time.sleep(POLL_S)


def come_late() -> None:
    """In a worker: rank 0 of a job that was started again is late, when `show_trap` wants it so."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and os.environ["RANK"] == "0":
        time.sleep(float(os.environ.get(LATE, 0)))


def rehearse(run: Run, args: Namespace, tokens: Tokens) -> None:
    """Train undisturbed, then with each disturbance, and compare."""
    expected = undisturbed(args, tokens)
    chosen = list(SCENARIOS) if args.scenario == "all" else [args.scenario]
    planned = [(scenario, number) for number in range(args.runs) for scenario in chosen]
    outcomes = [show_trap(run, args, tokens)] if args.with_trap else []
    missing = 0
    for scenario, number in run.progress(planned, "disturbed runs"):
        try:
            outcomes.append(disturbed(args, tokens, scenario, number))
        except RunError as failure:
            run.print(f"trace: {scenario}, run {number + 1}, failed: {failure}")
            missing += 1
    report_rehearsal(run, args, expected, outcomes, missing)


def undisturbed(args: Namespace, tokens: Tokens) -> History:
    """The same job, a rank on each node, with nobody to disturb it and no agent."""
    with tempfile.TemporaryDirectory() as folder, VirtualCluster(args.nodes) as cluster:
        command = job_command(args, Path(folder))
        for done in cluster.run_ranks(command, env=ENVIRONMENT, timeout_s=args.limit):
            if done.status != 0:
                words = (done.stderr.strip() or "it said nothing").splitlines()[-1]
                raise RunError(f"the undisturbed job ended with status {done.status}: {words}")
        return history(read_log(Path(folder)), args.steps, global_batches(args, tokens))


def disturbed(
    args: Namespace,
    tokens: Tokens,
    scenario: str,
    number: int = 0,
    shared_store: bool = False,
    late: float = 0.0,
) -> Outcome:
    """A run that is disturbed at a step drawn at random."""
    fewest, disturb = SCENARIOS[scenario]
    at = random.Random(args.seed + number).randrange(args.steps // 4, args.steps // 2)
    with tempfile.TemporaryDirectory() as name, VirtualCluster(args.nodes) as cluster:
        job = ElasticJob(cluster, args, Path(name), fewest or args.nodes, shared_store, late)
        job.until(lambda: has_trained(job.log(), at, args.nodes), f"step {at} of the job")
        disturbances = disturb(job, args.nodes)
        job.go_on()
        job.finish()
        lines = job.log()
    past = history(lines, args.steps, global_batches(args, tokens))
    return Outcome(fewest is None, [one.event(lines, past) for one in disturbances], past)


def has_trained(lines: list[Line], step: int, ranks: int) -> bool:
    return any(
        line["step"] >= step and line["world_size"] == ranks for line in of_kind(lines, "trained")
    )


def show_trap(run: Run, args: Namespace, tokens: Tokens) -> Outcome:
    """A killed worker, and rank 0 is late to come back: in torch's shared store, then in its own.

    The agents keep the shared store over a restart, with the addresses of the dead in it. Rank 1
    does not wait for rank 0's new one: it finds the old one, and nobody answers there. So whether a
    restart succeeds is a race, and each one that is lost costs one of --max-restarts.
    """
    words = "the job went on: every rank wrote its new address before another read the old"
    try:
        disturbed(args, tokens, "worker-killed", shared_store=True, late=LATE_S)
    except RunError as failure:
        words = f"the job was lost: {failure}"
    run.print(f"trace: with the shared store {words}")
    return disturbed(args, tokens, "worker-killed", late=LATE_S)


@dataclass(frozen=True)
class Disturbance:
    """What was done to a job, and what was seen of it at once; times of the log's clock."""

    what: str
    at: float
    noticed: float
    generation: int  # the last that had begun before
    ranks: int  # of the one that follows
    said: str

    def event(self, lines: list[Line], past: History) -> Event:
        again, generation = min(
            (line["time"], line["generation"])
            for line in of_kind(lines, "trained")
            if line["generation"] > self.generation and line["world_size"] == self.ranks
        )
        repeated = sum(past.repeated[own] for own in range(self.generation + 1, generation + 1))
        noticed, trained = self.noticed - self.at, again - self.at
        return Event(self.what, self.ranks, noticed, trained, repeated, self.said)


def make(job: ElasticJob, what: str, act: Callable[[], object], ranks: int) -> Disturbance:
    """Do it, and wait until node0 has noticed and a generation of `ranks` ranks has begun."""
    survivor = job.worker("node0")
    before = len(generations(job.log()))
    already_said = job.errors("node0")
    at = time.time()
    act()
    noticed = job.until(lambda: has_ended(survivor), f"{what}: node0 notices")
    job.until(lambda: has_begun(job.log(), ranks, before), f"{what}: {ranks} rank(s) begin again")
    said = job.errors("node0")[len(already_said) :] or ["nothing: its agent ended it"]
    return Disturbance(what, at, noticed, before, ranks, said[0])


def has_begun(lines: list[Line], ranks: int, after: int) -> bool:
    return any(
        line["generation"] > after and line["world_size"] == ranks for line in generations(lines)
    )


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def worker_killed(job: ElasticJob, nodes: int) -> list[Disturbance]:
    """`kill -9` of a worker; its agent lives."""
    return [make(job, "worker killed", job.worker("node1").kill, nodes)]


def node_lost(job: ElasticJob, nodes: int) -> list[Disturbance]:
    """node1's power fails, and stays off."""
    return [make(job, "node off", lambda: job.power_off("node1"), nodes - 1)]


def node_back(job: ElasticJob, nodes: int) -> list[Disturbance]:
    """node1's power fails; when the others have gone on without it, it comes back."""
    lost = node_lost(job, nodes)
    return [*lost, make(job, "node back", lambda: job.power_on("node1"), nodes)]


# The fewest nodes that the job goes on with, or None: all of them. Where nobody is to be left out
# a fixed number is better, since then there is no last call to wait for.
SCENARIOS: dict[str, tuple[int | None, Callable[[ElasticJob, int], list[Disturbance]]]] = {
    "worker-killed": (None, worker_killed),
    "node-lost": (1, node_lost),
    "node-back": (1, node_back),
}


def report_rehearsal(
    run: Run, args: Namespace, expected: History, outcomes: Sequence[Outcome], missing: int
) -> None:
    """A row for each disturbance, and the checks over all of them."""
    rows = []
    for outcome in outcomes:
        apart = largest_difference([outcome], expected)
        for event in outcome.events:
            said = event.said.partition(" This is typically")[0]  # gloo's advice
            run.print(
                f"trace: {event.what}; after {event.noticed:.1f} s node0's worker said: {said}"
            )
            rows.append([
                EVENTS[event.what], event.ranks, event.noticed, event.again, event.repeated,
                outcome.past.losses[-1], expected.losses[-1], apart,
            ])  # fmt: skip
    names = ", ".join(f"{number} {what}" for what, number in EVENTS.items())
    run.table(
        "disturbances",
        ["event", "ranks after", "noticed (s)", "training again (s)", "steps repeated",
         "final loss", "undisturbed", "difference in any step"],
        rows,
        caption=f"Events: {names}; seconds since the event",
    )  # fmt: skip
    run.check_equal("disturbed runs that did not come to their end", missing, 0)
    wrong = sum(len(past.wrong) for past in [expected, *(outcome.past for outcome in outcomes)])
    run.check_equal("global batches not trained exactly once", wrong, 0)
    repeated = [event.repeated for outcome in outcomes for event in outcome.events]
    # The newest checkpoint may still have been on its way to the disk; the one before was there.
    run.check_below(
        "steps repeated after an event", max(repeated, default=0), 2 * args.checkpoint_every
    )
    if args.nodes == 2 and any(outcome.all_ranks for outcome in outcomes):
        run.check_equal(
            "where all ranks came back, losses are the undisturbed job's to the last bit",
            largest_difference([o for o in outcomes if o.all_ranks], expected) == 0.0,
            True,
        )
    run.check_below(
        "difference of any loss to the undisturbed job's",
        largest_difference(outcomes, expected),
        TOLERANCE,
    )


def largest_difference(outcomes: Sequence[Outcome], expected: History) -> float:
    """Of the losses on the final paths; infinite when one lacks a step."""
    if any(len(outcome.past.losses) != len(expected.losses) for outcome in outcomes):
        return float("inf")
    losses = np.array([outcome.past.losses for outcome in outcomes])
    return float(np.abs(losses - np.array(expected.losses)).max(initial=0.0))
