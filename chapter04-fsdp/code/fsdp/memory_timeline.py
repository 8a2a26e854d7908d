"""Which kind of bytes a step holds, operator by operator: measured, and predicted at its peak.

Exact is what is counted: every storage that an operator makes and the moment when it is freed
(`distlab.measure.LiveBytes`), the storages that the model, its gradients and the optimizer held
before the step, and the gather buffers, which FSDP frees and fills without an operator. A storage's
kind is told by who uses it: what an all-gather fills is a gathered unit, what a reduction reads or
fills is a gradient, and everything else that lives is an activation. Not seen is what a kernel or
the network library allocates for itself.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distlab.measure import LiveBytes, tensors_in
from distlab.predict.activations import Recompute, layer_activations, loss_peak, saved_activations
from distlab.predict.architecture import Architecture
from distlab.training.memory import bytes_of

KINDS = ("weights", "optimizer", "gradients", "gathered", "activations")
USERS = {  # part of an operator's name: what kind it makes of all that it reads and writes
    "allgather": "gathered",
    "all_gather": "gathered",
    "chunk_cat": "gradients",
    "reduce_scatter": "gradients",
    "alltoall": "gradients",
}

OF_LIBRARIES = 300_000  # bytes a layer: Python's objects, small blocks, rests of pages (measured)


class MemoryTimeline(LiveBytes):
    """Records one step in a `with` block: bytes by kind after each operator.

    `buffers` are storages, by kind, that were there before, and may be freed and filled without an
    operator: `gather_buffers`, `gradient_buffers`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        buffers: Mapping[str, Iterable[torch.UntypedStorage]],
    ) -> None:
        super().__init__()
        held = bytes_of(model, optimizer)
        self.before = {kind: held[kind]() for kind in ("weights", "optimizer")}
        self.buffers = {kind: list(storages) for kind, storages in buffers.items()}
        self.now = 0  # operators so far
        self.births: dict[int, tuple[int, int]] = {}  # of a storage's number: when, bytes
        self.deaths: dict[int, int] = {}
        self.users: dict[int, str] = {}
        self.resized: dict[str, list[int]] = {kind: [] for kind in buffers}  # after each operator
        self.marks: dict[str, int] = {}
        self._numbers: dict[int, int] = {}  # of the storages that live, by their address

    def mark(self, phase: str) -> None:
        """The phase ends here."""
        self.marks[phase] = self.now

    def phase(self, operator: int) -> str:
        """In which phase the operator ran."""
        return next(name for name, end in self.marks.items() if operator < end)

    def by_kind(self) -> dict[str, np.ndarray]:
        """For each kind its bytes after each operator, [operators]."""
        changes = {kind: np.zeros(self.now + 1, dtype=np.int64) for kind in KINDS}
        for number, (born, size) in self.births.items():
            kind = changes[self.users.get(number, "activations")]
            kind[born] += size
            kind[min(self.deaths.get(number, self.now), self.now)] -= size
        held = {kind: np.cumsum(change)[: self.now] for kind, change in changes.items()}
        for buffered, sizes in self.resized.items():
            held[buffered] = held[buffered] + np.array(sizes, dtype=np.int64)
        return {kind: held[kind] + self.before.get(kind, 0) for kind in KINDS}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        name = str(func)
        user = next((kind for part, kind in USERS.items() if part in name), None)
        if user is not None:
            for tensor in tensors_in((args, kwargs, outputs)):
                number = self._numbers.get(tensor.untyped_storage()._cdata)
                if number is not None:
                    self.users[number] = user
        for kind, storages in self.buffers.items():
            self.resized[kind].append(sum(storage.nbytes() for storage in storages))
        self.now += 1
        return outputs

    def _watch(self, tensor: Tensor) -> None:
        super()._watch(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in self._numbers:
            number = self._numbers[storage._cdata] = len(self.births)
            self.births[number] = self.now, storage.nbytes()

    def _forget(self, key: int, size: int) -> None:
        super()._forget(key, size)
        if key in self._numbers:
            self.deaths[self._numbers.pop(key)] = self.now


def gather_buffers(model: nn.Module, step: Callable[[], object]) -> list[torch.UntypedStorage]:
    """The storages of the whole parameters of `fully_shard`'s units, seen in a `step` of the model.

    FSDP keeps them, empty, between uses.
    """
    found: dict[int, torch.UntypedStorage] = {}
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())

    def look(module: nn.Module, args: object) -> None:
        for parameter in module.parameters(recurse=False):
            if sharded and not isinstance(parameter, DTensor):
                storage = parameter.untyped_storage()
                found[storage._cdata] = storage

    hooks = [module.register_forward_pre_hook(look) for module in model.modules()]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def gradient_buffers(model: nn.Module) -> list[torch.UntypedStorage]:
    """The storages behind the gradients that are there: DDP's buckets, which it keeps."""
    found = [p.grad.untyped_storage() for p in model.parameters() if p.grad is not None]
    return list({storage._cdata: storage for storage in found}.values())


