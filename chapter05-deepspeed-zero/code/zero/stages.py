"""The Zero Redundancy Optimizer from scratch: what stages 1, 2 and 3 no longer keep K times.

Data parallel ranks hold the same weights, gradients and optimizer state. ZeRO gives each rank a
K-th of these to keep, its *partition*, and fetches the rest when it is needed:

    stage 1   optimizer state      after backward each rank gets the mean gradient of its partition,
                                   updates that, and the ranks gather the new weights
    stage 2   and gradients        a unit's gradient is reduced and freed as soon as it is complete
    stage 3   and weights          a unit's weights are gathered when it computes, and freed after

    zero = Zero(model, units=model.model.layers, stage=2)
    optimizer = torch.optim.AdamW(zero.partitions)
    model(inputs, targets=targets).backward()
    zero.step(optimizer)       # of this rank's partitions; and the others' new weights come

A parameter server whose shards lie on the workers does just this (chapter 3).
`zero_from_scratch.py` proves that it trains as DeepSpeed does, and counts what it keeps and sends.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(arXiv 1910.02054), section 5.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from distlab.errors import RunError, UsageError

ALL_GATHER = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)  # renamed in torch 2.13


class Zero:
    """Divides what `module` and its optimizer keep over the ranks, as ZeRO's `stage` 0 to 3 says.

    `units` are parts of the module, such as its layers, each laid into one buffer; what they leave
    is a unit too, the root, which in stage 3 stays whole from forward to the end of backward. With
    `dtype` the module computes in that type, and the partitions that the optimizer updates are
    float32 copies: mixed precision, as in the paper. Rank 0's weights are everybody's. In stages 2
    and 3 every backward's gradient is reduced and added to the partition's, so that every rank must
    run the same units in it; in 0 and 1 whole gradients add up until the step. Frozen parameters
    stay as they are. One without a gradient, in a unit where others have one, gets zeros, so that a
    decay shrinks it. Load weights before: partitions are made of those that are there.

    Raises `UsageError` for weights not in float32, and in stage 3 for one that two units have.
    """

    def __init__(
        self, module: nn.Module, units: Iterable[nn.Module], stage: int,
        dtype: torch.dtype | None = None, group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        self.stage, self.group = stage, group
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0, group=group)
        named = {p: name for name, p in module.named_parameters() if p.requires_grad}
        if other := {p.dtype for p in named} - {torch.float32}:
            raise UsageError(f"a model in {other.pop()} is not divided; give it in float32, and in "
                             "`dtype` what it computes in")  # fmt: skip
        left = dict(named)
        self.units: list[Unit] = []
        for part in (*units, module):  # the root comes last, and takes what is left
            own = [p for p in part.parameters() if p in left]
            if stage == 3 and part is not module:
                for p in part.parameters():
                    if p in named and p not in left:
                        raise UsageError(f"{named[p]} is in two units; stage 3 frees it after the "
                                         "first: leave it to the root")  # fmt: skip
            unit = Unit({left.pop(p): p for p in own}, self, dtype)
            if own:
                self.units.append(unit)
            if stage == 3 and own:
                self._gather_when_used(part, unit, is_root=part is module)
        self.partitions = [unit.partition for unit in self.units]

    def _gather_when_used(self, part: nn.Module, unit: "Unit", is_root: bool) -> None:
        part.register_forward_pre_hook(lambda *_: unit.gather())
        if not is_root:
            part.register_forward_hook(lambda *_: unit.free())
            part.register_full_backward_pre_hook(lambda *_: unit.gather())

    def reduce(self) -> None:
        """Complete the gradients of this rank's parts; a unit that no backward reached has none.

        The ranks first agree which units those are: where one has nothing, it gives zeros. Raises
        `RunError` where in stage 2 or 3 one rank's backward has reduced a unit and another's has
        not: then the gradients of two units were added up.
        """
        own = [[unit.is_pending, unit.reductions, -unit.reductions] for unit in self.units]
        device = self.partitions[0].device
        most = torch.tensor(own, dtype=torch.int32, device=device)  # [units, 3]
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        for unit, (pending, highest, lowest) in zip(self.units, most.tolist(), strict=True):
            if highest + lowest:
                raise RunError(
                    f"the unit of {next(iter(unit.named))} was reduced {highest} times on one "
                    f"rank and {-lowest} on another; in stages 2 and 3 let every rank run the same"
                )
            if pending:
                unit.reduce()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update this rank's partitions, and give the weights that follow to everyone."""
        self.reduce()
        for unit in self.units:
            unit.partition.grad = None if unit.gradient is None else unit.gradient.float()
            unit.gradient, unit.reductions = None, 0
        optimizer.step()
        optimizer.zero_grad()
        for unit in self.units:
            unit.update()

    @torch.no_grad()
    def whole(self, of: "Callable[[Unit], Tensor | None]") -> dict[str, Tensor]:
        """What belongs to each unit's part, such as its gradient, as whole tensors by name.

        `of(unit)` None leaves its parameters out. Every rank calls it.
        """
        found: dict[str, Tensor] = {}
        for unit in self.units:
            part = of(unit)
            if part is not None:
                found.update(unit.views(unit.put_together(part.detach())))
        return found


