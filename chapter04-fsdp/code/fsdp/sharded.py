"""Fully sharded data parallelism from scratch: parameters are gathered when used, then dropped.

A *unit* is a part of the model, such as a layer, whose parameters lie in one flat buffer of which
each rank keeps a K-th: its *shard*. Before the unit computes, an all-gather makes its parameters
whole; afterwards they are freed. In backward they are gathered again, and the unit's gradient, once
complete, is reduce-scattered: each rank gets the mean of its own shard's part. The optimizer sees
shards only. So weights, gradients and optimizer state take a K-th of the memory, and in the rest
only a unit or two are whole at a time, while the next one is already on its way.

    model = FullySharded(model, units=model.model.layers)
    optimizer = torch.optim.AdamW(model.parameters())  # of the shards: after sharding, not before
    model(inputs, targets=targets).backward()
    optimizer.step()

`fsdp_from_scratch.py` proves that it trains as torch's `fully_shard` does, and measures it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves, tree_map

from fsdp.collectives import Reduction, all_gather, broadcast_from_first, subgroup_of
from fsdp.slots import Slot, slots_by_unit


class FullySharded(nn.Module):
    """`module` with the parameters of its `units`, and of what they leave (the *root*), sharded.

    Every rank of `shard_group` keeps a K-th of each unit. With a `replica_group`, whose ranks hold
    the same shards (hybrid sharding), gradients are averaged over both. `reshard_after_forward`
    frees a unit's parameters between forward and backward, or keeps them (False), or keeps the part
    that ranks in groups of so many (a divisor of K) can put together among themselves. The root
    stays whole from forward to the end of backward: it is used first and last.

    `dtype` is the type in which parameters are gathered and a unit computes; shards, their gradient
    and the sum over ranks are float32. Rank 0's parameters are everybody's. All ranks must use the
    same units in the same order. A unit that a step does not use has no gradient; a parameter
    unused in a unit that is used has a gradient of zeros, since one buffer holds them all. One that
    several units have in common belongs to the root.

    Sources: Rajbhandari et al. 2020, "ZeRO", section 5; Zhao et al. 2023, "FSDP", section 3.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Iterable[nn.Module],
        shard_group: dist.ProcessGroup | None = None,
        replica_group: dist.ProcessGroup | None = None,
        reshard_after_forward: bool | int = True,
        dtype: torch.dtype | None = None,
        prefetch: bool = True,
    ) -> None:
        super().__init__()
        self.group, self.replicas, self.prefetch = shard_group, replica_group, prefetch
        self.regrouped: dist.ProcessGroup | None = None  # where a smaller group keeps units whole
        self.dtype = dtype
        self.in_backward, self.synchronizes = False, True  # the latter is False within no_sync
        self.order: list[Unit] = []  # of the units in the last forward
        self.walk: list[Unit] = []  # in this one, so far
        self.trail: list[Unit] = []  # units that await their backward
        self.reduction: tuple[Flat, Reduction] | None = None  # on its way, one at a time
        self.averaging: list[tuple[Flat, Reduction]] = []  # over replicas
        broadcast_from_first([*module.parameters(), *module.buffers()])
        self.root, self.units = self._make_units(module, list(units), reshard_after_forward)
        self.flats = [flat for unit in (self.root, *self.units) for flat in unit.flats]
        self.shards = nn.ParameterList(flat.shard for flat in self.flats)
        self.module = module

    def _make_units(
        self, module: nn.Module, wrapped: list[nn.Module], reshard: bool | int
    ) -> "tuple[Unit, list[Unit]]":
        if reshard and reshard is not True:
            self.regrouped = subgroup_of(reshard, self.group)
        root, *inner = slots_by_unit(module, wrapped)
        units = [Unit(slots, self, bool(reshard)) for slots in inner]
        for unit, its_module in zip(units, wrapped, strict=True):
            its_module.register_forward_pre_hook(self._before(unit), with_kwargs=True, prepend=True)
            its_module.register_forward_hook(self._after(unit))
        return Unit(root, self, False), units

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.in_backward and torch._C._current_graph_task_id() < 0:
            self._abandon_backward()
        self.root.gather()
        self.walk = []
        self._prefetch_in_forward()
        args, kwargs = self.root.ready(args, kwargs)
        output = self.module(*args, **kwargs)
        self.order = self.walk
        if torch.is_grad_enabled():
            self._on_first_gradient(output, self.root)
        else:
            self.root.free()
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep whole gradients on their rank, added up; the first backward after it reduces them.

        It saves the reduce-scatters, and costs the memory that sharded gradients had saved.
        """
        before, self.synchronizes = self.synchronizes, False
        try:
            yield
        finally:
            self.synchronizes = before

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale gradients to a global norm of at most `max_norm`; the norm before, on every rank.

        No rank can know it from its shards alone: their squares are summed over the ranks.
        """
        gradients = [shard.grad for shard in self.shards if shard.grad is not None]
        squares = [gradient.square().sum() for gradient in gradients]
        total = torch.stack(squares).sum() if squares else torch.zeros(())
        dist.all_reduce(total, group=self.group)
        norm = total.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(scale)
        return norm

    @torch.no_grad()
    def whole(self, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """What belongs to each shard, such as its gradient, as whole tensors by parameter's name.

        `of(shard)` None leaves its parameters out. Every rank calls it; for proofs and exports.
        """
        found: dict[str, Tensor] = {}
        for flat in self.flats:
            part = of(flat.shard)
            if part is None:
                continue
            full = part.new_empty(flat.padded)
            all_gather(full, part.contiguous(), self.group).wait()
            found.update(zip([p[0].path for p in flat.slots], flat.views(full), strict=True))
        return found

    def _before(self, unit: "Unit") -> Callable[..., Any]:
        def gather_and_cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
            unit.gather()
            if not self.in_backward:  # else a checkpoint computes the unit's forward again
                self.walk.append(unit)
                self._prefetch_in_forward()
            return unit.ready(args, kwargs)

        return gather_and_cast

    def _after(self, unit: "Unit") -> Callable[..., None]:
        def free(module: nn.Module, args: Any, output: Any) -> None:
            if self.in_backward:
                return
            trains = torch.is_grad_enabled()
            if trains:
                self.trail.append(unit)
                if not self._on_first_gradient(output, unit):
                    return  # backward may come to it unseen, by a side way: it stays whole
            if unit.reshards or not trains:
                unit.free(keep_part=trains)

        return free

    def _prefetch_in_forward(self) -> None:
        """Begin to gather the unit that came next the last time."""
        if self.prefetch and len(self.walk) < len(self.order):
            self.order[len(self.walk)].gather()

    def _on_first_gradient(self, output: Any, unit: "Unit") -> bool:
        """Prepare `unit` for backward when the first gradient of its `output` is there, if any."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        tensors = [tensor for tensor in tensors if tensor.requires_grad]

        def prepare(gradient: Tensor) -> None:
            self._begin_backward()
            unit.gather()
            unit.wait()
            unit.due += sum(flat.shard.requires_grad for flat in unit.flats)
            if unit in self.trail:
                del self.trail[len(self.trail) - 1 - self.trail[::-1].index(unit) :]
            if self.prefetch and self.trail:
                self.trail[-1].gather()

        if tensors:
            torch.autograd.graph.register_multi_grad_hook(tensors, prepare, mode="any")
        return bool(tensors)

    def _begin_backward(self) -> None:
        if not self.in_backward:
            self.in_backward = True
            Variable._execution_engine.queue_callback(self._end_backward)

    def take_gradient(self, flat: "Flat", gradient: Tensor) -> None:
        """`gradient` of the whole of `flat` is complete: add it up, or send it on its way."""
        self._begin_backward()
        flat.add(gradient)
        if self.synchronizes:
            self._reduce(flat)
        flat.unit.due -= 1
        if flat.unit.due <= 0 and flat.unit is not self.root:
            flat.unit.free()

    def _reduce(self, flat: "Flat") -> None:
        """Begin to reduce-scatter a gradient; one is on its way at a time, to bound the memory."""
        self._finish_reduction()
        assert flat.gradient is not None
        self.reduction = flat, Reduction(flat.gradient, self.group)
        flat.gradient = None

    def _finish_reduction(self) -> None:
        if self.reduction is None:
            return
        flat, reduction = self.reduction
        part, self.reduction = reduction.wait(), None
        if self.replicas is None:
            flat.give(part)
        else:
            self.averaging.append((flat, Reduction(part, self.replicas, scatter=False)))

    def _end_backward(self) -> None:
        """Reduce what is left, wait for all, and be ready for the next forward."""
        if self.synchronizes:
            for flat in self.flats:
                if flat.gradient is not None:  # from within no_sync, and not used since
                    self._reduce(flat)
            self._finish_reduction()
            for flat, reduction in self.averaging:
                flat.give(reduction.wait())
        self._rest()

    def _abandon_backward(self) -> None:
        """A backward pass raised and never ended: drop what it had not yet given to the shards."""
        for _, reduction in filter(None, [self.reduction, *self.averaging]):
            reduction.wait()
        self.reduction = None
        for flat in self.flats:
            flat.gradient = None
        self._rest()

    def _rest(self) -> None:
        self.averaging, self.trail, self.in_backward = [], [], False
        for unit in (self.root, *self.units):
            unit.due = 0
            unit.free()


class Unit:
    """Parameters that are gathered and freed together: the trained ones, and the frozen ones."""

    def __init__(self, slots: "list[list[Slot]]", owner: FullySharded, reshards: bool) -> None:
        self.owner, self.reshards, self.dtype = owner, reshards, owner.dtype
        self.due = 0  # gradients of its buffers that backward is about to complete
        kinds = defaultdict(list)
        for places in slots:
            parameter = places[0].parameter
            kinds[parameter.requires_grad, parameter.dtype].append(places)
        self.flats = [Flat(some, self) for some in kinds.values()]

    def gather(self) -> None:
        """Begin to gather, where it is neither whole nor on its way."""
        for flat in self.flats:
            flat.gather()

    def wait(self) -> None:
        for flat in self.flats:
            flat.wait()

    def ready(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Put the whole parameters into their modules, and give the inputs their type."""
        for flat in self.flats:
            flat.wait()
            flat.put_into_modules()
        if self.dtype is None:
            return args, kwargs
        return tree_map(self._cast, (args, kwargs))

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating else value

    def free(self, keep_part: bool = False) -> None:
        for flat in self.flats:
            flat.free(keep_part)


class Flat:
    """Parameters of one unit and kind, one after another in a buffer, and padding up to K parts.

    `shard` [ceil(n/K)] is this rank's part; `full` [K * ceil(n/K)] has memory only while needed.
    """

    def __init__(self, slots: "list[list[Slot]]", unit: Unit) -> None:
        self.slots, self.unit = slots, unit
        self.group, self.regrouped = unit.owner.group, unit.owner.regrouped
        parameters = [places[0].parameter for places in slots]
        self.shapes = [parameter.shape for parameter in parameters]
        self.sizes = [parameter.numel() for parameter in parameters]
        ranks = dist.get_world_size(self.group)
        size = -(-sum(self.sizes) // ranks)
        self.padded = ranks * size
        one = parameters[0]
        whole = torch.cat([p.detach().flatten() for p in parameters])
        own = whole[size * dist.get_rank(self.group) :][:size]
        self.shard = nn.Parameter(one.new_zeros(size), requires_grad=one.requires_grad)
        self.shard.data[: len(own)] = own
        dtype = unit.dtype if unit.dtype and one.is_floating_point() else one.dtype
        self.full = torch.empty(self.padded, dtype=dtype, device=one.device)
        self.bytes = self.full.nbytes
        self.full.untyped_storage().resize_(0)
        self.part: Tensor | None = None  # of the whole, kept by a smaller group since forward
        self.work: Any = None  # the all-gather under way
        self.version = 0  # of the shard that was gathered
        self.gradient: Tensor | None = None  # whole, not yet reduced
        for places in slots:
            for place in places:
                del place.module._parameters[place.name]

    @torch.no_grad()
    def gather(self) -> None:
        if self.version != self.shard._version:  # an optimizer's step since: what is whole is old
            self.free()
        storage = self.full.untyped_storage()
        if storage.nbytes() or not self.padded:
            return
        self.version = self.shard._version
        storage.resize_(self.bytes)
        if self.part is None:
            self.work = all_gather(self.full, self.shard.to(self.full.dtype), self.group)
        else:
            self.work = all_gather(self.full, self.part, self.regrouped)
            self.part = None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None

    def put_into_modules(self) -> None:
        for places, view in zip(self.slots, self.views(Whole.apply(self.shard, self)), strict=True):
            for place in places:
                place.module.__dict__[place.name] = view

    def views(self, full: Tensor) -> list[Tensor]:
        """The parameters, as views of a whole buffer."""
        *pieces, _ = full.split([*self.sizes, self.padded - sum(self.sizes)])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def free(self, keep_part: bool = False) -> None:
        """Give the whole parameters' memory back; with `keep_part`, all but what is agreed on."""
        self.wait()
        if keep_part and self.regrouped is not None and self.full.untyped_storage().nbytes():
            ranks = dist.get_world_size(self.regrouped)
            self.part = self.full.chunk(ranks)[dist.get_rank(self.regrouped)].clone()
        elif not keep_part:
            self.part = None
        self.full.untyped_storage().resize_(0)
        for places in self.slots:
            for place in places:
                place.module.__dict__.pop(place.name, None)  # better no weight than a freed one

    def add(self, gradient: Tensor) -> None:
        """Add to the whole gradient, in the shard's type."""
        gradient = gradient.to(self.shard.dtype)
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def give(self, part: Tensor) -> None:
        """The reduced gradient of the shard, added to what it has."""
        self.shard.grad = part if self.shard.grad is None else self.shard.grad + part


class Whole(torch.autograd.Function):
    """The whole parameters as a function of the shard. In backward their gradient is complete here.

    The output shares the memory of `flat.full`, which is freed and filled again between forward and
    backward: `.data` keeps autograd's own count of changes out of this.
    """

    @staticmethod
    def forward(ctx: Any, shard: Tensor, flat: Flat) -> Tensor:
        ctx.flat = flat
        return flat.full.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.flat.unit.owner.take_gradient(ctx.flat, gradient)
        return None, None
