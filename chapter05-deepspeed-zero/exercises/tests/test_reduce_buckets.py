"""Task 2: every element is followed through its bucket to its owner."""

import math

import numpy as np


def random_model(chance):
    """(sizes, arrival, limit, ranks): mostly from the last parameter on, as backward does it."""
    most = int(chance.choice([3, 8, 30]))
    sizes = (
        chance.integers(0, most + 1, chance.integers(1, 9)) * (chance.random() < 0.95)
    ).tolist()
    arrival = list(range(len(sizes)))[::-1]
    order = chance.random()
    if order < 0.2:
        arrival = arrival[::-1]
    elif order < 0.5:
        arrival = chance.permutation(arrival).tolist()
    if chance.random() < 0.2:  # some have no gradient
        arrival = arrival[: int(chance.integers(0, len(arrival) + 1))]
    limit = int(chance.choice([1, most, 2 * most, *chance.integers(1, 60, 2)]))
    return sizes, arrival, limit, int(chance.integers(1, 7))


def filled(sizes, arrival, limit):
    """By trying how many more gradients each bucket holds."""
    buckets, left = [], list(arrival)
    while left:
        count = 1
        while count < len(left) and sum(sizes[n] for n in left[: count + 1]) <= limit:
            count += 1
        buckets.append(left[:count])
        left = left[count:]
    return buckets


def elements(sizes, bucket, ranks):
    """(owner, place in its part) of each element of the bucket's buffer."""
    part = math.ceil(sum(sizes) / ranks)
    return [
        divmod(place, part)
        for number in bucket
        for place in range(sum(sizes[:number]), sum(sizes[: number + 1]))
    ]


def runs(places):
    """(begin, end) of the runs of neighbours in which each is what follows the one before."""
    ends = [at for at in range(1, len(places)) if not places[at - 1][1](places[at][0])]
    return list(zip([0, *ends], [*ends, len(places)], strict=True)) if places else []


def slices_by_elements(sizes, bucket, ranks):
    owners = [owner for owner, _ in elements(sizes, bucket, ranks)]
    pairs = [(owner, lambda after, owner=owner: after == owner) for owner in owners]
    return [(owners[a], a, b) for a, b in runs(pairs)]


def landings_by_elements(sizes, bucket, ranks, rank):
    places = elements(sizes, bucket, ranks)
    pairs = [
        (place, lambda after, place=place: after == (place[0], place[1] + 1)) for place in places
    ]
    return [(a, b, places[a][1]) for a, b in runs(pairs) if places[a][0] == rank]


def assert_slices(got, expected, case):
    got = [tuple(one) for one in got]
    assert got == expected, f"{case}: expected {expected}, got {got}"
    assert all(type(n) is int for one in got for n in one), f"{case}: {got} are no ints"