class Unit:
    """Parameters in one buffer of K equal parts, the last padded; part r is rank r's."""

    def __init__(
        self, named: dict[str, nn.Parameter], zero: Zero, dtype: torch.dtype | None
    ) -> None:
        self.named, self.stage, self.group = named, zero.stage, zero.group
        self.ranks, self.rank = dist.get_world_size(zero.group), dist.get_rank(zero.group)
        self.shapes = {name: p.shape for name, p in named.items()}
        self.sizes = [p.numel() for p in named.values()]
        self.waiting = len(named)  # parameters whose gradient this backward has not completed
        self.reductions = 0  # since the last step
        self.gradient: Tensor | None = None  # of this rank's part: the mean over the ranks
        if not named:
            return
        self.part = -(-sum(self.sizes) // self.ranks)
        wide = torch.zeros(self.part * self.ranks, device=next(iter(named.values())).device)
        for name, view in self.views(wide).items():
            view.copy_(named[name].detach())
        # Stage 0 keeps everything: one "partition", which is the whole buffer.
        own = (
            slice(None)
            if self.stage == 0
            else slice(self.rank * self.part, (self.rank + 1) * self.part)
        )
        self.own = own
        narrow = dtype is not None and dtype != wide.dtype
        self.flat = wide.to(dtype) if narrow else wide  # what the module computes with
        in_place = self.stage < 3 and not narrow  # then the partition is a part of it
        self.partition = nn.Parameter(wide[own] if in_place else wide[own].clone())
        self.shard = (
            self.flat[own].clone() if self.stage == 3 and narrow else self.partition.detach()
        )
        for name, view in self.views(self.flat).items():
            named[name].data = view
        for parameter in named.values():
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        if self.stage == 3:
            self.free()

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters in a buffer, by name."""
        pieces = flat[: sum(self.sizes)].split(self.sizes)
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def put_together(self, part: Tensor) -> Tensor:
        if self.stage == 0:
            return part
        whole = part.new_empty(self.part * self.ranks)
        ALL_GATHER(whole, part, group=self.group)
        return whole

    # Stage 3: weights are there while the unit computes.

    def gather(self) -> None:
        storage = self.flat.untyped_storage()
        if storage.size() == 0:
            storage.resize_(self.flat.numel() * self.flat.element_size())
            ALL_GATHER(self.flat, self.shard, group=self.group)

    def free(self) -> None:
        """Autograd keeps views of the buffer: its memory goes, and comes back under them."""
        self.flat.untyped_storage().resize_(0)

    # Stages 2 and 3: a gradient is reduced as soon as it is complete.

    def _on_gradient(self, parameter: Tensor) -> None:
        if self.waiting == len(self.named):
            Variable._execution_engine.queue_callback(self._backward_ends)
        self.waiting -= 1
        if self.waiting == 0 and self.stage >= 2:
            self.reduce()

    def _backward_ends(self) -> None:
        """What is not complete, since a parameter was not used, waits for `Zero.reduce`."""
        self.waiting = len(self.named)

    @property
    def is_pending(self) -> bool:
        return any(p.grad is not None for p in self.named.values())

    @torch.no_grad()
    def reduce(self) -> None:
        """Add this rank's part of the gradient, the mean over the ranks, to what is there."""
        self.waiting = len(self.named)
        self.reductions += 1
        gradients = [p.grad for p in self.named.values()]
        whole = torch.zeros_like(self.flat)
        for view, gradient in zip(self.views(whole).values(), gradients, strict=True):
            if gradient is not None:
                view.copy_(gradient)
        for parameter in self.named.values():
            parameter.grad = None
        mean = self._mean_of_own_part(whole)
        self.gradient = mean if self.gradient is None else self.gradient + mean
        if self.stage == 3:
            self.free()

    def _mean_of_own_part(self, whole: Tensor) -> Tensor:
        """A reduce-scatter; by an all-to-all and a sum, since gloo's own sends twice as much."""
        if self.stage == 0:
            dist.all_reduce(whole, group=self.group)
            return whole.div_(self.ranks)
        parts = torch.empty_like(whole)
        dist.all_to_all_single(parts, whole, group=self.group)
        total = parts.view(self.ranks, -1).sum(0, dtype=torch.float32)
        return total.div_(self.ranks).to(whole.dtype)

    def update(self) -> None:
        """After the optimizer's step: the weights to compute with, from all partitions."""
        part = self.partition.detach().to(self.flat.dtype)
        if self.stage == 3:
            self.shard.copy_(part)
            self.free()  # a forward without a backward has left the root's old weights there
        else:
            self.flat.copy_(self.put_together(part))
