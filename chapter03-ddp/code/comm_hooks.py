"""DDP's communication hooks: fewer bytes for the gradient, what they cost, and what they spoil.

A hook replaces the all-reduce of each bucket. float16 and bfloat16 halve its bytes; PowerSGD sends
two thin matrices instead of each gradient matrix; the int8 hook is written here. It cannot
all-reduce, because a sum of int8 overflows. So every rank sends shard r of its gradient, in 8 bits,
to rank r, which adds the K shards in float32, quantises their sum and sends it to everybody:
2·(K - 1)/K bytes for each element, and a float32 scale for each chunk. (An all-gather of all K
gradients would send K - 1 bytes for each element: as many with two ranks, more with three.)
What each of the roundings takes away is added to the next gradient: error feedback.

Run:
    python chapter03-ddp/code/comm_hooks.py --figures build/figures
    torchrun --nproc_per_node=2 chapter03-ddp/code/comm_hooks.py

The first trains on two nodes of a virtual cluster, counts the bytes at their network interfaces,
and times the same steps on links of several rates; the second measures the ranks that it has, and
their interface's bytes where --interface names one.

You should see: the bytes on the wire are those of the formulas; a hook that computes longer than
it saves loses on the fast link and wins on the slow one; with error feedback the sum of many
gradients is off by one step's rounding, without it by more with every step.

Sources: Vogels et al., "PowerSGD" (arXiv 1905.13727); error feedback: Karimireddy et al. (arXiv
1901.09847); feedback of both roundings: Tang et al., "DoubleSqueeze" (arXiv 1905.05957).
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.compression import TORCH_HOOKS, Hook, exchanged_in_int8, measure_feedback
from ddp.compression_costs import measure_hooks, measure_on_links, report, report_nodes
from distlab import data, runtime, script
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import here_or_on_nodes
from distlab.errors import UsageError
from distlab.model import add_model_flags, config_from_args
from distlab.run import Run
from distlab.runtime import Runtime

CHUNK = 1024  # elements that share a scale
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 4, "steps": 6,
              "timed_steps": 3, "rates": ["1gbit", "100mbit"]},
    "laptop": {"model": "laptop", "hidden_size": 128, "corpus_mb": 2.0, "seq_len": 32,
               "batch_size": 4, "steps": 40, "timed_steps": 5, "rates": ["1gbit", "100mbit"],
               "tolerance": 0.2},
    "gpu": {"model": "laptop", "hidden_size": 128, "corpus_mb": 2.0, "seq_len": 32,
            "batch_size": 4, "steps": 40, "timed_steps": 5, "rates": ["1gbit", "100mbit"],
            "tolerance": 0.2},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return here_or_on_nodes(parse_args(argv), measure_ranks, compare_links)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    names = ", ".join(HOOKS)
    add("--hooks", nargs="+", choices=HOOKS, default=list(HOOKS), metavar="HOOK", help=names)
    add("--steps", type=script.positive_int, help="to train with each hook")
    add("--learning-rate", type=script.positive_float, default=0.01, metavar="LR")
    add("--start-powersgd", type=script.positive_int, default=2, metavar="STEP",
        help="all-reduce before it; DDP arranges its buckets in step 1")  # fmt: skip
    add("--interface", metavar="NAME", help="count the bytes that it sends, eth0")
    cluster = parser.add_argument_group("the virtual cluster")
    add = cluster.add_argument
    add("--nodes", type=script.positive_int, default=2, metavar="K")
    add("--rates", nargs="+", metavar="RATE")
    add("--timed-steps", type=script.positive_int, help="on each rate")
    add("--tolerance", type=script.positive_float, help="of a step's predicted time, relative")
    args = parser.parse_args(argv)
    args.hooks = list(dict.fromkeys(["none", *args.hooks]))  # what the others are compared with
    for name, least, why in (
        ("start_powersgd", 2, "is before DDP has arranged its buckets anew"),
        ("steps", args.start_powersgd + 4, "gives no median"),
        ("timed_steps", 3, "gives no median"),
        ("nodes", 2, "is no cluster"),
    ):
        if (value := getattr(args, name)) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value} {why}; use {least} or more")
    config_from_args(args)  # a wrong shape is told before anything starts
    for rate in args.rates:
        parse_rate(rate, f"--rates {rate}")
    return args


def compare_links(run: Run, args: Namespace) -> None:
    """Two nodes or more, whose links change while one job runs on them."""
    report_nodes(run, args, measure_on_links(args, Path(__file__)))


def measure_ranks(run: Run, args: Namespace, job: Runtime) -> None:
    """The ranks of this job, whatever link they have."""
    measured = measure_hooks(run, args, job, HOOKS)
    feedback = measure_feedback(job, lambda kept: Int8State(feedback=kept), int8_hook)
    report(run, args, measured, feedback)
    run.extra(measured=[vars(one) for one in measured], feedback=vars(feedback))


class Int8State:
    """What `int8_hook` keeps from step to step: for each parameter, what roundings took so far.

    DDP arranges its buckets anew after the first step, so a residual kept for a bucket would then
    be added to other parameters' gradients. `chunk` elements share a scale.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, chunk: int = CHUNK, feedback: bool = True
    ) -> None:
        self.group, self.chunk, self.feedback = group, chunk, feedback
        self.residuals: dict[int, Tensor] = {}  # by the parameter's id
        self.under_way: list[Exchange] = []

    def owed(self, parameters: Sequence[Tensor]) -> Tensor:
        """The residuals of a bucket's parameters, in its order; shape [elements]."""
        pieces = [self.residuals.get(id(p), torch.zeros_like(p)) for p in parameters]
        return torch.cat([piece.flatten() for piece in pieces])

    def keep(self, parameters: Sequence[Tensor], residual: Tensor) -> None:
        """Remember `residual` [elements]. After an overflow nothing is owed: NaN would stay."""
        pieces = residual.nan_to_num(0.0, 0.0, 0.0).split([p.numel() for p in parameters])
        self.residuals.update(zip(map(id, parameters), pieces, strict=True))


