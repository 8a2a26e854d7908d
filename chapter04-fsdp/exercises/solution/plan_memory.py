"""Task 3, plan-memory: the reference solution."""

from types import SimpleNamespace

KINDS = ("weights", "optimizer", "gradients", "gathered", "reducing")


def plan_memory(units, settings):
    s, shards = settings, shards_of(settings)
    if s.mode == "none":
        weights, optimizer, gradients = (
            sum(units) * width for width in (s.weight, s.optimizer, s.gradient)
        )
        moments = [(weights, optimizer, gradients, 0, 0)]
    else:
        parts = [-(-unit // shards) for unit in units]
        moments = list(sharded_moments(parts, shards, s))
    most = {kind: max(sizes) for kind, sizes in zip(KINDS, zip(*moments, strict=True), strict=True)}
    return most | {"peak": max(map(sum, moments))}


def sharded_moments(parts, shards, s):
    """Bytes in the order of KINDS at each moment from backward on, of units with such shards."""
    held = sum(parts) * s.weight, sum(parts) * s.optimizer
    whole = [part * shards for part in parts]
    for unit in range(len(parts)):
        first = 0 if s.mode == "grad" else max(0, unit - s.prefetch)
        before, gradient = sum(whole[first:unit]), whole[unit] * s.reduced
        reduced = [sum(parts[after:]) * s.gradient for after in (unit + 1, unit)]
        yield *held, reduced[0], (before + whole[unit]) * s.gathered, gradient
        yield *held, reduced[1], before * s.gathered, gradient
    yield *held, sum(parts) * s.gradient, 0, 0


def shards_of(s):
    copies = s.replicas if s.mode == "hybrid" else 1
    if s.mode not in ("full", "grad", "hybrid", "none"):
        raise ValueError(f"mode {s.mode} is none of full, grad, hybrid and none")
    if s.prefetch < 0 or s.ranks < 1 or copies < 1 or s.ranks % copies:
        raise ValueError(f"prefetch {s.prefetch}, {s.ranks} ranks or {copies} replicas")
    return s.ranks // copies


def fewest_ranks(units, settings, budget, most):
    step = settings.replicas if settings.mode == "hybrid" else 1
    for ranks in range(step, most + 1, step):
        changed = SimpleNamespace(**{**vars(settings), "ranks": ranks})
        if plan_memory(units, changed)["peak"] <= budget:
            return ranks
    return None
