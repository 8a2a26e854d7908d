"""Task 5: jobs of several ranks, whose norm is that of the whole model on one."""

import math

import torch
from grader_gradients import clipped

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
TOLERANCE = 1e-5  # of sums in float32
NAN, INF = math.nan, math.inf


class Job:
    """All ranks' gradients: `copies` times the shards of one model, and those that all have."""

    def __init__(self, student, shards, replicated, copies=1):
        self.student, self.replicas = student, copies
        self.shards, self.replicated = shards, replicated
        self.ranks = [shards[rank] for _ in range(copies) for rank in range(len(shards))]

    def __str__(self):
        def told(gradients):
            kinds = [
                "None" if one is None else f"{str(one.dtype)[6:]} {tuple(one.shape)}"
                for one in gradients
            ]
            return ", ".join(kinds) or "none"

        return (
            f"{len(self.ranks)} ranks, {self.replicas} replicas; rank 0's shards: "
            f"{told(self.shards[0])}; on all ranks: {told(self.replicated)}"
        )

    def squares(self):
        """Of all elements of one model."""
        every = [*(one for shards in self.shards for one in shards), *self.replicated]
        parts = [one.double().flatten() for one in every if one is not None]
        return float(torch.cat(parts).square().sum()) if parts else 0.0

    def run(self, function):
        """(what `function` gives, its sharded, its replicated) on every rank, in one collective
        call: once each rank says what it adds, and the second time it gets the sum."""
        sums = [self.called(function, shards, lambda value: value)[1] for shards in self.ranks]
        total = sum(sums)
        results = []
        for shards, own in zip(self.ranks, sums, strict=True):
            result, value = self.called(function, shards, lambda value: total)
            assert repr(value) == repr(own), f"{self}: a rank adds {own}, and again {value}"
            results.append(result)
        return results

    def called(self, function, shards, answer):
        values = []

        def all_reduce(value):
            assert type(value) is float, (
                f"{self}: all_reduce takes a float of Python, not {type(value).__name__}"
            )
            values.append(value)
            return answer(value)

        sharded, replicated = copied(shards), copied(self.replicated)
        result = function(sharded, replicated, all_reduce, self.replicas)
        assert len(values) == 1, (
            f"{self}: all_reduce was called {len(values)} times; each rank calls it once"
        )
        return (result, sharded, replicated), values[0]

    def norm(self):
        """On every rank the same."""

        norms = []
        results = self.run(self.student.global_norm)
        for shards, (norm, sharded, replicated) in zip(self.ranks, results, strict=True):
            assert type(norm) is float, f"{self}: the norm is a {type(norm).__name__}"
            unchanged = bits([*sharded, *replicated]) == bits([*shards, *self.replicated])
            assert unchanged, f"{self}: global_norm changed the gradients"
            norms.append(norm)
        assert len(set(map(repr, norms))) == 1, f"{self}: the ranks' norms differ: {norms}"
        return norms[0]


def copied(gradients):
    return [None if one is None else one.clone() for one in gradients]


def bits(gradients):
    return [None if one is None else one.view(BITS[one.itemsize]).tolist() for one in gradients]


def normal(chance, shape, dtype, scale=1.0):
    return torch.tensor(chance.normal(size=shape) * scale).to(dtype)


def random_job(student, chance, scale=1.0, some=False, dtypes=DTYPES):
    """With empty shards, and parameters without a gradient; with `some`, a gradient at least."""
    ranks, copies = int(chance.integers(1, 5)), int(chance.choice([1, 1, 2, 3]))

    def gradients(count, missing):
        found = []
        for _ in range(count):
            shape = tuple(chance.integers(0, 9, chance.integers(1, 3)).tolist())
            dtype = dtypes[int(chance.integers(len(dtypes)))]
            there = chance.random() >= missing
            found.append(normal(chance, shape, dtype, scale) if there else None)
        return found

    missing = float(chance.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1]))
    shards = [gradients(int(chance.integers(0, 4)), missing) for _ in range(ranks)]
    replicated = gradients(int(chance.integers(0, 3)), missing)
    if some:
        replicated.append(normal(chance, (3, 2), DTYPES[int(chance.integers(4))], scale))
    return Job(student, shards, replicated, copies)


def assert_norm(job, expected, why=""):
    got = job.norm()
    same = math.isclose(got, expected, rel_tol=TOLERANCE) or repr(got) == repr(expected)
    assert same, f"{job}: expected a norm of {expected}, got {got}{': ' if why else ''}{why}"


