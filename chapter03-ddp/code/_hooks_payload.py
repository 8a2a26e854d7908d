"""What each communication hook makes a rank send in a step, in bytes, from shapes alone.

K ranks; the shapes are those of the parameters. Packet headers come on top.
"""

import math
from collections.abc import Callable, Sequence

from distlab import predict

Shape = tuple[int, ...]
Payload = Callable[[Sequence[Shape], int], float]
FLOAT = 4
HEADERS = 14 + 20 + 32  # bytes of a packet: Ethernet, IPv4, TCP with its timestamp
PACKET = 1500 - 20 - 32  # bytes of data in a full packet
MESSAGES = 10_000  # bytes of gloo's own messages in a step, which do not grow with the gradient


def all_reduced(bytes_per_element: int) -> Payload:
    """A ring all-reduce of all elements: 2·(K - 1)/K·b·n."""
    return lambda shapes, workers: predict.data_parallel_bytes(
        bytes_per_element * elements(shapes), workers
    )


def exchanged_in_int8(chunk: int) -> Payload:
    """2·(K - 1)/K·n·(1 + 4/chunk), where n is rounded up to whole chunks for every rank."""

    def payload(shapes: Sequence[Shape], workers: int) -> float:
        padded = math.ceil(elements(shapes) / (workers * chunk)) * workers * chunk
        return predict.data_parallel_bytes(padded + FLOAT * padded / chunk, workers)

    return payload


def low_rank(rank: int, least_rate: float = 2.0) -> Payload:
    """PowerSGD: an all-reduce of P and one of Q, r·(n + m) elements of a gradient of n x m.

    A tensor whose P and Q together are not `least_rate` times smaller is all-reduced itself, and
    a vector always. Source: Vogels et al. (arXiv 1905.13727), algorithm 1.
    """

    def sent(shape: Shape) -> int:
        n = shape[0]
        m = math.prod(shape) // n
        thin = min(n, m, rank) * (n + m)
        return thin if thin * least_rate < n * m else n * m

    return lambda shapes, workers: predict.data_parallel_bytes(
        FLOAT * sum(map(sent, shapes)), workers
    )


def elements(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def most_on_the_wire(payload: float) -> float:
    """The most bytes that a step's payload becomes at the interface, with nothing sent again.

    Every packet has headers, and every second one that comes in is acknowledged; as many come in as
    go out. The kernel counts the headers of what it hands over as one large packet once, so there
    may be fewer.
    """
    packets = payload / PACKET
    return payload + 1.5 * packets * HEADERS + MESSAGES
