"""What to change in a plan that does not fit, and the largest batch of one that does."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from typing import Any, TypeVar

from distlab.errors import UsageError
from distlab.predict import Memory, ServingPlan, TrainingPlan

Plan = TypeVar("Plan", TrainingPlan, ServingPlan)
Change = dict[str, Any]  # fields of the plan and their new values
MOST_SHOWN, MOST_DOUBLINGS = 3, 12  # suggestions; times that the GPUs are doubled for one


@dataclass(frozen=True)
class Suggestion:
    """Flags to add or change, and what the fullest GPU then holds."""

    flags: str
    gpus: int
    memory: Memory


def suggest(
    plan: Plan, kinds: list[list[Change]], memory_of: Callable[[Plan], Memory], limit: float
) -> list[Suggestion]:
    """Up to three ways to bring `plan` to `limit` bytes or fewer: fewest GPUs, then fewest changes.

    `kinds` are kinds of change, the mildest first, each a list of changes to try. Of every set of
    kinds the first plan that fits counts, unless fewer of the same kinds do. GPUs are doubled only
    when nothing else will do.
    """
    for doublings in range(MOST_DOUBLINGS + 1):
        larger = replace(plan, gpus=plan.gpus * 2**doublings)
        found: dict[frozenset[int], Suggestion] = {}
        for count in range(len(kinds) + 1):
            for chosen in map(frozenset, combinations(range(len(kinds)), count)):
                if len(found) == MOST_SHOWN or any(fewer <= chosen for fewer in found):
                    continue
                tried = [kinds[index] for index in sorted(chosen)]
                if fitting := _first_that_fits(plan, larger, tried, memory_of, limit):
                    found[chosen] = fitting
        if found:
            return list(found.values())
    return []


def training_changes(plan: TrainingPlan) -> list[list[Change]]:
    """Sharding costs least, then recomputation; another optimizer comes last."""
    halvings = [2**n for n in range(1, 12) if plan.micro_batch % 2**n == 0]
    return [
        [{"zero": stage} for stage in range(plan.zero + 1, 4)],
        [] if plan.checkpointing else [{"recompute": "full"}],
        [
            {"micro_batch": plan.micro_batch // n, "accumulation": plan.accumulation * n}
            for n in halvings
        ],
        [{"tp": plan.tp * n} for n in (2, 4, 8) if plan.tp * n <= 8],
        [{"pp": plan.pp * n} for n in (2, 4, 8, 16)],
        [{"optimizer": "adamw-8bit"}] if plan.optimizer == "adamw" else [],
    ]


def serving_changes(plan: ServingPlan) -> list[list[Change]]:
    """A narrower cache and a smaller batch come before narrower weights."""
    wide = ("fp32", "bf16", "fp16")
    return [
        [{"kv_dtype": "fp8"}] if plan.kv_dtype in wide else [],
        [{"batch": plan.batch // 2**n} for n in range(1, 20) if plan.batch // 2**n],
        [{"precision": "fp8"}, {"precision": "int4"}] if plan.precision in wide else [],
        [{"tp": plan.tp * n} for n in (2, 4, 8) if plan.tp * n <= 8],
        [{"pp": plan.pp * n} for n in (2, 4, 8, 16)],
    ]


def largest_batch(
    plan: ServingPlan, memory_of: Callable[[ServingPlan], Memory], limit: float
) -> int:
    """The most sequences per replica that fit, 0 where not even one does; found by bisection."""

    def fits(batch: int) -> bool:
        return memory_of(replace(plan, batch=batch)).needed <= limit

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _first_that_fits(
    plan: Plan,
    larger: Plan,
    kinds: list[list[Change]],
    memory_of: Callable[[Plan], Memory],
    limit: float,
) -> Suggestion | None:
    for changes in product(*kinds):
        changed = larger
        for change in changes:
            changed = replace(changed, **change)
        try:
            memory = memory_of(changed)
        except UsageError:  # degrees that this model or number of GPUs cannot have
            continue
        if memory.needed <= limit:
            return Suggestion(_flags(plan, changed), changed.gpus, memory)
    return None


def _flags(plan: Plan, changed: Plan) -> str:
    words = []
    for name in (field.name for field in fields(plan)):
        if (value := getattr(changed, name)) == getattr(plan, name):
            continue
        full = name == "recompute"
        flag = name.replace("_", "-")
        words.append("--activation-checkpointing" if full else f"--{flag} {value}")
    return " ".join(words)