def refused(function, arguments, why):
    try:
        got = function(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{why}: expected a ValueError, got {got!r:.200}")


def test_what_goes_into_which_bucket(student, chance):
    for sizes, arrival, limit, expected, why in (
        ([4, 3, 3], [2, 1, 0], 6, [[2, 1], [0]], "the second bucket is the last, and not full"),
        ([4, 3, 3], [2, 1, 0], 5, [[2], [1], [0]], "no gradient is cut"),
        ([4, 3, 3], [2, 1, 0], 10, [[2, 1, 0]], "exactly full"),
        ([4, 9, 3], [2, 1, 0], 5, [[2], [1], [0]], "9 are more than a bucket"),
        ([9, 1], [0, 1], 5, [[0], [1]], "9 are more than a bucket, and come first"),
        ([1, 9], [1, 0], 9, [[1], [0]], "9 fill a bucket"),
        ([2, 0, 0, 2], [3, 2, 1, 0], 2, [[3, 2, 1], [0]], "what is empty finds room in a full one"),
        ([0, 3], [1, 0], 2, [[1], [0]], "what is empty finds none beside more than the limit"),
        ([2, 2, 2], [1, 2, 0], 4, [[1, 2], [0]], "in the order of their arrival"),
        ([2, 2, 2], [2], 4, [[2]], "two without a gradient"),
        ([1, 1, 4, 1], [3, 2, 1, 0], 4, [[3], [2], [1, 0]], "an older bucket is closed"),
        ([2, 2, 2], [], 4, [], "no gradient"),
        ([], [], 1, [], "no parameter"),
    ):
        assert_buckets(student, sizes, arrival, limit, expected, f": {why}")
    for _ in range(80):
        sizes, arrival, limit, _ = random_model(chance)
        assert_buckets(student, sizes, arrival, limit, filled(sizes, arrival, limit))
    for limit in (0, -1):
        refused(student.fill_buckets, ([2, 2], [1, 0], limit), f"a limit of {limit}")
    refused(student.fill_buckets, ([2, 2], [1, 0, 1], 9), "1 arrives twice")
    refused(student.fill_buckets, ([2, 2], [1, 0, 1], 2), "1 arrives twice, in two buckets")
    refused(student.fill_buckets, ([], [], 0), "a limit of 0, and no gradient")


def assert_buckets(student, sizes, arrival, limit, expected, why=""):
    handed = list(sizes), list(arrival)
    got = [list(bucket) for bucket in student.fill_buckets(*handed, limit)]
    case = f"sizes {sizes} arrive as {arrival}, limit {limit}{why}"
    assert handed == (sizes, arrival), f"{case}: fill_buckets changed its arguments"
    assert got == expected, f"{case}: expected the buckets {expected}, got {got}"


def test_the_owners_of_a_bucket(student, chance):
    for sizes, bucket, ranks, expected, why in (
        ([4, 4], [1, 0], 2, [(1, 0, 4), (0, 4, 8)], "one each"),
        ([2, 6], [1, 0], 2, [(0, 0, 2), (1, 2, 6), (0, 6, 8)], "0 has two slices, apart"),
        ([2, 2, 2], [2, 1, 0], 1, [(0, 0, 6)], "one rank: one message"),
        ([2, 2, 4], [1, 0], 2, [(0, 0, 4)], "two parameters of one owner"),
        ([2, 2, 4], [0], 2, [(0, 0, 2)], "a part of a part"),
        ([9], [0], 4, [(0, 0, 3), (1, 3, 6), (2, 6, 9)], "a parameter of three owners, of four"),
        ([5, 0, 5], [2, 1, 0], 2, [(1, 0, 5), (0, 5, 10)], "an empty one between"),
        ([3, 4], [1], 2, [(0, 0, 1), (1, 1, 4)], "parts of 4, the last with padding"),
        ([0, 3], [0], 2, [], "nothing"),
        ([0, 0], [1, 0], 3, [], "nothing at all"),
        ([3], [], 2, [], "an empty bucket"),
        ([2, 2, 0], [1, 2], 2, [(1, 0, 2)], "an empty one at the end"),
        (
            [2**60 + 1, 2**60 + 2],
            [1, 0],
            2,
            [(0, 0, 1), (1, 1, 2**60 + 2), (0, 2**60 + 2, 2**61 + 3)],
            "exact",
        ),
    ):
        handed = list(sizes), list(bucket)
        got = student.owner_slices(*handed, ranks)
        assert_slices(got, expected, f"sizes {sizes}, bucket {bucket}, {ranks} ranks: {why}")
        assert handed == (sizes, bucket), f"{sizes}, {bucket}: owner_slices changed its arguments"
    for _ in range(80):
        sizes, arrival, limit, ranks = random_model(chance)
        for bucket in filled(sizes, arrival, limit):
            case = f"sizes {sizes}, bucket {bucket}, {ranks} ranks"
            expected = slices_by_elements(sizes, bucket, ranks)
            assert_slices(student.owner_slices(sizes, bucket, ranks), expected, case)
    for ranks in (0, -2):
        refused(student.owner_slices, ([3], [0], ranks), f"{ranks} ranks")
    large = 2**60 + 1  # and a rank more than it divides by
    sizes, half = [large, large - 2], 2**60
    expected = [(1, 0, large - 2), (0, large - 2, 2 * large - 3), (1, 2 * large - 3, 2 * large - 2)]
    assert_slices(student.owner_slices(sizes, [1, 0], 2), expected, f"sizes 2**60 ± 1, {half} each")


def test_where_an_owner_puts_it(student, chance):
    for sizes, bucket, ranks, rank, expected, why in (
        ([4, 4], [1, 0], 2, 0, [(4, 8, 0)], "the second half of the bucket"),
        ([4, 4], [1, 0], 2, 1, [(0, 4, 0)], "the part begins anew"),
        ([2, 3, 3], [2, 1, 0], 1, 0, [(0, 3, 5), (3, 6, 2), (6, 8, 0)], "in backward order"),
        ([2, 3, 3], [0, 1, 2], 1, 0, [(0, 8, 0)], "in forward order: one copy"),
        ([2, 3, 3], [1, 2, 0], 1, 0, [(0, 6, 2), (6, 8, 0)], "two of three"),
        ([2, 3, 3], [2, 0, 1], 1, 0, [(0, 3, 5), (3, 8, 0)], "the last two of three"),
        ([2, 3, 3], [0, 2], 1, 0, [(0, 2, 0), (2, 5, 5)], "one is not in this bucket"),
        ([2, 6], [1, 0], 2, 0, [(0, 2, 2), (6, 8, 0)], "of two slices"),
        ([3, 2, 4], [1, 2], 3, 1, [(0, 3, 0)], "a part that ends in a parameter"),
        ([6], [0], 3, 2, [(4, 6, 0)], "its part of a parameter"),
        ([6], [0], 4, 3, [], "nothing but padding"),
        ([2, 2], [1], 2, 0, [], "another one's"),
        ([2, 0, 2], [0, 1, 2], 1, 0, [(0, 4, 0)], "an empty one between"),
        ([2, 0, 2], [2, 0, 1], 1, 0, [(0, 2, 2), (2, 4, 0)], "an empty one at the end"),
        ([2, 2, 4], [0, 2, 1], 2, 0, [(0, 2, 0), (6, 8, 2)], "another one's between neighbours"),
        (
            [2**60 + 1, 2**60 + 2],
            [1, 0],
            2,
            0,
            [(0, 1, 2**60 + 1), (2**60 + 2, 2**61 + 3, 0)],
            "exact",
        ),
    ):
        case = f"sizes {sizes}, bucket {bucket}, rank {rank} of {ranks}"
        handed = list(sizes), list(bucket)
        got = student.landings(*handed, ranks, rank)
        assert_slices(got, expected, f"{case}: {why}")
        assert handed == (sizes, bucket), f"{case}: landings changed its arguments"
    for _ in range(80):
        sizes, arrival, limit, ranks = random_model(chance)
        for bucket in filled(sizes, arrival, limit):
            rank = int(chance.integers(ranks))
            case = f"sizes {sizes}, bucket {bucket}, rank {rank} of {ranks}"
            expected = landings_by_elements(sizes, bucket, ranks, rank)
            assert_slices(student.landings(sizes, bucket, ranks, rank), expected, case)
    for rank, ranks in ((2, 2), (-1, 2), (0, 0)):
        refused(student.landings, ([3], [0], ranks, rank), f"rank {rank} of {ranks}")
        refused(student.landings, ([3], [], ranks, rank), f"rank {rank} of {ranks}, no gradient")


def test_every_number_is_reduced_once(student, chance):
    for _ in range(40):
        sizes, arrival, limit, ranks = random_model(chance)
        n, part = sum(sizes), math.ceil(sum(sizes) / ranks)
        case = f"sizes {sizes} arrive as {arrival}, limit {limit}, {ranks} ranks"
        flats = chance.integers(1, 1000, (ranks, n))
        begins = np.cumsum([0, *sizes])
        found = np.zeros((ranks, part), int)
        for bucket in student.fill_buckets(sizes, arrival, limit):
            bounds = [slice(begins[number], begins[number + 1]) for number in bucket]
            buffers = np.concatenate([flats[:, bound] for bound in bounds], axis=1)
            reduced = {}  # by owner: its elements of the buffer
            for owner, begin, end in student.owner_slices(sizes, bucket, ranks):
                own = reduced.setdefault(owner, np.zeros(buffers.shape[1], int))
                own[begin:end] += buffers[:, begin:end].sum(0)
            for rank in range(ranks):
                own = reduced.get(rank, np.zeros(buffers.shape[1], int))
                for begin, end, there in student.landings(sizes, bucket, ranks, rank):
                    found[rank, there : there + end - begin] += own[begin:end]
        expected = np.zeros(ranks * part, int)
        for number in arrival:
            bound = slice(begins[number], begins[number + 1])
            expected[bound] = flats[:, bound].sum(0)
        got = found.reshape(-1)
        assert (got == expected).all(), (
            f"{case}: the owners' parts are {got.tolist()!r:.300}, expected the sums "
            f"{expected.tolist()!r:.300}"
        )
