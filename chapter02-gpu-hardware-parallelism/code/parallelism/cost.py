"""The predicted time of one training step of a plan: computing, waiting, and each kind of sending.

Assumed to happen while something is computed, where the cluster's `hidden` names the kind:

    DP   reduced behind the backward pass of the last micro-batch, ZeRO's weights gathered behind
         the first forward pass; with ZeRO-2 and FSDP behind those of every micro-batch. One
         layer's part has nothing to hide behind.
    CP   each step of the ring behind the attention of the block that is already there
    PP   sends are asynchronous; see `pipeline_seconds` for what shows all the same
    TP, EP   never: the next operation needs what they bring
"""

import math
from dataclasses import dataclass
from functools import cache

from distlab import predict
from distlab.predict import Architecture, TrainingPlan, stage_layers
from distlab.predict.params import attention_weights, mlp_weights

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


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest stage's GPUs: where they go. Sending is what shows."""

    compute: float
    bubble: float
    tp: float
    cp: float
    ep: float
    pp: float
    dp: float

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.communication

    @property
    def communication(self) -> float:
        return self.tp + self.cp + self.ep + self.pp + self.dp


@dataclass(frozen=True)
class StageTime:
    """Seconds that one micro-batch takes on a stage, forward and backward; `once`: per step."""

    compute: float
    tp: float
    cp: float
    ep: float
    dp: float
    once: float

    @property
    def each(self) -> float:
        return self.compute + self.tp + self.cp + self.ep + self.dp


def step_time(a: Architecture, plan: TrainingPlan, cluster: Cluster) -> StepTime:
    """m micro-batches on the slowest stage, the bubble, and what shows of sending.

    The first micro-batch passes one chunk of each other stage before the last stage has work, and
    the last one comes back: the sum of the others' times / v.
    """
    kinds = stage_kinds(a, plan.pp)
    stages = [stage_time(a, plan, stage, cluster) for stage, _ in kinds]
    slowest = max(stages, key=lambda stage: stage.each)
    whole = sum(count * time.each for (_, count), time in zip(kinds, stages, strict=True))
    m = plan.accumulation
    return StepTime(
        compute=m * slowest.compute,
        bubble=(whole - slowest.each) / plan.chunks,
        tp=m * slowest.tp,
        cp=m * slowest.cp,
        ep=m * slowest.ep,
        pp=pipeline_seconds(a, plan, cluster, slowest.each),
        dp=m * slowest.dp + max(stage.once for stage in stages),
    )


def stage_time(a: Architecture, plan: TrainingPlan, stage: int, cluster: Cluster) -> StageTime:
    """Products take flops / rate + bytes / bandwidth, the sum: no kernel hides either wholly.

    So small micro-batches are slow: forward and backward read the weights, and the backward pass
    also reads and writes all gradients, however few tokens there are.
    """
    forward, backward, attention = (
        flops / (plan.tp * cluster.flops) for flops in stage_flops(a, plan, stage)
    )
    weights, gradients = (n / cluster.memory_bandwidth for n in stage_bytes(a, plan, stage))
    forward += weights
    backward += weights * (2 if plan.checkpointing else 1) + 2 * gradients
    each, once = data_seconds(a, plan, stage, cluster, forward, backward)
    return StageTime(
        compute=forward + backward,
        tp=tensor_seconds(a, plan, stage, cluster),
        cp=context_seconds(a, plan, stage, cluster, attention),
        ep=expert_seconds(a, plan, stage, cluster),
        dp=each,
        once=once,
    )


def stage_flops(a: Architecture, plan: TrainingPlan, stage: int) -> tuple[float, float, float]:
    """FLOPs of one micro-batch on a context-parallel rank's stage: forward, backward, and those
    of the forward pass's attention. Backward is twice forward; with checkpointing thrice, but for
    the output matrix."""
    tokens = tokens_of(plan)
    products, head, scores = flops_per_token(a, plan.pp, stage, plan.seq_len)
    layers = tokens * (products + scores)
    repeated = layers if plan.checkpointing else 0.0
    forward = layers + tokens * head
    return forward, 2 * forward + repeated, tokens * scores


