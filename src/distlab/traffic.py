"""What a training step sends: counted at the network interface of this node."""

from collections.abc import Callable

from distlab.host import interface_payload
from distlab.runtime import Runtime

COUNTED_STEPS = 4


def bytes_sent(step: Callable[[], object], job: Runtime) -> float:
    """By this node's interfaces in a step, in the mean, without the packets' headers."""
    step()
    job.barrier()
    _, before = interface_payload()
    for _ in range(COUNTED_STEPS):
        step()
    job.barrier()
    _, after = interface_payload()
    return (after - before) / COUNTED_STEPS


def reduction_factor(backend: str) -> int:
    """Of what a reduce-scatter must send, how much it does: gloo's is a whole all-reduce."""
    return 2 if backend == "gloo" else 1
