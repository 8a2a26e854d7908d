"""How long a collective of a group of ranks takes on a cluster of nodes, by where its ranks are."""

import math
from dataclasses import dataclass

from distlab import predict

Link = tuple[float, float]  # alpha: seconds per message; beta: seconds per byte, one direction


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. `inner` is a GPU's link inside its node, `outer` one network port's.

    All of a node's GPUs talk at once and share its `ports`, so a GPU's part is ports/GPUs of one.
    `flops` are the FLOP/s that a GPU reaches, `memory_bandwidth` its bytes per second, `memory` the
    bytes that a plan may use.
    `hidden` are the kinds of communication that go on while something is computed. Without
    `hierarchical` every collective is one flat ring, as gloo's are.
    """

    gpus: int
    gpus_per_node: int
    ports: int
    flops: float
    memory_bandwidth: float
    memory: float
    inner: Link
    outer: Link
    hidden: frozenset[str] = frozenset({"DP", "CP", "PP"})
    hierarchical: bool = True

    @property
    def outer_share(self) -> Link:
        """A GPU's share of its node's network ports."""
        alpha, beta = self.outer
        return alpha, beta * self.gpus_per_node / self.ports

    def group(self, size: int, stride: int) -> "Group":
        """`size` ranks, each `stride` after the one before."""
        together = math.gcd(self.gpus_per_node, size * stride)
        return Group(self, size, together // stride if together % stride == 0 else 1)

    def pipeline_links(self, stages: int, nbytes: float) -> list[float]:
        """Seconds of a message from each pipeline stage to the next, all GPUs of it sending.

        Stages stand side by side in a node where several have room in it.
        """
        stride = self.gpus // stages
        in_a_node = max(1, self.gpus_per_node // stride)
        senders = min(stride, self.gpus_per_node)
        alpha, beta = self.outer
        far = predict.point_to_point(nbytes, alpha, beta * max(1, senders / self.ports))
        near = predict.point_to_point(nbytes, *self.inner)
        return [far if stage % in_a_node == 0 else near for stage in range(1, stages)]


@dataclass(frozen=True)
class Group:
    """`size` ranks of which `local` are in each node."""

    cluster: Cluster
    size: int
    local: int

    @property
    def spans_nodes(self) -> bool:
        return self.local < self.size

    def all_gather(self, nbytes: float) -> float:
        """Seconds until all have all of `nbytes`: the faster of one ring and two levels of rings.

        One ring enters and leaves a node once, so its part of the network is that of the node's
        `local` ranks together.
        """
        flat = predict.ring_all_gather(nbytes, self.size, *self._ring_link())
        if not (self.spans_nodes and self.cluster.hierarchical):
            return flat
        inner, share = self.cluster.inner, self.cluster.outer_share
        nodes = self.size // self.local
        return min(flat, predict.hierarchical_all_gather(nbytes, nodes, self.local, inner, share))

    def reduce_scatter(self, nbytes: float) -> float:
        """As long as an all-gather, which it is in reverse; adding is hidden behind sending."""
        return self.all_gather(nbytes)

    def all_reduce(self, nbytes: float) -> float:
        return self.reduce_scatter(nbytes) + self.all_gather(nbytes)

    def all_to_all(self, nbytes: float) -> float:
        """Each rank sends 1/size of its `nbytes` to each: near and far ones at the same time."""
        (alpha, beta), (far_alpha, far_beta) = self.cluster.inner, self.cluster.outer_share
        near = (self.local - 1) * (alpha + nbytes / self.size * beta)
        far = (self.size - self.local) * (far_alpha + nbytes / self.size * far_beta)
        return max(near, far)

    def ring_step(self, nbytes: float) -> float:
        """Every rank sends `nbytes` to the next."""
        return 0.0 if self.size == 1 else predict.point_to_point(nbytes, *self._ring_link())

    def _ring_link(self) -> Link:
        """The slowest link of a ring through all nodes: a step waits for it."""
        (alpha, beta), (far_alpha, far_beta) = self.cluster.inner, self.cluster.outer_share
        if not self.spans_nodes:
            return alpha, beta
        return max(alpha, far_alpha), max(beta, far_beta / self.local)
