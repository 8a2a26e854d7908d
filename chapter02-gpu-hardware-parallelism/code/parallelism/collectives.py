"""What collectives are made of and what they cost: counted messages, the ring, exact formulas.

n elements over K ranks are cut into chunks of n // K, the first n % K of them with one more. Steps
are those in which a rank sends or receives; the busiest rank's are the collective's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distlab import predict
from distlab.runtime import Runtime

PIPELINED = "all-reduce (pipelined ring)"
SLICE_BYTES = 2**20  # of the pipelined ring
Count = Callable[[int, int, int], int]  # of n elements, on rank r, of K ranks

Message = tuple[Tensor, int]  # what, and the rank at the other end


class Wire:
    """Messages from one rank to one rank, and a count of this rank's steps and bytes sent.

    Receives are posted before sends. gloo announces a posted receive to the sender, who sends
    nothing before. Between two ranks the announcement takes the same connection as the data of our
    own send: behind them, it would make the link's two directions work in turns, not at once.
    """

    def __init__(self, job: Runtime, receive_first: bool = True) -> None:
        self.rank, self.world_size = job.rank, job.world_size
        self.left, self.right = (job.rank - 1) % job.world_size, (job.rank + 1) % job.world_size
        self.staged = job.backend == "gloo" and job.device.type == "cuda"  # gloo sends host memory
        self.receive_first = receive_first
        self.steps = self.sent = 0

    def exchange(self, send: Message | None = None, receive: Message | None = None) -> None:
        """One step: send, receive, or both at once; returns when it is done."""
        self.start(send, receive)()

    def start(
        self, send: Message | None = None, receive: Message | None = None
    ) -> Callable[[], None]:
        """Begin a step; the function that is returned waits for its end.

        An empty message is not sent: both sides know that it is empty.
        """
        self.steps += 1
        operations, landing = [], None
        if receive is not None and receive[0].numel():
            landing = torch.empty_like(receive[0], device="cpu") if self.staged else receive[0]
            operations.append(dist.P2POp(dist.irecv, landing, receive[1]))
        if send is not None and send[0].numel():
            self.sent += send[0].nbytes
            outgoing = send[0].cpu() if self.staged else send[0]
            operations.append(dist.P2POp(dist.isend, outgoing, send[1]))
        if not self.receive_first:
            operations.reverse()
        requests = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for request in requests:
                request.wait()
            if self.staged and receive is not None and landing is not None:
                receive[0].copy_(landing)

        return wait


def ring_all_reduce(wire: Wire, tensor: Tensor) -> Tensor:
    """Reduce-scatter, then all-gather, each once around the ring."""
    return pipelined_ring_all_reduce(wire, tensor, slice_bytes=max(1, tensor.nbytes))


def pipelined_ring_all_reduce(wire: Wire, tensor: Tensor, slice_bytes: int = SLICE_BYTES) -> Tensor:
    """A ring for every slice of `tensor`: while one adds, the others' messages are on their way."""
    slices = tensor.split(max(1, slice_bytes // tensor.element_size()))
    in_turns([ring(wire, piece.tensor_split(wire.world_size)) for piece in slices])
    return tensor


def ring(wire: Wire, chunks: tuple[Tensor, ...]) -> Iterator[None]:
    yield from reduce_scatter_steps(wire, chunks)
    yield from all_gather_steps(wire, chunks)


def reduce_scatter_steps(wire: Wire, chunks: tuple[Tensor, ...]) -> Iterator[None]:
    """Each chunk goes once around and takes up every rank's part; the sum of chunk r ends at r.

    Yields while a message is on its way.
    """
    for step in range(wire.world_size - 1):
        leaving = chunks[(wire.rank - step - 1) % wire.world_size]
        growing = chunks[(wire.rank - step - 2) % wire.world_size]
        arriving = torch.empty_like(growing)
        wait = wire.start(send=(leaving, wire.right), receive=(arriving, wire.left))
        yield
        wait()
        growing += arriving


def all_gather_steps(wire: Wire, chunks: tuple[Tensor, ...]) -> Iterator[None]:
    """Chunk r starts at rank r and goes once around; yields while a message is on its way."""
    for step in range(wire.world_size - 1):
        leaving = chunks[(wire.rank - step) % wire.world_size]
        missing = chunks[(wire.rank - step - 1) % wire.world_size]
        wait = wire.start(send=(leaving, wire.right), receive=(missing, wire.left))
        yield
        wait()


def in_turns(rings: list[Iterator[None]]) -> None:
    """Take every ring one step further, again and again, until all have ended."""
    while rings:
        rings = [ring for ring in rings if next(ring, "ended") is None]


def reduce_scatter(wire: Wire, tensor: Tensor) -> Tensor:
    """This rank's chunk of the sum; `tensor` is used up."""
    chunks = tensor.tensor_split(wire.world_size)
    in_turns([reduce_scatter_steps(wire, chunks)])
    return chunks[wire.rank]


def all_gather(wire: Wire, tensor: Tensor) -> Tensor:
    """Chunk r of `tensor` is rank r's; the others are filled in."""
    in_turns([all_gather_steps(wire, tensor.tensor_split(wire.world_size))])
    return tensor


@dataclass(frozen=True)
class Formula:
    """`steps` and `elements` (those that a rank sends), exact; `seconds` in the alpha-beta model.

    A message of n bytes takes alpha + n·beta seconds; `seconds(n, K, alpha, beta)`.
    """

    steps: Count
    elements: Count
    seconds: Callable[[float, int, float, float], float]


def chunk(n: int, index: int, workers: int) -> int:
    """The size of chunk `index`, counted round the ring: n // K, or one more."""
    return n // workers + (index % workers < n % workers)


def binomial_children(rank: int, workers: int) -> int:
    """To how many ranks `rank` sends in the tree with root 0.

    Its distances are the powers of two below its lowest set bit (the root: any) that lead to a
    rank below K.
    """
    reach = (workers - rank - 1).bit_length()
    return reach if rank == 0 else min(reach, (rank & -rank).bit_length() - 1)


def core_steps(workers: int) -> int:
    """floor(lg K): recursive doubling's steps among the largest power of two of the ranks."""
    return workers.bit_length() - 1


def doubling_roles(rank: int, workers: int) -> tuple[bool, bool]:
    """Whether `rank` stands above the largest power of two, and whether it serves one that does."""
    core = 1 << core_steps(workers)
    return rank >= core, rank + core < workers


def tree_steps(n: int, rank: int, workers: int) -> int:
    return binomial_children(rank, workers) + (rank > 0)


def doubling_steps(n: int, rank: int, workers: int) -> int:
    outside, serves = doubling_roles(rank, workers)
    return 2 if outside else core_steps(workers) + 2 * serves


def doubling_elements(n: int, rank: int, workers: int) -> int:
    outside, serves = doubling_roles(rank, workers)
    return n if outside else (core_steps(workers) + serves) * n


def ring_elements(n: int, rank: int, workers: int) -> int:
    """Every chunk but its own in the reduce-scatter, every one but its right neighbour's after."""
    return 2 * n - chunk(n, rank, workers) - chunk(n, rank + 1, workers)


def around(n: int, rank: int, workers: int) -> int:
    return workers - 1


FORMULAS = {
    "broadcast (tree)": Formula(
        steps=tree_steps,
        elements=lambda n, r, workers: n * binomial_children(r, workers),
        seconds=predict.tree_broadcast,
    ),
    "reduce-scatter (ring)": Formula(
        steps=around,
        elements=lambda n, r, workers: n - chunk(n, r, workers),
        seconds=predict.ring_reduce_scatter,
    ),
    "all-gather (ring)": Formula(
        steps=around,
        elements=lambda n, r, workers: n - chunk(n, r + 1, workers),
        seconds=predict.ring_all_gather,
    ),
    "all-to-all (pairwise)": Formula(
        steps=around,
        elements=lambda n, r, workers: n - chunk(n, r, workers),
        seconds=predict.pairwise_all_to_all,
    ),
    "all-reduce (ring)": Formula(
        steps=lambda n, r, workers: 2 * around(n, r, workers),
        elements=ring_elements,
        seconds=predict.ring_all_reduce,
    ),
    "all-reduce (tree)": Formula(
        steps=lambda n, r, workers: 2 * tree_steps(n, r, workers),
        elements=lambda n, r, workers: n * (binomial_children(r, workers) + (r > 0)),
        seconds=predict.tree_all_reduce,
    ),
    "all-reduce (recursive doubling)": Formula(
        steps=doubling_steps,
        elements=doubling_elements,
        seconds=predict.recursive_doubling_all_reduce,
    ),
}


def pipelined(slice_elements: int) -> Formula:
    """The ring's formula for a tensor in slices: the steps of different slices overlap."""
    ring = FORMULAS["all-reduce (ring)"]

    def total(count: Count) -> Count:
        def over_slices(n: int, rank: int, workers: int) -> int:
            whole, rest = divmod(n, slice_elements)
            last = count(rest, rank, workers) if rest or not whole else 0
            return whole * count(slice_elements, rank, workers) + last

        return over_slices

    return Formula(total(ring.steps), total(ring.elements), ring.seconds)
