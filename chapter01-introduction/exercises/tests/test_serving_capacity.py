"""Task 5: capacity by hand and by exact fractions; a queue by its rule, and against theory."""

from fractions import Fraction

import numpy as np

GIB = 2**30
RANDOM_CASES = 40
SIGMAS = 6  # of each statistic: one honest grading in ten million fails


def test_kv_cache_of_named_models(student, chance):
    sizes = {  # layers, key/value heads, head_dim, bytes per element, tokens: bytes
        "llama-3-8b, one token": ((32, 8, 128, 2, 1), 131_072),
        "llama-3-8b, 8192 tokens": ((32, 8, 128, 2, 8192), 2**30),
        "llama-2-7b, one token": ((32, 32, 128, 2, 1), 524_288),
        "qwen3-0.6b in 8 bits, 1000 tokens": ((28, 8, 128, 1, 1000), 57_344_000),
        "no token yet": ((28, 8, 128, 1, 0), 0),
        "more than a float counts exactly": (
            (127, 7, 127, 1, 10**13 + 1),
            2_258_060_000_000_225_806,
        ),
    }
    for _ in range(RANDOM_CASES):
        layers, heads, dim, size, tokens = drawn = (
            int(chance.integers(1, 130)),
            int(chance.integers(1, 129)),
            int(chance.integers(1, 300)),
            int(chance.choice([1, 2, 4])),
            int(chance.integers(1, 200_000)),
        )
        per_layer = heads * tokens * (dim * size + dim * size)  # keys, and as many values
        sizes["(layers, kv heads, head_dim, bytes, tokens) = " + str(drawn)] = (
            drawn,
            layers * per_layer,
        )
    for name, (arguments, expected) in sizes.items():
        got = student.kv_cache_bytes(*arguments)
        assert got == expected, f"{name}: expected {expected:,} B, got {got:,} B"


