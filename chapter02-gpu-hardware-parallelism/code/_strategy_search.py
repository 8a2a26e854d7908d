"""Searches all plans: which fit, which is fastest, and what stands in the way of a faster one."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from _strategy_cost import StepTime, step_time
from _strategy_links import Cluster
from _strategy_plans import Job, plans, stage_kinds

from distlab.predict import Architecture, Memory, TrainingPlan, training_stage_memory

AS_FAST = 0.02  # nearer to the fastest than this, the simpler plan is first


@dataclass(frozen=True)
class Candidate:
    plan: TrainingPlan
    memory: Memory
    time: StepTime


@dataclass
class Search:
    """All plans of a job on a cluster, with the reasons why others are none."""

    job: Job
    cluster: Cluster
    candidates: list[Candidate]
    not_dividing: Counter[str]

    @property
    def fitting(self) -> list[Candidate]:
        return [one for one in self.candidates if one.memory.needed <= self.cluster.memory]

    @property
    def leanest(self) -> Candidate:
        """The plan that needs least memory, whether it fits or not."""
        return min(self.candidates, key=lambda one: one.memory.needed)

    def too_large(self) -> Counter[str]:
        """How many plans do not fit, by what is too much for a GPU."""
        return Counter(
            reason for one in self.candidates if (reason := does_not_fit(one, self.cluster))
        )


def search(job: Job, cluster: Cluster) -> Search:
    not_dividing: Counter[str] = Counter()
    candidates = [
        Candidate(plan, fullest_gpu(job.model, plan), step_time(job.model, plan, cluster))
        for plan in plans(job, not_dividing)
    ]
    return Search(job, cluster, candidates, not_dividing)


def fullest_gpu(a: Architecture, plan: TrainingPlan) -> Memory:
    """As `predict.training_memory`, but of equal pipeline stages only the first is looked at."""
    stages = (training_stage_memory(a, plan, stage) for stage, _ in stage_kinds(a, plan.pp))
    return max(stages, key=lambda memory: memory.needed)


def does_not_fit(one: Candidate, cluster: Cluster) -> str:
    memory = one.memory
    state = memory.weights + memory.gradients + memory.optimizer
    if state > cluster.memory:
        return "weights, gradients and optimizer alone are more than a GPU holds"
    if memory.needed > cluster.memory:
        return "with the activations it is more than a GPU holds"
    return ""


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """By step time; but first the simplest of those within 2 % of the fastest, since no model of
    the time is more exact than that."""
    order = sorted(candidates, key=lambda one: (float(f"{one.time.total:.4g}"), simplicity(one)))
    if not order:
        return []
    limit = min(one.time.total for one in order) * (1 + AS_FAST)
    winner = min((one for one in order if one.time.total <= limit), key=simplicity)
    return [winner, *(one for one in order if one is not winner)]


def simplicity(one: Candidate) -> tuple[float, ...]:
    """The simplest is least: few kinds of parallelism, little sharding, nothing computed twice."""
    plan = one.plan
    kinds = sum(degree > 1 for degree in (plan.tp, plan.cp, plan.pp, plan.ep))
    sharding = (plan.zero, plan.checkpointing, plan.cp, plan.chunks)
    return kinds, *sharding, one.time.total, one.memory.needed


def layout(one: Candidate) -> tuple[int, ...]:
    """The degrees and the sharding; what else differs between plans is detail."""
    plan = one.plan
    return plan.tp, plan.cp, plan.pp, plan.ep, plan.zero


def best_of_each_layout(order: Iterable[Candidate]) -> list[Candidate]:
    firsts: dict[tuple[int, ...], Candidate] = {}
    for one in order:
        firsts.setdefault(layout(one), one)
    return list(firsts.values())


def verdict(found: Search, name: Callable[[TrainingPlan], str]) -> str:
    """The winner and what decides, in two sentences; or why there is none."""
    limit = found.cluster.memory / 1e9
    if not found.fitting:
        return _no_plan(found, name)
    winner = ranked(found.fitting)[0]
    time = winner.time
    compute, bubble, sending = (
        100 * part / time.total for part in (time.compute, time.bubble, time.communication)
    )
    first = (
        f"{name(winner.plan)} is first: {compute:.0f} % of its step is computing, {bubble:.0f} % "
        f"pipeline bubble and {sending:.0f} % communication that nothing hides."
    )
    roomy = _leanest_alike(found, ranked(found.candidates)[0])
    wired = _without_links(found)
    memory_gain = 1 - roomy.time.total / time.total
    link_gain = 1 - wired.time.total / time.total
    if max(memory_gain, link_gain) <= AS_FAST:
        return f"{first} Computing decides: neither more memory nor faster links would gain 2 %."
    if memory_gain >= link_gain:
        return (
            f"{first} Memory decides: with more than {limit:.0f} GB to use per GPU, "
            f"{name(roomy.plan)} would be first and {100 * memory_gain:.0f} % faster, but it "
            f"needs {roomy.memory.needed / 1e9:.0f} GB."
        )
    same = name(wired.plan) == name(winner.plan)
    other = "the same plan would be" if same else f"{name(wired.plan)} would be first and"
    return (
        f"{first} The links decide: were sending free, {other} {100 * link_gain:.0f} % faster"
        f" ({limit:.0f} GB per GPU kept)."
    )


def _no_plan(found: Search, name: Callable[[TrainingPlan], str]) -> str:
    limit = found.cluster.memory / 1e9
    if not found.candidates:
        reason, count = found.not_dividing.most_common(1)[0]
        return f"there is no plan: no degrees divide. Most often ({count} times): {reason}."
    least = found.leanest
    return (
        f"no plan fits: the one that needs least, {name(least.plan)}, needs "
        f"{least.memory.needed / 1e9:.1f} GB per GPU, and {limit:.1f} GB can be used. Use more "
        f"GPUs: {found.job.gpus} of them hold {found.job.gpus * limit:,.0f} GB together, and the "
        f"weights, gradients and optimizer alone take {_state_once(found) / 1e9:,.0f} GB."
    )


def _leanest_alike(found: Search, best: Candidate) -> Candidate:
    """Of the plans of the same layout that are as fast, the one that needs least memory."""
    limit = best.time.total * (1 + AS_FAST)
    alike = [
        one for one in found.candidates if layout(one) == layout(best) and one.time.total <= limit
    ]
    return min(alike, key=lambda one: one.memory.needed)


def _without_links(found: Search) -> Candidate:
    """The first plan of those that fit, were sending free."""
    free = replace(found.cluster, inner=(0.0, 0.0), outer=(0.0, 0.0))
    model = found.job.model
    return ranked(replace(one, time=step_time(model, one.plan, free)) for one in found.fitting)[0]


def _state_once(found: Search) -> float:
    """Bytes of the model's state, each parameter's once."""
    job = found.job
    plan = TrainingPlan(precision=job.precision, optimizer=job.optimizer, seq_len=1)
    memory = training_stage_memory(job.model, plan, 0)
    return memory.weights + memory.gradients + memory.optimizer