def floats(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def test_every_gradient_counts_once(student, chance):
    for shards, replicated, copies, expected, why in (
        ([[floats(3.0)], [floats(4.0)]], [], 1, 5.0, "3 and 4 on two ranks"),
        ([[floats(3.0)]], [floats(4.0)], 1, 5.0, "one rank"),
        ([[floats(2.0)], [floats(1.0)]], [floats(2.0)], 1, 3.0, "2 is on all ranks, and one"),
        ([[floats(3.0)], [floats(4.0)]], [], 2, 5.0, "two copies of the model are one model"),
        ([[floats(2.0)], [floats(1.0)]], [floats(2.0)], 3, 3.0, "three copies, and one whole"),
        ([[], [floats(6.0, 8.0)]], [], 1, 10.0, "a rank without any shard"),
        ([[None], [floats(5.0)]], [None], 1, 5.0, "None on one rank"),
        ([[None, None], [None, None]], [None], 1, 0.0, "nobody has a gradient"),
        ([[], []], [], 1, 0.0, "no parameters"),
        ([[floats(0.0, 0.0)], [floats()]], [], 1, 0.0, "zeros"),
        ([[floats(-3.0)], [floats(-4.0)]], [floats(0.0)], 1, 5.0, "signs"),
    ):
        assert_norm(Job(student, shards, replicated, copies), expected, why)
    for _ in range(20):
        scale = float(chance.choice([1.0, 1e-3, 100.0]))
        job = random_job(student, chance, scale, dtypes=(torch.float32, torch.float64))
        assert_norm(job, math.sqrt(job.squares()))


def test_low_precision_and_what_is_not_finite(student, chance):
    for dtype in (torch.bfloat16, torch.float16):
        ones = torch.ones(5000, dtype=dtype)  # in bfloat16 a sum stays at 256, in float16 at 2048
        job = Job(student, [[ones], [ones]], [ones], 1)
        assert_norm(job, math.sqrt(15000), f"15,000 ones in {dtype}")
        job = Job(student, [[one for one in ones[:600].split(1)]], [], 1)
        assert_norm(job, math.sqrt(600), f"600 gradients of a one in {dtype}")
    large = floats(*(2.0 * chance.integers(150, 30_000, 6)), dtype=torch.float16)
    job = Job(student, [[large], [large]], [large], 2)
    assert_norm(job, math.sqrt(job.squares()), "float16, whose squares are over 65,504")
    for dtype, scale in (
        (torch.float16, 1e-5), (torch.bfloat16, 1e-12), (torch.float32, 1e-13),
        (torch.float32, 1e13), (torch.bfloat16, 1e14),
    ):  # fmt: skip
        made = [normal(chance, (40,), dtype, scale) for _ in range(3)]
        job = Job(student, [made[:1], made[1:2]], made[2:])
        assert_norm(job, math.sqrt(job.squares()), f"magnitudes of {scale} in {dtype}")
    for _ in range(10):
        job = random_job(student, chance, float(chance.choice([1.0, 100.0])))
        assert_norm(job, math.sqrt(job.squares()))
    pairs = (NAN, 1.0, NAN), (INF, 1.0, INF), (-INF, INF, INF), (INF, NAN, NAN)
    for bad, other, expected in pairs:
        for dtype in (DTYPES[number] for number in chance.permutation(4)[:2]):
            one, two, good = (floats(2.0, value, dtype=dtype) for value in (bad, other, 1.0))
            for shards, replicated in (
                ([[good], [one, two]], []),
                ([[one], [two]], [good]),
                ([[good], [two]], [one]),
                ([[one], [good]], [two]),
                ([[good], [good]], [two, one]),
            ):
                job = Job(student, shards, replicated, int(chance.integers(1, 3)))
                assert_norm(job, expected, f"with {bad} and {other}")


def test_the_factor(student, chance):
    for norm, max_norm, expected, why in (
        (2.0, 1.0, 0.5, "half"),
        (1.0, 1.0, 1.0, "exactly as large"),
        (0.5, 1.0, 1.0, "smaller: never multiplied by more than 1"),
        (0.0, 1.0, 1.0, "zero"),
        (0.0, 0.0, 1.0, "zero is at most zero"),
        (3.0, 0.0, 0.0, "all must be zero"),
        (1e-9, 1e-10, 0.1, "nothing is added to the norm"),
        (1e30, 1.0, 1e-30, "a large one"),
        (3.0, INF, 1.0, "nothing is clipped"),
        (INF, 1.0, 1.0, "no factor mends it"),
        (INF, INF, 1.0, "no factor mends it"),
        (NAN, 1.0, 1.0, "no factor mends it"),
        (NAN, 0.0, 1.0, "no factor mends it"),
        (INF, 0.0, 1.0, "no factor mends it"),
    ):
        assert_factor(student, norm, max_norm, expected, why)
    for _ in range(40):
        norm, max_norm = (10.0 ** chance.uniform(-12, 12, 2)).tolist()
        assert_factor(student, norm, max_norm, min(1.0, max_norm / norm), "")
    for norm in (0.0, 1.0, INF, NAN):
        for max_norm in (-1.0, -INF, NAN, -1e-30):
            try:
                got = student.clip_factor(norm, max_norm)
            except ValueError:
                continue
            raise AssertionError(f"max_norm {max_norm}: expected a ValueError, got {got}")


def assert_factor(student, norm, max_norm, expected, why):
    got = student.clip_factor(norm, max_norm)
    assert type(got) is float, f"the factor is a float of Python, not {type(got).__name__}"
    assert math.isclose(got, expected, rel_tol=1e-12), (
        f"norm {norm}, max_norm {max_norm}: expected {expected}, got {got}: {why}"
    )


def test_clipping_in_place_or_not(student, chance):
    for number in range(30):
        job = random_job(student, chance, float(chance.choice([1.0, 1e-2, 50.0])), some=True)
        norm = math.sqrt(job.squares())
        share = float(chance.choice([0.0, 0.3, 0.9, 1.5, INF]))
        max_norm = share if share in (0.0, INF) else norm * share
        assert_clipped(job, max_norm, norm, factor=min(1.0, share), in_place=number % 2 == 0)
    for bad in (INF, NAN):
        for in_place in (True, False):
            job = random_job(student, chance)
            job.replicated.append(floats(1.0, bad, dtype=DTYPES[int(chance.integers(4))]))
            assert_clipped(job, 1.0, bad, factor=1.0, in_place=in_place)
    for max_norm in (-1.0, NAN):
        try:
            got = student.clip([floats(1.0)], [], max_norm, waits_forever, 1, True)
        except ValueError:
            continue
        raise AssertionError(f"max_norm {max_norm}: expected a ValueError, got {got!r:.200}")


def waits_forever(value):
    raise AssertionError("a rank waits for the others before it sees that max_norm is no norm")


def assert_clipped(job, max_norm, norm, factor, in_place):
    case = f"{job}; max_norm {max_norm}, {'' if in_place else 'not '}in place"

    def clip(sharded, replicated, *rest):
        return clipped(job.student.clip, sharded, replicated, max_norm, *rest, in_place)

    for shards, (result, *given) in zip(job.ranks, job.run(clip), strict=True):
        (told, *parts, shared), before = result, [*shards, *job.replicated]
        assert type(told) is float, f"{case}: the norm is a {type(told).__name__}"
        assert math.isclose(told, norm, rel_tol=TOLERANCE) or repr(told) == repr(norm), (
            f"{case}: expected the norm before, {norm}, got {told}"
        )
        lengths = [list(map(len, part)) for part in (parts, given)]
        assert lengths[0] == lengths[1], f"{case}: {lengths[0]} gradients came back"
        got, handed = [*parts[0], *parts[1]], [*given[0], *given[1]]
        if in_place:
            same = all(one is two for one, two in zip(got, handed, strict=True))
            assert same, f"{case}: other tensors came back than were given"
            assert all(shared), f"{case}: what came back is in other memory than what was given"
        else:
            assert bits(handed) == bits(before), f"{case}: the given gradients were changed"
            assert not any(shared), f"{case}: what came back is in the memory of what was given"
        for one, old in zip(got, before, strict=True):
            assert_scaled(one, old, factor, case)


def assert_scaled(one, old, factor, case):
    """Within what the factor's and the product's rounding in float32 may change."""
    assert (one is None) == (old is None), f"{case}: {old} became {one}"
    if old is None:
        return
    assert (one.dtype, one.shape) == (old.dtype, old.shape), (
        f"{case}: a gradient of {old.dtype} {tuple(old.shape)} became {one.dtype} "
        f"{tuple(one.shape)}"
    )
    ends = [old.double() * factor * (1 + sign * 2 * TOLERANCE) for sign in (-1, 1)]
    if factor == 1:
        ends = [old, old]
    low, high = torch.minimum(*ends).to(old.dtype), torch.maximum(*ends).to(old.dtype)
    inside = ((low <= one) & (one <= high)) | (one.isnan() & old.isnan())
    assert inside.all(), (
        f"{case}: expected the gradients times {factor}, {(old.double() * factor).tolist()!r:.200}"
        f", rounded once; got {one.tolist()!r:.200}"
    )
