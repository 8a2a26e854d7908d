"""Which ranks belong together: groups of close GPUs, their rings, their NICs and their cores."""

from collections.abc import Callable, Sequence
from itertools import combinations, permutations

from _topology_matrix import Matrix, closeness

Joined = Callable[[str, str], bool]


def best_groups(matrix: Matrix, count: int, size: int) -> list[tuple[str, ...]]:
    """`count` disjoint groups of `size` GPUs whose farthest link is as close as can be.

    Of equally good choices it is the first in the GPUs' order, so that ranks keep their order
    where nothing is gained by another.
    """
    levels = {matrix.link(a, b) for a, b in combinations(matrix.gpus, 2)} if size > 1 else {"X"}
    for level in sorted(levels, key=closeness, reverse=True):
        found = _disjoint_groups(matrix.gpus, count, size, _at_least(matrix, level))
        if found is not None:
            return found
    raise ValueError(f"{len(matrix.gpus)} GPUs are too few for {count} groups of {size}")


def _at_least(matrix: Matrix, level: str) -> Joined:
    return lambda a, b: closeness(matrix.link(a, b)) >= closeness(level)


def _disjoint_groups(
    free: Sequence[str], count: int, size: int, joined: Joined
) -> list[tuple[str, ...]] | None:
    """`count` groups of `free` in which all pairs are joined, or None; by trial."""
    if count == 0:
        return []
    if len(free) < count * size:
        return None
    first, rest = free[0], free[1:]
    near = [gpu for gpu in rest if joined(first, gpu)]
    for mates in combinations(near, size - 1):
        if all(joined(a, b) for a, b in combinations(mates, 2)):
            others = [gpu for gpu in rest if gpu not in mates]
            if (found := _disjoint_groups(others, count - 1, size, joined)) is not None:
                return [(first, *mates), *found]
    return _disjoint_groups(rest, count, size, joined)


def worst_of(matrix: Matrix, groups: Sequence[Sequence[str]]) -> str:
    """The farthest link inside any of the groups."""
    return min((matrix.worst(group) for group in groups), key=closeness)


def best_by_trying_all(matrix: Matrix, size: int) -> str:
    """The farthest link of the best grouping of all GPUs, by trying every one: only for a few."""
    return max(
        (worst_of(matrix, groups) for groups in _groupings(matrix.gpus, size)), key=closeness
    )


def _groupings(gpus: Sequence[str], size: int) -> list[list[tuple[str, ...]]]:
    if not gpus:
        return [[]]
    return [
        [(gpus[0], *mates), *others]
        for mates in combinations(gpus[1:], size - 1)
        for others in _groupings([gpu for gpu in gpus[1:] if gpu not in mates], size)
    ]


def best_ring(matrix: Matrix, group: Sequence[str]) -> tuple[str, ...]:
    """The order of `group` whose farthest link between neighbours, ends included, is closest.

    A ring all-reduce uses no other links, so a ring may be fast where not all pairs are.
    """
    if len(group) < 4:  # all orders have the same neighbours
        return tuple(group)
    levels = {matrix.link(a, b) for a, b in combinations(group, 2)}
    for level in sorted(levels, key=closeness, reverse=True):
        if ring := _extend((group[0],), group, _at_least(matrix, level)):
            return ring
    raise AssertionError("at the farthest link every order is a ring")


def _extend(path: tuple[str, ...], group: Sequence[str], joined: Joined) -> tuple[str, ...] | None:
    if len(path) == len(group):
        return path if joined(path[-1], path[0]) else None
    for gpu in (gpu for gpu in group if gpu not in path and joined(path[-1], gpu)):
        if (ring := _extend((*path, gpu), group, joined)) is not None:
            return ring
    return None


def ring_link(matrix: Matrix, ring: Sequence[str]) -> str:
    """The farthest link between neighbours of a ring."""
    return min((matrix.link(a, b) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)),
               key=closeness)  # fmt: skip


def ring_by_trying_all(matrix: Matrix, group: Sequence[str]) -> str:
    """The best ring's farthest link, by trying every order: only for a few."""
    orders = ((group[0], *rest) for rest in permutations(group[1:]))
    return max((ring_link(matrix, order) for order in orders), key=closeness)


def nearest_nics(matrix: Matrix, gpu: str) -> list[str]:
    """The NICs that no other is closer than; none where the matrix names none."""
    best = max((closeness(matrix.link(gpu, nic)) for nic in matrix.nics), default=None)
    return [nic for nic in matrix.nics if closeness(matrix.link(gpu, nic)) == best]


def share_of_cores(cores: str, parts: int, index: int) -> str:
    """The `index`-th of `parts` equal shares of a list as 0-55,112-167, each range divided.

    The second range holds the hardware threads of the first's cores, so a share keeps both. A list
    too short to divide is shared whole.
    """
    shares = []
    for low, high in map(_ends, cores.split(",")):
        each = (high - low + 1) // parts
        if each == 0:
            return cores
        first = low + index * each
        shares.append(str(first) if each == 1 else f"{first}-{first + each - 1}")
    return ",".join(shares)


def _ends(piece: str) -> tuple[int, int]:
    low, _, high = piece.partition("-")
    return int(low), int(high or low)


def count_cores(cores: str) -> int:
    return sum(high - low + 1 for low, high in map(_ends, cores.split(",")))
