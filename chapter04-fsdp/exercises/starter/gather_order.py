"""Task 2, gather-order: which units are whole at which moment of a step."""

from collections.abc import Collection, Mapping, Sequence


def step_events(
    uses: Sequence[str], frozen: Collection[str], reshard_after_forward: bool, prefetch: int
) -> list[tuple[str, str]]:
    """All events of a step in their order: (what, name of the unit).

    `uses` are the units in the order in which the forward pass computes with them; one may come
    several times, in a row or not, and a unit that does not come has no event. The step computes
    with them in this order ("forward"), then with the same uses in the opposite order ("backward").
    The backward pass ends at the first use of a unit that is not `frozen`: what was computed before
    it needs no gradient. Where every used unit is frozen, there is none.

    Before each of these computes the units of it and of the `prefetch` computes that come next,
    forward or backward, are gathered ("gather"), in this order, those that are not whole yet. After
    the compute its unit is freed ("free") unless one of those `prefetch` next computes is with it.
    So at most 1 + prefetch units are whole. With `reshard_after_forward` False a unit is freed only
    after its last compute in the step, and so gathered once.

    A unit's gradient is whole after its last backward compute. It is reduced ("reduce") then, once,
    after the unit is freed, where it is: the weights' memory is there for the reduction. Frozen
    units are not reduced. `frozen` may name units that are not used.

    ValueError is raised where `prefetch` is negative. The arguments are not changed.
    """
    raise NotImplementedError("gather_order.step_events is yours to write")


def most_gathered(events: Sequence[tuple[str, str]], sizes: Mapping[str, int]) -> int:
    """The most bytes that are whole at once in these events, of units of these sizes in bytes.

    A unit is whole from its "gather" to its "free"; some may be whole still at the end. 0 where
    nothing is gathered. `sizes` may hold units without events.
    """
    raise NotImplementedError("gather_order.most_gathered is yours to write")
