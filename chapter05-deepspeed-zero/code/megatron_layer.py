"""Tensor parallelism for a layer that is too much for one GPU: Megatron, torch, and from scratch.

ZeRO shares out what ranks keep, not what they compute: for that, DeepSpeed went with Megatron, and
has its AutoTP now. A rank has 1/K of A's columns and the matching rows of B, and computes its part
of gelu(x·A)·B. The ranks' parts are summed by an all-reduce, and so is the gradient of x, which
each has a part of.

Run:
    torchrun --nproc_per_node=2 chapter05-deepspeed-zero/code/megatron_layer.py

You should see: the whole matrices' output and gradients from all three, and the same bytes. Source:
Shoeybi et al. 2019 (arXiv 1909.08053), section 3.
"""

import importlib.util
import warnings
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from distlab import runtime, script
from distlab.errors import Skipped
from distlab.measure import tensors_in
from distlab.predict import BUS_FACTORS
from distlab.run import Run
from distlab.runtime import Runtime

SIZES = {"smoke": 64, "laptop": 512, "gpu": 4096}
PRESETS = {preset: {"hidden_size": size} for preset, size in SIZES.items()}
TOKENS, WIDER = 256, 4  # of the input; columns of A for each of its rows
WITHOUT_GPU = {"use_cpu_initialization": True, "gradient_accumulation_fusion": False}
CURE = "python3 scripts/lab.py env deepspeed installs it"
SAME = 1e-5  # of the largest value: float32 sums in another order


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if importlib.util.find_spec("megatron") is None:
        raise Skipped(f"megatron-core is not installed; {CURE}")
    warnings.filterwarnings("ignore", module="megatron")  # it does without a GPU's kernels
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--hidden-size", type=script.positive_int, metavar="N")
    return parser.parse_args(argv)


class Whole(nn.Module):
    """gelu(x·A)·B; torch keeps A and B as [outputs, inputs]."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Linear(a.shape[1], a.shape[0], bias=False)
        self.b = nn.Linear(b.shape[1], b.shape[0], bias=False)
        self.a.weight.data, self.b.weight.data = a.clone(), b.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


class FromScratch(Whole):
    """The whole layer's code on this rank's parts; gradients are summed before, values after."""

    def forward(self, x: Tensor) -> Tensor:
        return Summed.apply(super().forward(Summed.apply(x, False)), True)


class Summed(torch.autograd.Function):
    """The ranks' sum, of `values` on the way forward or of gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: bool) -> Tensor:
        ctx.values = values
        return summed(x) if values else x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] if ctx.values else summed(gradients[0]), None


def summed(own: Tensor) -> Tensor:
    dist.all_reduce(whole := own.clone())
    return whole


class Megatron(nn.Module):
    """Its layers return their output and a bias that is left to add, which is None here."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        from megatron.core import ModelParallelConfig, tensor_parallel

        super().__init__()
        config = ModelParallelConfig(**WITHOUT_GPU)
        common = {"config": config, "init_method": nn.init.zeros_, "bias": False,
                  "skip_bias_add": False, "tp_group": dist.group.WORLD}  # fmt: skip
        self.a = tensor_parallel.ColumnParallelLinear(*a.T.shape, gather_output=False, **common)
        self.b = tensor_parallel.RowParallelLinear(*b.T.shape, input_is_parallel=True, **common)
        self.a.weight.data, self.b.weight.data = part(a, 0), part(b, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)[0]))[0]


def part(whole: Tensor, dim: int) -> Tensor:
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


class AllReduced(TorchDispatchMode):
    """Within it, the bytes that this rank sends in all-reduces, as a ring sends them."""

    bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor turn itself into collectives first
        if "c10d" in func.namespace and "allreduce" in func.name().replace("_", ""):
            ring = BUS_FACTORS["all_reduce"](dist.get_world_size())
            self.bytes += ring * max(tensor.nbytes for tensor in tensors_in(args))
        return func(*args, **(kwargs or {}))


def compare(run: Run, args: Namespace, job: Runtime) -> None:
    hidden = args.hidden_size
    inner = -(-WIDER * hidden // job.world_size) * job.world_size  # the ranks must divide it
    shapes = ((inner, hidden), (hidden, inner), (TOKENS, hidden), (TOKENS, hidden))
    a, b, x, upstream = (torch.randn(shape, device=job.device) / hidden**0.5 for shape in shapes)
    _, wanted = step(Whole(a, b), x, upstream)
    wanted["a"], wanted["b"] = part(wanted["a"], 0), part(wanted["b"], 1)
    mesh = init_device_mesh(job.device.type, (job.world_size,))
    plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
    layers = {"from scratch": FromScratch(part(a, 0), part(b, 1)), "Megatron": Megatron(a, b),
              "torch": parallelize_module(Whole(a, b), mesh, plan)}  # fmt: skip
    predicted, rows = BUS_FACTORS["all_reduce"](job.world_size) * x.nbytes, []
    for name, layer in layers.items():
        sent, found = step(layer, x, upstream)
        run.check_close(f"{name}: output, gradients", found, wanted, SAME, relative=True)
        run.check_equal(f"{name}: bytes as predicted", sent, [predicted] * 2)
        rows.append([name, sum(local(p).numel() for p in layer.parameters()), predicted, *sent])
    columns = ["layer", "parameters", "predicted, B", "forward, B", "backward, B"]
    run.table("layers", columns, rows, "of a rank; sent in all-reduces, in each direction")


def step(layer: Any, x: Tensor, upstream: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """The bytes all-reduced in both passes; the output, and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    with AllReduced() as forward:
        output = layer(x)
    with AllReduced() as backward:
        output.backward(upstream)
    own = {"y": output.detach(), "x": x.grad}
    own |= {name: getattr(layer, name).weight.grad for name in ("a", "b")}
    return [forward.bytes, backward.bytes], {name: local(tensor) for name, tensor in own.items()}


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    script.exit(main)
