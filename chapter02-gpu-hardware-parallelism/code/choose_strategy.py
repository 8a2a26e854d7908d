"""Chooses how to divide a model's training over a cluster: every plan, ranked by predicted time.

Data, tensor (with sequence), pipeline, context and expert parallelism, ZeRO 1 to 3 (3 is FSDP),
micro-batches, interleaving and activation checkpointing are combined in every way that divides the
model and the GPUs. What does not fit into a GPU's memory is dropped. The rest is ranked by the time
of a step: computing, pipeline bubble, and what shows of each kind of communication.

Run:
    python chapter02-gpu-hardware-parallelism/code/choose_strategy.py --model llama-3-70b \\
        --gpus 64 --gpu h100 --gpus-per-node 8 --interconnect 400gbit
    python chapter02-gpu-hardware-parallelism/code/choose_strategy.py --model llama-3-405b --gpus 8

You should see: how many plans were dropped and why, the best ones in a table, and in two sentences
which constraint decides. Where nothing fits, what is missing: that is an answer too, of status 0.

Tensor-parallel ranks are adjacent GPUs; then come context, expert and data parallelism; pipeline
stages are furthest apart. What is assumed about overlap: see parallelism/cost.py.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distlab import predict, script
from distlab.display import quantity
from distlab.predict import TrainingPlan, training_stage_memory
from distlab.run import Run
from parallelism.cost import Cluster, stage_flops, step_time
from parallelism.plans import (
    AS_FAST,
    Candidate,
    Job,
    Search,
    best_of_each_layout,
    chosen_cluster,
    chosen_job,
    count_degrees,
    layout,
    name,
    parse_args,
    ranked,
    search,
)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(__doc__, argv)
    model_name, job = chosen_job(args)
    cluster = chosen_cluster(args)
    with script.run(args) as run:
        describe(run, model_name, job, cluster, args)
        found = search(job, cluster)
        show_dropped(run, found)
        order = ranked(found.fitting)
        if order:
            show_best(run, best_of_each_layout(order)[: args.top], job)
            check_winner(run, job, order)
        else:
            check_smallest(run, found)
        run.print(f"verdict: {verdict(found, name)}")
        run.extra(feasible=bool(order), plans=[as_json(one) for one in order[: args.top]])
    return run.status


def describe(run: Run, model_name: str, job: Job, cluster: Cluster, args: Namespace) -> None:
    run.print(
        f"job: {model_name}, {quantity(predict.total_parameters(job.model), 'params')}, "
        f"{job.precision} precision, {job.optimizer}, {job.global_batch:,} sequences of "
        f"{job.seq_len:,} tokens a step"
    )
    nodes = job.gpus // job.gpus_per_node
    run.print(
        f"job: {job.gpus} x {args.gpu} in {nodes} node(s); a GPU sends "
        f"{quantity(1 / cluster.inner[1], 'B/s')} inside its node, and its share of the node's "
        f"{cluster.ports} port(s) is {quantity(1 / cluster.outer_share[1], 'B/s')}"
    )
    overlap = "nothing hidden" if args.no_overlap else "DP, CP and PP hidden where they can be"
    run.print(
        f"assumed: {args.efficiency:.0%} of the GPU's peak while it computes (--efficiency), "
        f"{args.link_efficiency:.0%} of the links' rates (--link-efficiency), {overlap}; not in "
        "the step: the optimizer's arithmetic, loading data, starting kernels"
    )


def show_dropped(run: Run, found: Search) -> None:
    """What was considered, and what became of it; every combination must be accounted for."""
    considered = sum(found.not_dividing.values()) + len(
        {(p.tp, p.cp, p.ep, p.pp) for p in (one.plan for one in found.candidates)}
    )
    too_large = found.too_large()
    rows = [["degrees", reason, count] for reason, count in found.not_dividing.most_common()]
    rows += [["plans", reason, count] for reason, count in too_large.most_common()]
    rows.append(["plans", "fit", len(found.fitting)])
    run.table("dropped", ["of the", "what became of them", "count"], rows)
    run.check_equal("every factorization of the GPUs was considered once", considered,
                    count_degrees(found.job))  # fmt: skip


def show_best(run: Run, best: list[Candidate], job: Job) -> None:
    columns = [
        "plan", "micro-batch", "chunks", "recompute", "memory", "step", "tok/s per GPU",
        "compute", "bubble", "TP", "CP", "EP", "PP", "DP",
    ]  # fmt: skip
    rows = []
    for one in best:
        plan, time = one.plan, one.time
        parts = (time.compute, time.bubble, time.tp, time.cp, time.ep, time.pp, time.dp)
        rows.append(
            [
                name(plan),
                f"{plan.accumulation} x {plan.micro_batch}",
                str(plan.chunks),
                "yes" if plan.checkpointing else "no",
                quantity(one.memory.needed, "B"),
                quantity(time.total, "s"),
                f"{plan.tokens_per_step / time.total / job.gpus:,.0f}",
                *(f"{100 * part / time.total:.1f} %" for part in parts),
            ]
        )
    caption = "by time; the simplest of those within 2 % of the fastest is first"
    run.table("best plans", columns, rows, caption)


def check_winner(run: Run, job: Job, order: list[Candidate]) -> None:
    """The search takes short cuts; the formulas without them must say the same of the winner."""
    winner = order[0]
    plan, a = winner.plan, job.model
    slow = predict.training_memory(a, plan)
    run.check_equal("the winner's memory is training_memory's", winner.memory.needed, slow.needed)
    forward_and_backward = sum(sum(stage_flops(a, plan, s)[:2]) for s in range(plan.pp))
    per_token = predict.training_flops_per_token(a, plan.seq_len, plan.recompute)
    micro_batches = plan.accumulation * plan.data_parallel * plan.cp
    run.check_close(
        "the winner's stages do the FLOPs of the whole step",
        float(forward_and_backward * micro_batches),
        float(per_token * plan.tokens_per_step),
        tolerance=1e-9,
        relative=True,
    )
    fastest = min(one.time.total for one in order)
    run.check_below("the winner's step, relative to the fastest", winner.time.total / fastest, 1.02)


def check_smallest(run: Run, found: Search) -> None:
    if found.candidates:
        least = found.leanest
        slow = predict.training_memory(found.job.model, least.plan)
        run.check_equal(
            "the leanest plan's memory is training_memory's", least.memory.needed, slow.needed
        )
        run.check_above(
            "the leanest plan's memory", least.memory.needed / 1e9, found.cluster.memory / 1e9, "GB"
        )


def as_json(one: Candidate) -> dict[str, Any]:
    plan, time, memory = one.plan, one.time, one.memory
    return {
        "plan": name(plan),
        **{key: getattr(plan, key) for key in ("tp", "cp", "pp", "ep", "zero", "chunks")},
        "dp": plan.data_parallel,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "checkpointing": plan.checkpointing,
        "memory_bytes": memory.needed,
        "step_seconds": time.total,
        **{f"{part}_seconds": getattr(time, part) for part in ("compute", "bubble")},
        **{f"{kind}_seconds": getattr(time, kind) for kind in ("tp", "cp", "ep", "pp", "dp")},
    }


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


if __name__ == "__main__":
    script.exit(main)
