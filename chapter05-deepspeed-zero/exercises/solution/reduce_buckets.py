"""Task 2, reduce-buckets: the reference solution."""

from itertools import accumulate


def fill_buckets(sizes, arrival, limit):
    if limit < 1 or len(set(arrival)) < len(arrival):
        raise ValueError(f"a limit of {limit}, and gradients in the order {arrival}")
    buckets = []
    for number in arrival:
        if not buckets or sum(sizes[other] for other in [*buckets[-1], number]) > limit:
            buckets.append([])
        buckets[-1].append(number)
    return buckets


def owner_slices(sizes, bucket, ranks):
    slices = []
    for owner, begin, end, _ in pieces(sizes, bucket, ranks):
        if slices and slices[-1][0] == owner:
            begin = slices.pop()[1]
        slices.append((owner, begin, end))
    return slices


def landings(sizes, bucket, ranks, rank):
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is none of {ranks}")
    found = []
    for owner, begin, end, there in pieces(sizes, bucket, ranks):
        if owner != rank:
            continue
        if found and (found[-1][1], found[-1][2]) == (begin, there - begin + found[-1][0]):
            begin, _, there = found.pop()
        found.append((begin, end, there))
    return found


def pieces(sizes, bucket, ranks):
    """(owner, begin and end in the bucket, begin in the owner's part): of one parameter each."""
    if ranks < 1:
        raise ValueError(f"{ranks} ranks")
    part, begins = -(-sum(sizes) // ranks), [0, *accumulate(sizes)]
    found, filled = [], 0
    for number in bucket:
        at, stop = begins[number : number + 2]
        while at < stop:
            owner, there = divmod(at, part)
            length = min(part - there, stop - at)
            found.append((owner, filled, filled + length, there))
            at, filled = at + length, filled + length
    return found
