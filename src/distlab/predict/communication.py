"""How long the collectives take, in the alpha-beta-gamma model.

A message of n bytes takes alpha + n·beta seconds: alpha is the latency of one message, beta the
seconds per byte of one link (1 / bandwidth, one direction); gamma is the seconds per byte of
adding two buffers (0: it is hidden or negligible). K workers; n is the size in bytes of the whole
buffer: what a worker holds before an all-reduce, what it holds after an all-gather.

Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
MPICH", IJHPCA 19(1), 2005, sections 3 and 4; the ring's optimality: Patarasuk and Yuan, JPDC 69,
2009. Logarithms are rounded up, as for a K that is no power of two.
"""

import math

IP_TCP_HEADERS = 20 + 20 + 12  # bytes of a segment: IPv4, TCP, and TCP's timestamp option
ETHERNET_HEADER = 14


def point_to_point(n: float, alpha: float, beta: float) -> float:
    """alpha + n·beta seconds."""
    return alpha + n * beta


def tcp_goodput(bits_per_second: float, mtu: int = 1500) -> float:
    """Payload bytes per second of TCP on an Ethernet link of so many bits per second.

    Of a full packet's mtu + 14 bytes, mtu - 52 are payload: 1448 of 1514. It is what a shaper such
    as tc's tbf counts (the packet with its Ethernet header); on a physical wire there are 24 bytes
    more for preamble, checksum and gap. Source: RFC 791, RFC 9293, RFC 7323 section 3.2.
    """
    return bits_per_second / 8 * (mtu - IP_TCP_HEADERS) / (mtu + ETHERNET_HEADER)


def tcp_link(bits_per_second: float, delay: float = 0.0, mtu: int = 1500) -> tuple[float, float]:
    """(alpha, beta) of a link with so many bits per second, and a delay of so many seconds one way.

    alpha leaves out what the hosts add (some tens of microseconds, more where processes share
    cores), so short messages take longer.
    """
    return delay, 1 / tcp_goodput(bits_per_second, mtu)


def tree_broadcast(n: float, workers: int, alpha: float, beta: float) -> float:
    """Binomial tree, for short messages: ceil(lg K)·(alpha + n·beta) seconds."""
    return _log2(workers) * (alpha + n * beta)


def scatter_allgather_broadcast(n: float, workers: int, alpha: float, beta: float) -> float:
    """van de Geijn's, for long ones: (lg K + K - 1)·alpha + 2·(K - 1)/K·n·beta seconds."""
    share = (workers - 1) / workers
    return (_log2(workers) + workers - 1) * alpha + 2 * share * n * beta


def chain_broadcast(n: float, workers: int, alpha: float, beta: float) -> float:
    """Passed on from worker to worker in small pieces: (K - 1)·alpha + n·beta seconds.

    What is left of (pieces + K - 2)·(alpha + n / pieces·beta) for many pieces; a reduction along
    the chain in the other direction takes as long. NCCL's ring does so.
    """
    return (workers - 1) * alpha + (n * beta if workers > 1 else 0.0)


def ring_all_gather(n: float, workers: int, alpha: float, beta: float) -> float:
    """(K - 1)·alpha + (K - 1)/K·n·beta seconds; n is the gathered size."""
    return (workers - 1) * alpha + (workers - 1) / workers * n * beta


def recursive_doubling_all_gather(n: float, workers: int, alpha: float, beta: float) -> float:
    """lg K·alpha + (K - 1)/K·n·beta seconds; n is the gathered size."""
    return _log2(workers) * alpha + (workers - 1) / workers * n * beta


def ring_reduce_scatter(
    n: float, workers: int, alpha: float, beta: float, gamma: float = 0.0
) -> float:
    """(K - 1)·alpha + (K - 1)/K·n·(beta + gamma) seconds; n is the size before it is scattered."""
    return (workers - 1) * alpha + (workers - 1) / workers * n * (beta + gamma)


def recursive_halving_reduce_scatter(
    n: float, workers: int, alpha: float, beta: float, gamma: float = 0.0
) -> float:
    """lg K·alpha + (K - 1)/K·n·(beta + gamma) seconds."""
    return _log2(workers) * alpha + (workers - 1) / workers * n * (beta + gamma)