def test_requests_that_fit(student, chance):
    cases = [  # GPU, usable, weights, request: requests
        ((80 * GIB, 0.9, 16 * GIB, 1 * GIB), 56),
        ((80 * GIB, 0.5, 16 * GIB, 7 * GIB), 3),
        ((24 * GIB, 0.75, 16 * GIB, 2 * GIB), 1),
        ((24 * GIB, 0.75, 16 * GIB, 3 * GIB), 0),
        ((24 * GIB, 0.9, 140 * GIB, 1 * GIB), 0),
    ]
    for _ in range(RANDOM_CASES):
        gpu, share = int(chance.integers(8, 200)) * GIB, float(chance.integers(1, 65)) / 64
        usable = int(gpu * share)  # exact: 64 divides the GPU's bytes
        requests, request = int(chance.integers(0, 50)), int(chance.integers(10**6, 10**9))
        spare = int(chance.choice([0, 1, request // 2, request - 1]))  # the last one fits just so
        weights = usable - requests * request - spare
        cases.append(((gpu, share, max(weights, 0), request), None))
        cases.append(((gpu, share, usable + int(chance.integers(0, 10**9)), request), 0))
        share = float(chance.uniform(0.1, 1))  # any share: half a request is far from the border
        weights = int(gpu * share) - requests * request - request // 2
        cases.append(((gpu, share, max(weights, 0), request), None))
    for arguments, expected in cases:
        gpu, share, weights, request = arguments
        if expected is None:
            expected = int((Fraction(gpu) * Fraction(share) - weights) // request)
        got = student.requests_that_fit(*arguments)
        assert got == expected and isinstance(got, int | np.integer), (
            f"{gpu:,} B, of which {share:.0%} usable ({share}), {weights:,} B of weights, "
            f"{request:,} B per request: expected {expected} requests, got {got!r}"
        )


def test_queue_by_hand(student, chance):
    cases = [  # arrivals, service, servers: latencies
        ([0, 1, 2, 10], [3, 3, 3, 1], 1, [3, 5, 7, 1]),
        ([0, 1, 2, 10], [3, 3, 3, 1], 2, [3, 3, 4, 1]),
        ([0, 0, 0, 0], [4, 1, 1, 1], 2, [4, 1, 2, 3]),
        ([5, 6], [2, 2], 3, [2, 2]),
        ([], [], 2, []),
    ]
    for _ in range(RANDOM_CASES):
        count = int(chance.integers(1, 13))
        arrivals = np.sort(chance.integers(0, 12, count)).tolist()
        service, servers = chance.integers(0, 7, count).tolist(), int(chance.integers(1, 5))
        expected = queue_by_its_rule(arrivals, service, servers)
        cases.append((arrivals, service, servers, expected))
        late = [2.0**20 + arrival / 1024 for arrival in arrivals]  # float32 cannot hold these
        parts = ([one / 1024 for one in those] for those in (service, expected))
        cases.append((late, next(parts), servers, next(parts)))
    for arrivals, service, servers, expected in cases:
        whole = all(isinstance(arrival, int) for arrival in arrivals)  # exact in each of the dtypes
        dtype = chance.choice([np.float64, np.float32, np.int64] if whole else [np.float64])
        times = np.array(arrivals, dtype=dtype), np.array(service, dtype=dtype)
        got = np.asarray(student.latencies(*times, servers))
        case = f"arrivals {arrivals} s, service {service} s ({times[0].dtype}), {servers} servers"
        assert got.shape == (len(expected),), (
            f"{case}: expected latencies of shape {(len(expected),)}, got {got.shape}"
        )
        assert got.dtype == np.float64, f"{case}: expected float64, got {got.dtype}"
        assert np.abs(got - expected).max(initial=0.0) < 1e-9, (
            f"{case}: expected the latencies {expected}, got {got.tolist()}"
        )
        unchanged = times[0].tolist() == arrivals and times[1].tolist() == service
        assert unchanged, f"{case}: latencies changes the arrays that it is given"


def test_queue_follows_theory(student, chance):
    check_poisson(student, 7.0, 3)
    check_poisson(student, float(chance.uniform(0.05, 50)), int(chance.integers(10**6)))
    check_many_seeds(student, float(chance.uniform(0.05, 50)))
    check_mean_latency(student, chance)


def queue_by_its_rule(arrivals, service, servers):
    """Each request begins once it is there, no earlier one waits, and fewer than `servers` run."""
    begins, ends, found = [0], [], []
    for arrival, seconds in zip(arrivals, service, strict=True):
        candidates = sorted({max(arrival, begins[-1]), *ends})
        begins.append(
            next(
                now
                for now in candidates
                if now >= max(arrival, begins[-1]) and sum(end > now for end in ends) < servers
            )
        )
        ends.append(begins[-1] + seconds)
        found.append(ends[-1] - arrival)
    return found


def check_poisson(student, rate, seed):
    """The gaps' distribution (Kolmogorov and Smirnov's distance), and their independence."""
    count = 20_000
    arrivals = np.asarray(student.poisson_arrivals(rate, count, seed=seed))
    case = f"{rate:g} requests/s, seed {seed}, {count:,} arrivals"
    assert arrivals.shape == (count,), f"{case}: expected shape {(count,)}, got {arrivals.shape}"
    assert arrivals.dtype == np.float64, f"{case}: expected float64, got {arrivals.dtype}"
    gaps = np.diff(arrivals, prepend=0.0)
    assert gaps.min() >= 0, f"{case}: the arrival times do not increase"
    assert abs(gaps.mean() * rate - 1) < SIGMAS / count**0.5, (
        f"{case}: the mean gap should be {1 / rate:.4g} s, got {gaps.mean():.4g} s"
    )
    ratio = gaps.std() / gaps.mean()
    assert abs(ratio - 1) < SIGMAS * (2 / count) ** 0.5, (
        f"{case}: the gaps of a Poisson process vary as much as their mean; the ratio here is "
        f"{ratio:.2f}"
    )
    below = np.arange(count) / count
    distance = np.abs(-np.expm1(-rate * np.sort(gaps)) - below).max()
    assert distance < 3 / count**0.5, (
        f"{case}: the gaps are not exponential; their distribution is off by {distance:.3f}"
    )
    following = np.corrcoef(gaps[1:], gaps[:-1])[0, 1]
    assert abs(following) < SIGMAS / count**0.5, (
        f"{case}: the gaps are not independent; one and the next correlate by {following:.3f}"
    )
    again = np.asarray(student.poisson_arrivals(rate, count, seed=seed))
    assert np.array_equal(arrivals, again), f"{case}: the same seed gives other arrivals"


def check_many_seeds(student, rate):
    """Over seeds, the first arrival varies as a gap does, and the last one as the sum of all."""
    count, seeds = 20, 400
    runs = np.array([student.poisson_arrivals(rate, count, seed=seed) for seed in range(seeds)])
    first = float(runs[:, 0].mean() * rate)
    assert abs(first - 1) < SIGMAS / seeds**0.5, (
        f"{rate:g} requests/s: the first request comes after a gap too, on average "
        f"{1 / rate:.4g} s; over {seeds} seeds, got {first / rate:.4g} s"
    )
    spread = float(runs[:, -1].std() * rate / count**0.5)
    assert abs(spread - 1) < SIGMAS * (0.55 / seeds) ** 0.5, (
        f"{rate:g} requests/s: the time of arrival {count} varies over seeds by "
        f"{count**0.5 / rate:.4g} s; over {seeds} seeds, got {spread * count**0.5 / rate:.4g} s"
    )
    short = np.asarray(student.poisson_arrivals(rate, 0, seed=0))
    assert short.shape == (0,), f"no requests: expected shape (0,), got {short.shape}"


def check_mean_latency(student, chance):
    """An M/M/1 queue's mean latency is 1 / (service rate - arrival rate) (Kleinrock 1975, ch. 3).

    Over seeds, the mean of 40,000 latencies at a load of 0.5 has a standard deviation of 1.2 %.
    """
    rate, seed, count = float(chance.uniform(0.5, 5)), int(chance.integers(10**6)), 40_000
    arrivals = np.asarray(student.poisson_arrivals(rate, count, seed=seed), dtype=float)
    service = chance.exponential(1 / (2 * rate), count)
    mean = float(np.mean(np.asarray(student.latencies(arrivals, service, 1), dtype=float)))
    assert abs(mean * rate - 1) < SIGMAS * 0.012, (
        f"{rate:g} requests/s, seed {seed}: an M/M/1 queue at a load of 0.5 has a mean latency of "
        f"{1 / rate:.3f} s; the simulated one has {mean:.3f} s"
    )
