"""Task 2, reduce-buckets: ZeRO's stage 2, in which each gradient goes to those who own it.

Everywhere below `sizes` are the numbers of elements of all parameters; some may be 0. Side by side
in this order they are the flat buffer, of which rank r owns part r, ceil(n / ranks) elements long.
"""

from collections.abc import Sequence


def fill_buckets(sizes: Sequence[int], arrival: Sequence[int], limit: int) -> list[list[int]]:
    """The parameters in each bucket, by number, as their gradients arrive.

    `arrival` names the parameters in the order in which backward completes their gradients; those
    that it does not name have none. A gradient goes whole into the newest bucket if this then has
    at most `limit` elements, and otherwise begins the next one: so a gradient of more than `limit`
    is in a bucket of which it is all elements. No bucket is an empty list, and no two gradients
    change their order. ValueError is raised for a limit below 1, and where one arrives twice.
    """
    raise NotImplementedError("reduce_buckets.fill_buckets is yours to write")


def owner_slices(sizes: Sequence[int], bucket: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """Which elements of a bucket are reduced to which rank: (owner, begin, end), each one message.

    A bucket's buffer holds the gradients of its parameters, in the order of `bucket`; begin and end
    count its elements. The slices stand in the order of the buffer and cover it; none is empty, and
    neighbours of one owner are one slice. The bounds of the parts may lie anywhere in a parameter,
    and one parameter may have many owners. ValueError is raised for fewer ranks than 1.
    """
    raise NotImplementedError("reduce_buckets.owner_slices is yours to write")


def landings(
    sizes: Sequence[int], bucket: Sequence[int], ranks: int, rank: int
) -> list[tuple[int, ...]]:
    """Where `rank` puts the elements of a bucket that it owns: (begin, end, there).

    Elements begin to end of the bucket's buffer go to `there` and behind it in the rank's part of
    the flat buffer. Gradients arrive from the last parameter to the first, or in any order, so that
    neighbours in the bucket may lie elsewhere in the part: they are one copy where they are
    neighbours in the same order in both, and only there. In the order of the bucket, none is empty.
    ValueError is raised as in `owner_slices`, and where `rank` is none of `ranks`.
    """
    raise NotImplementedError("reduce_buckets.landings is yours to write")