def tree_reduce(n: float, workers: int, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """Binomial tree: lg K·(alpha + n·(beta + gamma)) seconds."""
    return _log2(workers) * (alpha + n * (beta + gamma))


def ring_all_reduce(n: float, workers: int, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """Reduce-scatter, then all-gather: 2·(K - 1)·alpha + (K - 1)/K·n·(2·beta + gamma) seconds."""
    scatter = ring_reduce_scatter(n, workers, alpha, beta, gamma)
    return scatter + ring_all_gather(n, workers, alpha, beta)


def tree_all_reduce(n: float, workers: int, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """Reduce to a root, then broadcast: 2·lg K·(alpha + n·beta) + lg K·n·gamma seconds."""
    reduce = tree_reduce(n, workers, alpha, beta, gamma)
    return reduce + tree_broadcast(n, workers, alpha, beta)


def recursive_doubling_all_reduce(
    n: float, workers: int, alpha: float, beta: float, gamma: float = 0.0
) -> float:
    """Everybody exchanges everything lg K times: lg K·(alpha + n·(beta + gamma)) seconds."""
    return _log2(workers) * (alpha + n * (beta + gamma))


def rabenseifner_all_reduce(
    n: float, workers: int, alpha: float, beta: float, gamma: float = 0.0
) -> float:
    """Recursive halving, then doubling: 2·lg K·alpha + (K - 1)/K·n·(2·beta + gamma) seconds."""
    scatter = recursive_halving_reduce_scatter(n, workers, alpha, beta, gamma)
    return scatter + recursive_doubling_all_gather(n, workers, alpha, beta)


def pairwise_all_to_all(n: float, workers: int, alpha: float, beta: float) -> float:
    """(K - 1)·alpha + (K - 1)/K·n·beta seconds; n is all that one worker holds."""
    return (workers - 1) * alpha + (workers - 1) / workers * n * beta


def hierarchical_all_gather(
    n: float, nodes: int, local: int, inner: tuple[float, float], outer: tuple[float, float]
) -> float:
    """Between `nodes` first, each of `local` workers gathering its n/local; then inside the nodes.

    `inner` and `outer` are (alpha, beta) of a worker's link inside its node and of its share of the
    node's link to the others. A reduce-scatter is the same in the other order, and takes as long.
    Seconds: ring_all_gather(n/local, nodes, outer) + ring_all_gather(n, local, inner).
    """
    between = ring_all_gather(n / local, nodes, *outer)
    return between + ring_all_gather(n, local, *inner)


def hierarchical_all_reduce(
    n: float, nodes: int, local: int, inner: tuple[float, float], outer: tuple[float, float]
) -> float:
    """Reduce-scatter inside the nodes, all-reduce of n/local between them, all-gather inside.

    Each link between nodes carries 2·(nodes - 1)/nodes·n/local bytes per worker; a flat ring's
    carries 2·(K - 1)/K·n in all, but takes 2·(K - 1) latencies of the slower link.
    Source: Cho et al., "BlueConnect", MLSys 2019, section 3.
    `inner` and `outer`: see `hierarchical_all_gather`.
    """
    return 2 * hierarchical_all_gather(n, nodes, local, inner, outer)


def data_parallel_bytes(gradient_bytes: float, workers: int, zero: int = 0) -> float:
    """Bytes that each GPU sends per step: 2·(K - 1)/K of the gradients' bytes; ZeRO-3 3·(K - 1)/K.

    A ring all-reduce of the gradients, or their reduce-scatter and the weights' all-gather; stage
    3 gathers the weights twice, before the forward and before the backward pass. With gradient
    accumulation stage 3 does so for every micro-batch. Weights and gradients of one size.
    Source: Rajbhandari et al. (arXiv 1910.02054), section 7.
    """
    return (3 if zero == 3 else 2) * (workers - 1) / workers * gradient_bytes


BUS_FACTORS = {
    "all_reduce": lambda workers: 2 * (workers - 1) / workers,
    "all_gather": lambda workers: (workers - 1) / workers,
    "reduce_scatter": lambda workers: (workers - 1) / workers,
    "all_to_all": lambda workers: (workers - 1) / workers,
    "broadcast": lambda workers: 1.0,
    "reduce": lambda workers: 1.0,
    "sendrecv": lambda workers: 1.0,
}


def bus_bandwidth(collective: str, n: float, seconds: float, workers: int) -> float:
    """Bytes per second on the busiest link: n / seconds times the collective's factor.

    Comparable between worker counts and with the link's peak, as n / seconds is not.
    Source: nccl-tests, doc/PERFORMANCE.md, "Bus bandwidth".
    """
    return n / seconds * BUS_FACTORS[collective](workers)


def _log2(workers: int) -> int:
    return math.ceil(math.log2(workers))
