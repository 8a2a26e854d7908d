"""torch.distributed's collectives with a counter: what each of them makes this rank send, in bytes.

A collective is counted as its bandwidth-optimal form sends it: a ring all-reduce of n bytes over K
ranks is 2·(K - 1)/K·n, a gather, a scatter and an exchange (K - 1)/K·n of the whole buffer, a
broadcast n, down a chain. Which form the back end takes is its own affair; the counter says what
any of them must send at least. gloo sends just that, but for its reduce-scatter, which is an
all-reduce inside, and its broadcast, whose tree shares the same bytes out otherwise.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic:
    """What this rank has sent within `group`, by collective: `bytes`, and `calls` of each."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.bytes: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def total(self) -> float:
        return sum(self.bytes.values())

    @property
    def total_calls(self) -> int:
        return sum(self.calls.values())

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite `tensor` on every rank by that of the group's rank `source`."""
        last = (source - 1) % self.world_size  # the chain's end passes nothing on
        self._count("broadcast", 0 if self.rank == last else tensor.nbytes)
        dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `tensor` over the group, in place."""
        self._count("all_reduce", 2 * self._share(tensor))
        dist.all_reduce(tensor, op, self.group)
        return tensor

    def all_gather(self, shard: Tensor) -> list[Tensor]:
        """Every rank's `shard`, all of one shape, in the order of the ranks."""
        self._count("all_gather", (self.world_size - 1) * shard.nbytes)
        outgoing = self._sendable(shard)
        gathered = [torch.empty_like(outgoing) for _ in range(self.world_size)]
        dist.all_gather(gathered, outgoing, self.group)
        return [part.to(shard.device) for part in gathered]

    def reduce_scatter(self, shards: list[Tensor]) -> Tensor:
        """The sum over the ranks of this rank's entry of `shards`, one entry for each rank."""
        self._count("reduce_scatter", (self.world_size - 1) * shards[0].nbytes)
        outgoing = [self._sendable(shard) for shard in shards]
        own = torch.empty_like(outgoing[0])
        dist.reduce_scatter(own, outgoing, group=self.group)
        return own.to(shards[0].device)

    def all_to_all(
        self,
        tensor: Tensor,
        receive: list[int] | None = None,
        send: list[int] | None = None,
    ) -> Tensor:
        """Send `send[r]` rows of `tensor` to rank r, receive `receive[r]` rows from it.

        Equal shares of the rows where the lists are not given.
        """
        own = tensor.shape[0] // self.world_size if send is None else send[self.rank]
        self._count("all_to_all", (tensor.shape[0] - own) * tensor[:1].nbytes)
        outgoing = self._sendable(tensor)
        rows = tensor.shape[0] if receive is None else sum(receive)
        incoming = outgoing.new_empty(rows, *tensor.shape[1:])
        dist.all_to_all_single(incoming, outgoing, receive, send, self.group)
        return incoming.to(tensor.device)

    def exchange(self, tensor: Tensor, to: int, source: int) -> Tensor:
        """Send `tensor` to the group's rank `to` while one of its shape arrives from `source`.

        With oneself, as in a ring of one rank, nothing is sent.
        """
        if to == source == self.rank:
            return tensor
        self._count("send", tensor.nbytes)
        outgoing = self._sendable(tensor)
        incoming = torch.empty_like(outgoing)
        for request in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, group=self.group, group_peer=to),
                dist.P2POp(dist.irecv, incoming, group=self.group, group_peer=source),
            ]
        ):
            request.wait()
        return incoming.to(tensor.device)

    def send(self, tensor: Tensor, to: int) -> None:
        """Send `tensor` to the group's rank `to`; returns when it may be changed again."""
        self._count("send", tensor.nbytes)
        dist.send(self._sendable(tensor), group=self.group, group_dst=to)

    def receive(self, like: Tensor, source: int) -> Tensor:
        """A tensor of the shape, type and device of `like` from the group's rank `source`."""
        incoming = torch.empty_like(self._sendable(like))
        dist.recv(incoming, group=self.group, group_src=source)
        return incoming.to(like.device)

    def _sendable(self, tensor: Tensor) -> Tensor:
        """`tensor` in one piece, on the host for gloo: of a GPU's it can reduce and broadcast."""
        staged = tensor.cpu() if dist.get_backend(self.group) == "gloo" else tensor
        return staged.contiguous()

    def _share(self, tensor: Tensor) -> float:
        return (self.world_size - 1) / self.world_size * tensor.nbytes

    def _count(self, collective: str, sent: float) -> None:
        self.bytes[collective] = self.bytes.get(collective, 0.0) + sent
        self.calls[collective] = self.calls.get(collective, 0) + 1


class CountCollectives(TorchDispatchMode):
    """Within it, `total` bytes that a ring makes this rank send, in `calls` of each collective.

    It sees what torch dispatches: DTensor's functional collectives, not `torch.distributed`'s.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.total = 0.0
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @property
    def total_calls(self) -> int:
        return sum(self.calls.values())

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor turn itself into collectives first
        if func.namespace == "_c10d_functional":
            self._count(func.name().removeprefix("_c10d_functional::"), *args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, *args: Any) -> None:
        others = (self.world_size - 1) / self.world_size
        if name.startswith("all_reduce"):
            self._add("all_reduce", 2 * others * args[0].nbytes)
        elif name.startswith("reduce_scatter"):
            self._add("reduce_scatter", others * args[0].nbytes)
        elif name.startswith("all_gather"):
            self._add("all_gather", (self.world_size - 1) * args[0].nbytes)
        elif name.startswith("all_to_all"):
            sent = args[2]  # rows to each rank
            self._add("all_to_all", (1 - sent[self.rank] / sum(sent)) * args[0].nbytes)

    def _add(self, collective: str, sent: float) -> None:
        self.calls[collective] += 1
        self.total += sent