@dataclass(frozen=True)
class Sharding:
    """How a model of equal layers is divided over K = `ranks`.

    `units` are blocks, the root alone (one unit is the whole model), or none: replicas, as in DDP.
    `kept` is the part of a unit that stays between forward and backward: 0, 1, or 1/n where it is
    resharded to n ranks. `on_disk` is `fsdp.disk`'s way, which keeps no state in memory.
    """

    ranks: int
    units: str = "blocks"
    kept: float = 0.0
    checkpointing: bool = False
    on_disk: bool = False  # weights, gradients' shards and moments


@dataclass(frozen=True)
class Moment:
    """A moment of a step, why much is held then, and the bytes by kind."""

    name: str
    cause: str
    bytes: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Plan:
    """The bytes of a float32 step with AdamW, in the moments where its peak can be.

    `root` and `layer` are bytes of parameters: of what is in no layer, and of each layer. Gathering
    a unit takes it twice: the all-gather's buffer, and the parameters that are copied out of it.
    In forward FSDP keeps the last buffer until the next unit waits; in backward the next one's is
    under way. A layer's whole gradient is copied into the reduction's buffer, and the buffer of the
    layer before is kept until then (torch.distributed.fsdp, `_fsdp_param_group.py`, 2.13).
    """

    architecture: Architecture
    sharding: Sharding
    root: int
    layer: int
    batch: int
    seq_len: int

    @property
    def layers(self) -> int:
        return self.architecture.num_hidden_layers

    @property
    def whole(self) -> int:
        return self.root + self.layers * self.layer

    def peak(self) -> Moment:
        return max(self.moments(), key=lambda moment: moment.total)

    def needed(self) -> float:
        """Bytes of memory that a process needs for the step: the peak, and what is no tensor's."""
        return self.peak().total + self.layers * OF_LIBRARIES

    def moments(self) -> list[Moment]:
        """In the order of a step."""
        layers = range(self.layers, 0, -1)
        backward = [one for layer in layers for one in (self._begin(layer), self._end(layer))]
        return [self._forward(), self._loss(), *backward, self._last(), self._optimizer()]

    def _moment(
        self, name: str, cause: str, activations: float, gathered: float, gradients: float
    ) -> Moment:
        part = 1 if self.sharding.units == "none" else self.sharding.ranks
        if part == 1:
            gathered, gradients = 0, self.whole  # DDP's buckets stay
        state = 0 if self.sharding.on_disk else self.whole / part
        kinds = (state, 2 * state, gradients, gathered, activations)
        return Moment(name, cause, dict(zip(KINDS, kinds, strict=True)))

    def _forward(self) -> Moment:
        gathered = self.root + self.layer + self.sharding.kept * self.layers * self.layer
        cause = "all activations, one more unit's buffer"
        if self.sharding.units == "root":
            gathered, cause = 2 * self.whole, "the whole model is gathered at once, buffer and all"
        elif self.sharding.kept == 1:
            cause = "all activations, and every unit is still whole"
        logits = 4 * self.architecture.vocab_size * self._tokens
        return self._moment("end of forward", cause, self._saved() + logits, gathered, 0)

    def _loss(self) -> Moment:
        loss = self._tokens * loss_peak(self.architecture, "fp32").total
        activations = self._tables() + self.layers * self._kept() + loss
        cause = "all activations" + ", whole state" * (self.sharding.units == "none")
        gathered = self._whole_units(self.layers) - (self.sharding.kept < 1) * self.layer
        return self._moment("backward of the loss", cause, activations, gathered, 0)

    def _begin(self, layer: int) -> Moment:
        a, done = self.architecture, self.layers - layer
        inner = 4 * (2 * a.intermediate_size + a.hidden_size) * self._tokens
        activations = self._tables() + layer * self._kept() + inner + self._table()
        cause = "activations, two units gathered, the last reduction's buffer"
        if self.sharding.checkpointing:
            activations += self._block()
            cause = "a layer computed again, two units gathered, the last reduction's buffer"
        gradients = self._shards(done) + self.layer * (done > 0)
        if self.sharding.units == "root":
            gradients = done * self.layer
        return self._moment(
            f"backward of layer {layer}", cause, activations, self._whole_units(layer), gradients
        )

    def _end(self, layer: int) -> Moment:
        done = self.layers - layer
        activations = self._tables() + (layer - 1) * self._kept() + self._entry() + self._table()
        gradients = self._shards(done) + self.layer * (1 + (done > 0))
        if self.sharding.units == "root":
            gradients = (done + 1) * self.layer
        cause = "a whole gradient and the last reduction's buffer"
        return self._moment(
            f"end of layer {layer}", cause, activations, self._whole_units(layer), gradients
        )

    def _last(self) -> Moment:
        gradients = self._shards(self.layers) + self.layer + self.root
        cause = "the embedding's gradients"
        if self.sharding.units == "root":
            gradients, cause = 2 * self.whole, "all whole gradients, and the buffer to reduce them"
        return self._moment("end of backward", cause, 2 * self._table(), self.root, gradients)

    def _optimizer(self) -> Moment:
        root = 0 if self.sharding.on_disk else self.root / self.sharding.ranks
        return self._moment("optimizer", "the state alone", 0, 0, self._shards(self.layers) + root)

    def _shards(self, layers: int) -> float:
        """Of the gradients of so many layers."""
        return 0 if self.sharding.on_disk else layers * self.layer / self.sharding.ranks

    def _whole_units(self, layer: int) -> float:
        """Gathered while `layer` is in backward."""
        if self.sharding.units == "root":
            return self.whole
        if self.sharding.kept == 1:
            return self.root + layer * self.layer
        coming = layer > 1
        parts = self.sharding.kept * (layer - 1 - coming) * self.layer
        return self.root + (1 + coming) * self.layer + max(0.0, parts)

    def _saved(self) -> float:
        again: Recompute = "full" if self.sharding.checkpointing else "none"
        return saved_activations(self.architecture, "fp32", self.seq_len, self.batch, again)

    def _kept(self) -> float:
        return self._entry() if self.sharding.checkpointing else self._block()

    def _block(self) -> float:
        return self._tokens * layer_activations(self.architecture, 0, "fp32").total

    def _entry(self) -> float:
        return 4 * self._tokens * self.architecture.hidden_size

    def _table(self) -> float:
        return 4 * self.architecture.vocab_size * self.architecture.hidden_size

    def _tables(self) -> float:
        return 2 * 4 * self.seq_len * self.architecture.head_dim

    @property
    def _tokens(self) -> int:
        return self.batch * self.seq_len
