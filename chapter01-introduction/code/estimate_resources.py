"""Estimates the memory, FLOPs, time and cost of training or serving a model, before renting it.

For a named or described model on named GPUs, under data, tensor, sequence, context, expert and
pipeline parallelism, ZeRO or FSDP sharding, recomputation and offloading: the table of what the
fullest GPU holds, how long a step takes, what it costs, and what to change when it does not fit.
For serving, how many tokens of cache an engine has left. --verify trains small models here and
compares the same formulas with what torch allocates.

Run:
    python chapter01-introduction/code/estimate_resources.py train --model llama-3-8b \\
        --gpus 8 --fsdp
    python chapter01-introduction/code/estimate_resources.py infer --model deepseek-v3 --gpu h200 \\
        --gpus 8 --tp 8 --precision fp8 --batch 64 --target-tokens-per-second 20000
    python chapter01-introduction/code/estimate_resources.py train --model llama-3-405b \\
        --gpus 512 --tp 8 --sequence-parallel --pp 8 --virtual-stages 2 --accumulation 8 --fsdp \\
        --no-reshard-after-forward --precision float8 --kernels compiled \\
        --activation-checkpointing
    python chapter01-introduction/code/estimate_resources.py --verify

You should see: a table of bytes against the GPU's capacity, a table of FLOPs, time and cost, and,
where it does not fit, flags that make it fit. With --verify: errors of a few percent.

Memory is that of the fullest GPU, FLOPs and cost are of all GPUs. 1 GB is 1e9 bytes.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distlab import predict, script
from distlab.catalog import GpuSpec
from distlab.display import quantity
from distlab.predict import Architecture, Memory, ServingPlan, TrainingPlan
from distlab.run import Run
from intro.plans import (
    EFFICIENCY,
    MFU,
    chosen_gpu,
    chosen_model,
    parse_args,
    serving_plan,
    training_plan,
    usable_bytes,
)
from intro.suggestions import (
    Change,
    Plan,
    largest_batch,
    serving_changes,
    suggest,
    training_changes,
)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(__doc__, argv)
    with script.run(args) as run:
        if args.workload == "train":
            estimate_training(run, args)
        elif args.workload == "infer":
            estimate_serving(run, args)
        if args.verify:
            from intro.verification import verify  # imports torch, which the estimates do without

            verify(run, args.verify_size)
    return run.status


def estimate_training(run: Run, args: argparse.Namespace) -> None:
    name, a = chosen_model(args)
    gpu, plan = chosen_gpu(args), training_plan(a, args)
    memory = predict.training_memory(a, plan)
    describe_model(run, name, a, plan.pp)
    context = f"{plan.cp} context x " if plan.cp > 1 else ""
    run.print(
        f"plan: {plan.gpus} GPUs = {plan.data_parallel} data x {context}{plan.tp} tensor x "
        f"{plan.pp} pipeline parallel, ZeRO stage {plan.zero}, {plan.precision} precision, "
        f"{plan.optimizer}"
    )
    limit = show_memory(run, memory, gpu, args)
    suggestions = advise(
        run, memory, limit, plan, training_changes(plan), lambda p: predict.training_memory(a, p)
    )

    peak = predict.peak_for(gpu.peak_flops, predict.PRECISIONS[plan.precision].arithmetic)
    tokens = plan.tokens_per_step
    flops = tokens * predict.training_flops_per_token(a, plan.seq_len)
    executed = tokens * predict.training_flops_per_token(a, plan.seq_len, plan.recompute)
    bubble = predict.pipeline_bubble(plan.pp, plan.accumulation, plan.chunks)
    if args.mfu is not None:
        seconds = predict.step_seconds(flops, plan.gpus, peak, args.mfu)
        assumed = f"{100 * args.mfu:g} % of {quantity(peak, 'FLOP/s')} per GPU (--mfu)"
    else:
        efficiency = EFFICIENCY if args.efficiency is None else args.efficiency
        seconds = predict.step_seconds(executed, plan.gpus, peak, efficiency, bubble)
        assumed = f"{100 * efficiency:g} % of {quantity(peak, 'FLOP/s')} per GPU (--efficiency)"
    mfu = flops / (seconds * plan.gpus * peak)
    days = 1e12 / tokens * seconds / 86400
    cost = predict.cost_usd(args.tokens / tokens * seconds, plan.gpus, args.usd_per_gpu_hour)
    rows = [
        ["tokens per step", f"{tokens:,}"],
        ["FLOPs per step", quantity(flops, "FLOP")],
        ["FLOPs per step with recomputation", quantity(executed, "FLOP")],
        ["time per step", quantity(seconds, "s")],
        ["pipeline bubble in it", quantity(100 * bubble, "%")],
        ["model FLOPs utilisation (MFU)", quantity(100 * mfu, "%")],
        ["throughput", quantity(tokens / seconds, "tok/s")],
        ["time per trillion tokens", f"{days:,.1f} days"],
        [f"cost of {args.tokens:,.0f} tokens", f"{cost:,.0f} USD"],
    ]
    run.table("speed", ["quantity", "predicted"], rows, caption="all GPUs together")
    run.print(
        f"assumed: {assumed}, {args.usd_per_gpu_hour:g} USD per GPU-hour (--usd-per-gpu-hour)"
    )
    run.print(left_out(a, plan, gpu, memory.host))
    run.extra(
        **memory_keys(memory, limit, gpu, suggestions, a),
        flops_per_step=flops,
        executed_flops_per_step=executed,
        tokens_per_step=tokens,
        step_seconds=seconds,
        mfu=mfu,
        pipeline_bubble=bubble,
        tokens_per_second=tokens / seconds,
        days_per_trillion_tokens=days,
        cost_usd=cost,
    )


def estimate_serving(run: Run, args: argparse.Namespace) -> None:
    name, a = chosen_model(args)
    gpu, plan = chosen_gpu(args), serving_plan(a, args)
    memory = predict.serving_memory(a, plan)
    describe_model(run, name, a, plan.pp)
    per_weight = predict.checkpoint_bytes(a, plan) / predict.total_parameters(a)
    run.print(
        f"plan: {plan.gpus} GPUs = {plan.replicas} replicas x {plan.tp} tensor x {plan.pp} "
        f"pipeline parallel, weights of {8 * per_weight:.3g} bits, {plan.kv_dtype} cache"
    )
    limit = show_memory(run, memory, gpu, args)
    suggestions = advise(
        run, memory, limit, plan, serving_changes(plan), lambda p: predict.serving_memory(a, p)
    )

    peak = predict.peak_for(gpu.peak_flops, plan.precision)
    flops, _, seconds = predict.decode_step(a, plan, peak, gpu.memory_bandwidth)
    prompt = plan.context * predict.forward_flops_per_token(a, plan.context)
    mfu = MFU if args.mfu is None else args.mfu
    prefill = prompt / (plan.tp * peak * mfu)
    per_replica = plan.batch / seconds
    speed = plan.replicas * per_replica
    cost = predict.cost_usd(args.tokens / speed, plan.gpus, args.usd_per_gpu_hour)
    batch = largest_batch(plan, lambda p: predict.serving_memory(a, p), limit)
    tokens = predict.cache_tokens(a, plan, limit)
    rows = [
        ["FLOPs per step (one token per sequence)", quantity(plan.replicas * flops, "FLOP")],
        ["time per step, at least", quantity(seconds, "s")],
        ["tokens per second and sequence, at most", f"{1 / seconds:,.1f}"],
        ["tokens per second and replica, at most", f"{per_replica:,.0f}"],
        ["tokens per second of all GPUs, at most", f"{speed:,.0f}"],
        [f"prefill of {plan.context} tokens at {mfu:.0%} of the peak", quantity(prefill, "s")],
        ["tokens that the cache of a replica holds", f"{tokens:,}"],
        ["largest batch that fits", f"{batch:,}"],
        [f"cost of {args.tokens:,.0f} generated tokens, at least", f"{cost:,.4g} USD"],
    ]
    run.table("speed", ["quantity", "predicted"], rows, caption="bounds that no engine beats")
    run.print(
        f"assumed: {quantity(gpu.memory_bandwidth, 'B/s')} and {quantity(peak, 'FLOP/s')} per GPU, "
        f"{args.usd_per_gpu_hour:g} USD per GPU-hour (--usd-per-gpu-hour)"
    )
    if args.target_tokens_per_second:
        run.print(meet_target(a, plan, gpu, args, max(batch, 1)))
    run.extra(
        **memory_keys(memory, limit, gpu, suggestions, a),
        flops_per_step=plan.replicas * flops,
        step_seconds=seconds,
        tokens_per_second=speed,
        cache_tokens=tokens,
        largest_batch=batch,
        cost_usd=cost,
    )


def describe_model(run: Run, name: str, a: Architecture, pp: int) -> None:
    total, active = predict.total_parameters(a), predict.active_parameters(a)
    run.print(
        f"model: {name}, {quantity(total, 'params')}, {quantity(active, 'params')} for each token, "
        f"{quantity(predict.kv_bytes_per_token(a), 'B')} of bf16 KV cache per token"
    )
    stages = sum(predict.rank_parameters(a, 1, pp, stage) for stage in range(pp))
    twice = a.vocab_size * a.hidden_size if a.tie_word_embeddings and pp > 1 else 0
    run.check_equal("the pipeline stages hold every parameter once", int(stages) - twice, total)


def show_memory(run: Run, memory: Memory, gpu: GpuSpec, args: argparse.Namespace) -> float:
    """Print the table of the fullest GPU; the bytes that may be used of it."""
    limit = usable_bytes(args, gpu)
    parts = [("weights", memory.weights)]
    if args.workload == "train":
        parts += [
            ("gradients", memory.gradients),
            ("optimizer", memory.optimizer),
            ("activations (peak)", memory.activations),
            ("total", memory.total),
            ("gathered and kept buffers", memory.workspace),
            ("reserve (CUDA context, NCCL)", gpu.memory_bytes - limit),
        ]
    else:
        parts += [
            ("room for the largest batch", memory.activations),
            ("KV cache", memory.kv_cache),
            ("total", memory.total),
            ("reserve (NCCL, workspaces)", memory.workspace),
            ("the engine's share", limit),
        ]
    parts += [("capacity", gpu.memory_bytes)]
    rows = [
        [name, quantity(n, "B"), quantity(100 * n / gpu.memory_bytes, "%")] for name, n in parts
    ]
    caption = f"the fullest GPU (pipeline stage {memory.stage})"
    run.table("memory", ["per GPU", "predicted", "of capacity"], rows, caption)
    return limit


def advise(
    run: Run,
    memory: Memory,
    limit: float,
    plan: Plan,
    kinds: list[list[Change]],
    memory_of: Callable[[Plan], Memory],
) -> list[dict[str, Any]]:
    """Say whether it fits and, if not, which flags make it fit; the same for the record."""
    if memory.needed <= limit:
        run.print(f"fits, with {quantity(limit - memory.needed, 'B')} to spare")
        return []
    run.print(f"does not fit: {quantity(memory.needed - limit, 'B')} too much per GPU")
    found = suggest(plan, kinds, memory_of, limit)
    for suggestion in found:
        total = quantity(suggestion.memory.total, "B")
        run.print(f"use {suggestion.flags}: total would be {total} on {suggestion.gpus} GPUs")
    if not found:
        run.print(
            "no change that was tried makes it fit; use a smaller model or a shorter sequence"
        )
    return [{"flags": s.flags, "total_bytes": s.memory.total, "gpus": s.gpus} for s in found]


def left_out(a: Architecture, plan: TrainingPlan, gpu: GpuSpec, host: float) -> str:
    """What the step time leaves out: communication, with the size of the data-parallel part, and
    the transfers and the optimizer's step of what is in the `host`'s memory."""
    gradient = predict.PRECISIONS[plan.precision].gradient
    size = gradient * predict.rank_parameters(a, plan.tp, plan.pp)
    moved = predict.data_parallel_bytes(size, plan.data_parallel, plan.zero)
    link = gpu.nvlink_bandwidth or gpu.pcie_bandwidth
    seconds = None if link is None else moved / (link / 2)
    offload = f"; transfers and steps of {quantity(host, 'B')} per GPU in the host's memory"
    return (
        "not in the time per step: communication; data parallelism alone moves "
        f"{quantity(moved, 'B')} per GPU, in {quantity(seconds, 's')} where nothing hides it"
        f"{offload if host else ''}"
    )


def meet_target(
    a: Architecture, plan: ServingPlan, gpu: GpuSpec, args: argparse.Namespace, largest: int
) -> str:
    """How many GPUs the target takes, at the batch that is given and at the largest that fits."""
    peak, target = predict.peak_for(gpu.peak_flops, plan.precision), args.target_tokens_per_second
    answers = []
    for batch in dict.fromkeys((plan.batch, largest)):
        seconds = predict.decode_step(a, replace(plan, batch=batch), peak, gpu.memory_bandwidth)[2]
        gpus = math.ceil(target * seconds / batch) * plan.tp * plan.pp
        price = gpus * args.usd_per_gpu_hour
        answers.append(f"{gpus:,} GPUs ({price:,.2f} USD per hour) at batch {batch:,}")
    return f"{target:,.0f} tokens per second need at least " + " or ".join(answers)


def memory_keys(
    memory: Memory, limit: float, gpu: GpuSpec, suggestions: list[dict[str, Any]], a: Architecture
) -> dict[str, Any]:
    return {
        "weights_bytes": memory.weights,
        "gradients_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "activations_bytes": memory.activations,
        "kv_cache_bytes": memory.kv_cache,
        "total_bytes": memory.total,
        "workspace_bytes": memory.workspace,
        "host_bytes": memory.host,
        "capacity_bytes": gpu.memory_bytes,
        "fits": memory.needed <= limit,
        "suggestions": suggestions,
        "parameters": predict.total_parameters(a),
        "active_parameters": predict.active_parameters(a),
    }


if __name__ == "__main__":
    script.exit(main)
