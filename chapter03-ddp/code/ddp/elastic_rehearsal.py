"""The disturbances that `elastic_train.py` rehearses, and how the job gets over them."""

import random
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from _elastic_cluster import ENVIRONMENT, ElasticJob, job_command
from _elastic_log import History, Line, generations, history, of_kind, read_log
from _elastic_report import Event, Outcome, global_batches, report_rehearsal

from distlab.cluster import VirtualCluster
from distlab.data import Tokens
from distlab.errors import RunError
from distlab.run import Run

LATE_S = 3.0  # longer than an attempt to connect takes


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