def int8_hook(state: Int8State, bucket: dist.GradBucket) -> Future[Tensor]:
    """Average the bucket over the ranks in 8 bits; for `DDP.register_comm_hook(state, int8_hook)`.

    The shards of a bucket leave while the backward pass goes on. Their sums leave when the last
    bucket is ready, not when a bucket's shards arrive: all ranks must begin their collectives in
    the same order, and messages arrive in any; nor may gloo's threads wait for each other.
    """
    if bucket.index() == 0:
        state.under_way = []
    exchange = Exchange(state, bucket)
    state.under_way.append(exchange)
    if bucket.is_last():
        for each in state.under_way:
            each.send_sum()
        for each in state.under_way:
            each.finish()
    return exchange.future


class Exchange:
    """One bucket on its way: a reduce-scatter of int8, then an all-gather of int8."""

    def __init__(self, state: Int8State, bucket: dist.GradBucket) -> None:
        self.state, self.buffer, self.parameters = state, bucket.buffer(), bucket.parameters()
        device = self.buffer.device
        self.future: Future[Tensor] = Future(devices=[device] if device.type == "cuda" else [])
        self.rank, workers = dist.get_rank(state.group), dist.get_world_size(state.group)
        gradient = self.buffer + state.owed(self.parameters) if state.feedback else self.buffer
        missing = -len(gradient) % (workers * state.chunk)
        shards = F.pad(gradient, (0, missing)).view(workers, -1)  # row r is for rank r
        shares = self.message(shards)
        self.residual = shards - dequantise(shares, state.chunk, shards.device)
        self.arriving = torch.empty_like(shares)
        self.work = dist.all_to_all_single(self.arriving, shares, group=state.group, async_op=True)

    def send_sum(self) -> None:
        """Add up what the ranks sent of this rank's shard, and send the sum to all of them."""
        self.work.wait()
        chunk, device = self.state.chunk, self.buffer.device
        total = dequantise(self.arriving, chunk, device).sum(0, keepdim=True)
        message = self.message(total)
        self.residual[self.rank] += (total - dequantise(message, chunk, device))[0]
        self.sums = [torch.empty_like(message) for _ in self.arriving]
        self.work = dist.all_gather(self.sums, message, group=self.state.group, async_op=True)

    def finish(self) -> None:
        """Overwrite the bucket by the mean, and keep the residual."""
        self.work.wait()
        total = dequantise(torch.cat(self.sums), self.state.chunk, self.buffer.device)
        count = len(self.buffer)
        self.buffer.copy_(total.flatten()[:count] / len(total))
        if self.state.feedback:
            self.state.keep(self.parameters, self.residual.flatten()[:count])
        self.future.set_result(self.buffer)

    def message(self, values: Tensor) -> Tensor:
        """`values` quantised; on the host for gloo, which exchanges no GPU's tensors."""
        message = quantise(values, self.state.chunk)
        return message.cpu() if dist.get_backend(self.state.group) == "gloo" else message


def quantise(values: Tensor, chunk: int) -> Tensor:
    """`values` [rows, m] as int8 [rows, m + 4·m/chunk]: m steps, then a float32 scale per chunk.

    The largest magnitude of a chunk is 127 steps. A chunk with NaN or infinity in it has such a
    scale, so all of it becomes NaN on the other side: it does not pass for a number.
    """
    chunks = values.float().unflatten(-1, (-1, chunk))
    scales = chunks.abs().amax(-1, keepdim=True) / 127
    steps = (chunks / scales).nan_to_num_(0.0, 0.0, 0.0)  # 0 / 0, and what is no number
    steps = steps.round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([steps.flatten(1), scales.squeeze(-1).view(torch.int8)], dim=1)


def dequantise(message: Tensor, chunk: int, device: torch.device) -> Tensor:
    """The float32 values [rows, m] of a message of `quantise`."""
    count = message.shape[1] * chunk // (chunk + 4)
    steps, scales = message.to(device).split([count, message.shape[1] - count], dim=1)
    scales = scales.clone().view(torch.float32)  # a copy, since a view may not be aligned
    return steps.float().unflatten(-1, (-1, chunk)).mul_(scales.unsqueeze(-1)).flatten(1)


def int8(feedback: bool) -> Hook:
    def register(replica: DDP, args: Namespace) -> None:
        replica.register_comm_hook(Int8State(feedback=feedback), int8_hook)

    return Hook(register, exchanged_in_int8(CHUNK))


HOOKS = {**TORCH_HOOKS, "int8": int8(feedback=True), "int8-no-feedback": int8(feedback=False)}


if __name__ == "__main__":
    script.exit(main)
