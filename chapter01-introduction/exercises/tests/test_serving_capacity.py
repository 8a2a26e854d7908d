"""Task 5: capacity by hand, and a queue against hand-made cases and against theory."""

import numpy as np

GIB = 2**30


def test_kv_cache_of_named_models(student):
    sizes = {  # layers, key/value heads, head_dim, bytes per element, tokens: bytes
        "llama-3-8b, one token": ((32, 8, 128, 2, 1), 131_072),
        "llama-3-8b, 8192 tokens": ((32, 8, 128, 2, 8192), 2**30),
        "llama-2-7b, one token": ((32, 32, 128, 2, 1), 524_288),
        "qwen3-0.6b in 8 bits, 1000 tokens": ((28, 8, 128, 1, 1000), 57_344_000),
    }
    for name, (arguments, expected) in sizes.items():
        got = student.kv_cache_bytes(*arguments)
        assert got == expected, f"{name}: expected {expected:,} B, got {got:,} B"


def test_requests_that_fit(student):
    cases = [  # GPU, usable, weights, request: requests
        ((80 * GIB, 0.9, 16 * GIB, 1 * GIB), 56),
        ((80 * GIB, 0.5, 16 * GIB, 7 * GIB), 3),
        ((24 * GIB, 0.75, 16 * GIB, 2 * GIB), 1),
        ((24 * GIB, 0.75, 16 * GIB, 3 * GIB), 0),
        ((24 * GIB, 0.9, 140 * GIB, 1 * GIB), 0),
    ]
    for arguments, expected in cases:
        got = student.requests_that_fit(*arguments)
        gpu, share, weights, request = arguments
        assert got == expected and int(got) == got, (
            f"{gpu // GIB} GiB, {share:.0%} usable, {weights // GIB} GiB of weights, "
            f"{request // GIB} GiB per request: expected {expected} requests, got {got}"
        )


def test_queue_by_hand(student):
    cases = [  # arrivals, service, servers: latencies
        ([0, 1, 2, 10], [3, 3, 3, 1], 1, [3, 5, 7, 1]),
        ([0, 1, 2, 10], [3, 3, 3, 1], 2, [3, 3, 4, 1]),
        ([0, 0, 0, 0], [4, 1, 1, 1], 2, [4, 1, 2, 3]),
        ([5, 6], [2, 2], 3, [2, 2]),
    ]
    for arrivals, service, servers, expected in cases:
        times = np.array(arrivals, dtype=float), np.array(service, dtype=float)
        got = np.asarray(student.latencies(*times, servers), dtype=float)
        assert got.shape == (len(expected),), (
            f"{len(expected)} requests: expected latencies of shape {(len(expected),)}, "
            f"got {got.shape}"
        )
        assert np.abs(got - expected).max() < 1e-9, (
            f"arrivals {arrivals} s, service {service} s, {servers} servers: expected the "
            f"latencies {expected}, got {got.tolist()}"
        )


def test_queue_follows_theory(student):
    """An M/M/1 queue's mean latency is 1 / (service rate - arrival rate) (Kleinrock 1975, ch. 3).

    The tolerances are above four standard deviations of 40,000 requests at a load of 0.7.
    """
    rate, service_rate, count = 7.0, 10.0, 40_000
    arrivals = np.asarray(student.poisson_arrivals(rate, count, seed=3), dtype=float)
    assert arrivals.shape == (count,), f"expected shape {(count,)}, got {arrivals.shape}"
    gaps = np.diff(arrivals, prepend=0.0)
    assert gaps.min() >= 0, "the arrival times do not increase"
    assert abs(gaps.mean() * rate - 1) < 0.03, (
        f"at {rate:g} requests/s the mean gap is 0.143 s, got {gaps.mean():.3f} s"
    )
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05, (
        "the gaps of a Poisson process vary as much as their mean; the ratio here is "
        f"{gaps.std() / gaps.mean():.2f}"
    )
    again = np.asarray(student.poisson_arrivals(rate, count, seed=3))
    assert np.array_equal(arrivals, again), "the same seed gives other arrivals"
    service = np.random.default_rng(0).exponential(1 / service_rate, count)
    mean = float(np.mean(np.asarray(student.latencies(arrivals, service, 1), dtype=float)))
    expected = 1 / (service_rate - rate)
    assert abs(mean / expected - 1) < 0.15, (
        f"an M/M/1 queue at a load of {rate / service_rate:g} has a mean latency of "
        f"{expected:.3f} s; the simulated one has {mean:.3f} s"
    )
