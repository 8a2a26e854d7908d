"""What each collective costs: exact steps and bytes for every rank, and the alpha-beta time.

n elements over K ranks are cut into chunks of n // K, the first n % K of them with one more. Steps
are those in which a rank sends or receives; the busiest rank's are the collective's.
"""

from collections.abc import Callable
from dataclasses import dataclass

from distlab import predict

PIPELINED = "all-reduce (pipelined ring)"
SLICE_BYTES = 2**20  # of the pipelined ring
Count = Callable[[int, int, int], int]  # of n elements, on rank r, of K ranks


@dataclass(frozen=True)
class Formula:
    """`steps` and `elements` (those that a rank sends), exact; `seconds` in the alpha-beta model.

    A message of n bytes takes alpha + n·beta seconds; `seconds(n, K, alpha, beta)`.
    """

    steps: Count
    elements: Count
    seconds: Callable[[float, int, float, float], float]


def chunk(n: int, index: int, workers: int) -> int:
    """The size of chunk `index`, counted round the ring: n // K, or one more."""
    return n // workers + (index % workers < n % workers)


def binomial_children(rank: int, workers: int) -> int:
    """To how many ranks `rank` sends in the tree with root 0.

    Its distances are the powers of two below its lowest set bit (the root: any) that lead to a
    rank below K.
    """
    reach = (workers - rank - 1).bit_length()
    return reach if rank == 0 else min(reach, (rank & -rank).bit_length() - 1)


def core_steps(workers: int) -> int:
    """floor(lg K): recursive doubling's steps among the largest power of two of the ranks."""
    return workers.bit_length() - 1


def doubling_roles(rank: int, workers: int) -> tuple[bool, bool]:
    """Whether `rank` stands above the largest power of two, and whether it serves one that does."""
    core = 1 << core_steps(workers)
    return rank >= core, rank + core < workers


def tree_steps(n: int, rank: int, workers: int) -> int:
    return binomial_children(rank, workers) + (rank > 0)


def doubling_steps(n: int, rank: int, workers: int) -> int:
    outside, serves = doubling_roles(rank, workers)
    return 2 if outside else core_steps(workers) + 2 * serves


def doubling_elements(n: int, rank: int, workers: int) -> int:
    outside, serves = doubling_roles(rank, workers)
    return n if outside else (core_steps(workers) + serves) * n


def ring_elements(n: int, rank: int, workers: int) -> int:
    """Every chunk but its own in the reduce-scatter, every one but its right neighbour's after."""
    return 2 * n - chunk(n, rank, workers) - chunk(n, rank + 1, workers)


def around(n: int, rank: int, workers: int) -> int:
    return workers - 1


FORMULAS = {
    "broadcast (tree)": Formula(
        steps=tree_steps,
        elements=lambda n, r, workers: n * binomial_children(r, workers),
        seconds=predict.tree_broadcast,
    ),
    "reduce-scatter (ring)": Formula(
        steps=around,
        elements=lambda n, r, workers: n - chunk(n, r, workers),
        seconds=predict.ring_reduce_scatter,
    ),
    "all-gather (ring)": Formula(
        steps=around,
        elements=lambda n, r, workers: n - chunk(n, r + 1, workers),
        seconds=predict.ring_all_gather,
    ),
    "all-to-all (pairwise)": Formula(
        steps=around,
        elements=lambda n, r, workers: n - chunk(n, r, workers),
        seconds=predict.pairwise_all_to_all,
    ),
    "all-reduce (ring)": Formula(
        steps=lambda n, r, workers: 2 * around(n, r, workers),
        elements=ring_elements,
        seconds=predict.ring_all_reduce,
    ),
    "all-reduce (tree)": Formula(
        steps=lambda n, r, workers: 2 * tree_steps(n, r, workers),
        elements=lambda n, r, workers: n * (binomial_children(r, workers) + (r > 0)),
        seconds=predict.tree_all_reduce,
    ),
    "all-reduce (recursive doubling)": Formula(
        steps=doubling_steps,
        elements=doubling_elements,
        seconds=predict.recursive_doubling_all_reduce,
    ),
}


def pipelined(slice_elements: int) -> Formula:
    """The ring's formula for a tensor in slices: the steps of different slices overlap."""
    ring = FORMULAS["all-reduce (ring)"]

    def total(count: Count) -> Count:
        def over_slices(n: int, rank: int, workers: int) -> int:
            whole, rest = divmod(n, slice_elements)
            last = count(rest, rank, workers) if rest or not whole else 0
            return whole * count(slice_elements, rank, workers) + last

        return over_slices

    return Formula(total(ring.steps), total(ring.elements), ring.seconds)