def stage_bytes(a: Architecture, plan: TrainingPlan, stage: int) -> tuple[float, float]:
    """Bytes of the weights, as the products read them, and of the gradients, on one GPU."""
    precision = predict.PRECISIONS[plan.precision]
    dense, experts = parameters_of(a, plan, stage)
    return (dense + experts) * precision.compute, (dense + experts) * precision.gradient


def parameters_of(a: Architecture, plan: TrainingPlan, stage: int) -> tuple[float, float]:
    """A rank's parameters outside its routed experts, and in them, gathered."""
    experts = predict.expert_parameters(a, plan.tp, plan.pp, stage)
    return predict.rank_parameters(a, plan.tp, plan.pp, stage) - experts, experts / plan.ep


@cache
def flops_per_token(a: Architecture, pp: int, stage: int, seq_len: int) -> tuple[float, ...]:
    """A token's forward FLOPs in a stage: its layers' products, the output matrix, attention.

    As `predict.forward_flops_per_token` counts them: attention over the whole sequence.
    """
    layers = predict.stage_layers(a.num_hidden_layers, pp, stage)
    products = sum(attention_weights(a).total + mlp_weights(a, n, True).total for n in layers)
    head = 2 * a.vocab_size * a.hidden_size if stage == pp - 1 else 0
    scores = len(layers) * 2 * (a.query_size + a.value_size) * seq_len
    return 2 * products, head, scores


def tensor_seconds(a: Architecture, plan: TrainingPlan, stage: int, cluster: Cluster) -> float:
    """Two all-reduces of the hidden vectors per layer and pass, one for embedding and for output.

    With sequence parallelism each is a reduce-scatter and an all-gather, of the same bytes
    (Korthikanti et al., arXiv 2205.05198, section 4.2.2). Recomputation repeats the forward pass.
    """
    passes = 3 if plan.checkpointing else 2
    layers = len(predict.stage_layers(a.num_hidden_layers, plan.pp, stage))
    times = 2 * passes * layers + (stage == 0) + (stage == plan.pp - 1)
    return times * cluster.group(plan.tp, 1).all_reduce(hidden_bytes(a, plan))


def context_seconds(
    a: Architecture, plan: TrainingPlan, stage: int, cluster: Cluster, attention: float
) -> float:
    """Ring attention: keys and values go once round the ring in the forward pass; in the backward
    pass they go again, with their gradients (Liu et al., arXiv 2310.01889, section 3)."""
    width = a.query_size + a.value_size if a.latent else 2 * a.key_value_size
    block = hidden_bytes(a, plan) * width / a.hidden_size / plan.tp
    layers = len(predict.stage_layers(a.num_hidden_layers, plan.pp, stage))
    ring = layers * (plan.cp - 1) * cluster.group(plan.cp, plan.tp).ring_step(block)
    hidden = attention * (plan.cp - 1) / plan.cp if "CP" in cluster.hidden else 0.0
    return (4 if plan.checkpointing else 3) * max(0.0, ring - hidden)


def expert_seconds(a: Architecture, plan: TrainingPlan, stage: int, cluster: Cluster) -> float:
    """Each token goes to its k experts and comes back, in each pass; the router is balanced."""
    if a.experts is None or plan.ep == 1:
        return 0.0
    layers = predict.stage_layers(a.num_hidden_layers, plan.pp, stage)
    sparse = sum(a.is_sparse(layer) for layer in layers)
    nbytes = a.experts.experts_per_token * hidden_bytes(a, plan) / plan.tp
    times = 2 * (3 if plan.checkpointing else 2) * sparse
    return times * cluster.group(plan.ep, plan.tp * plan.cp).all_to_all(nbytes)


def data_seconds(
    a: Architecture, plan: TrainingPlan, stage: int, cluster: Cluster,
    forward: float, backward: float,
) -> tuple[float, float]:  # fmt: skip
    """What shows of gathering weights and reducing gradients: per micro-batch, and once a step.

    Volumes: `predict.data_parallel_bytes`.
    """
    precision = predict.PRECISIONS[plan.precision]
    layers = len(predict.stage_layers(a.num_hidden_layers, plan.pp, stage))
    gather = exchange_seconds(a, plan, stage, cluster, precision.compute)
    reduce = exchange_seconds(a, plan, stage, cluster, precision.gradient)

    def shows(seconds: float, window: float) -> float:
        return max(seconds - window, seconds / layers) if "DP" in cluster.hidden else seconds

    if plan.zero == 3:
        return shows(gather, forward) + shows(gather + reduce, backward), 0.0
    if plan.zero == 2:
        return shows(reduce, backward), shows(gather, forward)
    if plan.zero == 1:
        return 0.0, shows(reduce, backward) + shows(gather, forward)
    return 0.0, shows(2 * reduce, backward)


def exchange_seconds(
    a: Architecture, plan: TrainingPlan, stage: int, cluster: Cluster, element: int
) -> float:
    """An all-gather, or a reduce-scatter, of a rank's parameters at `element` bytes each.

    Experts: among the ranks that have the same; context-parallel ones count as far apart too.
    """
    dense, experts = parameters_of(a, plan, stage)
    seconds = cluster.group(plan.shards, plan.tp).all_gather(dense * element)
    if experts:
        same = cluster.group(plan.shards // plan.ep, plan.tp * plan.cp * plan.ep)
        seconds += same.all_gather(experts * element)
    return seconds


def pipeline_seconds(
    a: Architecture, plan: TrainingPlan, cluster: Cluster, micro_batch_seconds: float
) -> float:
    """The hidden vectors go to the next stage, their gradients come back.

    1F1B has no more than p micro-batches on their way, each a round trip, so that sends show
    however asynchronous they are: m·(p - 1)/p + p - 2 times there and back on one link (a test
    simulates it). The interleaved schedule has more on their way: filling, draining, and what a
    link cannot carry in a micro-batch's time shows.
    """
    if plan.pp == 1:
        return 0.0
    share = plan.tp if plan.sequence_parallel else 1  # else every tensor-parallel rank has all
    links = cluster.pipeline_links(plan.pp, hidden_bytes(a, plan) / share)
    if "PP" not in cluster.hidden:
        return 2 * (plan.chunks * plan.accumulation + plan.pp - 1) * max(links)
    if plan.chunks == 1:
        round_trips = plan.accumulation * (plan.pp - 1) / plan.pp + plan.pp - 2
        return 2 * sum(links) / len(links) * max(round_trips, len(links))
    slower = max(0.0, plan.chunks * max(links) - micro_batch_seconds)
    return 2 * sum(links) + plan.accumulation * slower


def tokens_of(plan: TrainingPlan) -> float:
    """Tokens of one micro-batch on one context-parallel rank."""
    return plan.micro_batch * plan.seq_len / plan.cp


def hidden_bytes(a: Architecture, plan: TrainingPlan) -> float:
    return tokens_of(plan) * a.hidden_size * predict.PRECISIONS[plan.precision].compute


@cache
def stage_kinds(a: Architecture, pp: int) -> tuple[tuple[int, int], ...]:
    """The first stage of each kind, and how many of its kind there are.

    Stages differ by their layers, with experts and without, the first and the last by the
    embedding and the output. Of a kind the first holds most micro-batches, so most memory.
    """
    kinds: dict[tuple[int, int, bool, bool], list[int]] = {}
    for stage in range(pp):
        layers = stage_layers(a.num_hidden_layers, pp, stage)
        sparse = sum(a.is_sparse(layer) for layer in layers)
        kinds.setdefault((len(layers), sparse, stage == 0, stage == pp - 1), []).append(stage)
    return tuple((stages[0], len(stages)) for stages in kinds.values())
