"""FSDP and tensor parallelism together: a mesh of two axes, and what is sent along each.

Tensor parallelism sends activations in the middle of every layer, so it must stay inside a node. So
ranks stand in a mesh [data, tensor]. Along `tensor`, neighbours, each matrix is split by columns or
rows, and all compute on the same sequences. Along `data` what is left of each matrix is sharded,
and every row of the mesh has sequences of its own. A parameter is a DTensor with two placements.

Run:
    torchrun --nproc_per_node=4 chapter04-fsdp/code/fsdp_tensor_parallel.py
    python3 scripts/lab.py cluster --nodes 2 -- torchrun --nnodes=2 --nproc_per_node=2 \\
        --rdzv_backend=c10d --rdzv_endpoint=node0:29500 \\
        chapter04-fsdp/code/fsdp_tensor_parallel.py --tensor-parallel 2

You should see: on every mesh, from 4 x 1 (FSDP alone) to 1 x 4, losses, gradients and parameters
equal to one process's, and bytes along each axis exactly as the formulas say: along data the
parameters, a T-th of them with T ranks along tensor; along tensor the batch's activations. On nodes
of a cluster what a node's interface sends is the data axis alone.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as tp
from torch.nn.utils import clip_grads_with_norm_

from distlab import runtime, script
from distlab.errors import UsageError
from distlab.launch import detect_launch
from distlab.model import Llama, ModelConfig, add_model_flags, config_from_args, num_parameters
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.traffic import bytes_sent, reduction_factor
from fsdp import parity
from fsdp.traffic import AxisTraffic

LAPTOP = {"model": "laptop", "batch_size": 8, "seq_len": 16, "steps": 10}
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {**LAPTOP, "model": "smoke", "heads": 8, "kv_heads": 4, "steps": 4},
    "laptop": LAPTOP, "gpu": LAPTOP,  # a proof wants no larger one
}  # fmt: skip
FLOAT = 4  # bytes
OF_THE_LOSS = 3  # all-reduces of a number for each token: maximum, sum of exponentials, own logit
AXES = ("data", "tensor")
COLUMNS = [
    "data x tensor", "largest difference", "a rank's part of the weights (%)",
    *(f"{axis}, {how} (MB)" for axis in AXES for how in ("predicted", "counted")),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_meshes(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--tensor-parallel", type=script.positive_int, nargs="+", metavar="T", help="default: all")
    add("--untied", action="store_true", help="an output matrix that is not the embedding")
    add("--batch-size", type=script.positive_int, help="sequences of all ranks")
    add("--seq-len", type=script.positive_int, help=f"tokens, {parity.FEW} at most")
    add("--steps", type=script.positive_int)
    args = parser.parse_args(argv)
    refuse(args, detect_launch().world_size)
    return args


def refuse(args: Namespace, ranks: int) -> None:
    """Raise `UsageError` for a degree, or a batch, that cannot be; choose all degrees if none."""
    config = config_from_args(args)
    counts = {
        "ranks": ranks, "heads": config.num_attention_heads,
        "kv heads": config.num_key_value_heads, "columns of the MLP": config.intermediate_size,
        "words": config.vocab_size,
    }  # fmt: skip
    fitting = [n for n in range(1, ranks + 1) if not any(count % n for count in counts.values())]
    for degree in args.tensor_parallel or []:
        for what, count in counts.items():
            if count % degree:
                raise UsageError(f"--tensor-parallel {degree} does not divide {count} {what}; "
                                 f"use {', '.join(map(str, fitting))}")  # fmt: skip
    args.tensor_parallel = args.tensor_parallel or fitting
    most = max(ranks // degree for degree in args.tensor_parallel)
    if args.batch_size % most:
        raise UsageError(f"--batch-size {args.batch_size} is not divisible by {most} ranks along "
                         f"data; use {-(-args.batch_size // most) * most}")  # fmt: skip


@dataclass(frozen=True)
class OnMesh(parity.Case):
    """A case of the proof on a mesh [data, tensor]."""

    mesh: DeviceMesh | None = None


def compare_meshes(run: Run, args: Namespace, job: Runtime) -> None:
    """Train on every mesh and as one process; count what a step sends along each axis."""
    # The proof gathers tensors along one axis after the other, and every rank would warn of it.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    config = config_from_args(args)
    if args.untied:
        config = replace(config, tie_word_embeddings=False)
    total, tokens = num_parameters(config), min(args.seq_len, parity.FEW)
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}; "
              f"{total:,} parameters, {args.batch_size} x {tokens} tokens")  # fmt: skip
    random = torch.Generator().manual_seed(args.seed)
    batches = [parity.text_batch(args, random, job.device) for _ in range(args.steps)]
    case = parity.Case("alone", lambda: Llama(config), batches)
    alone = parity.train(case, args, job, parity.Alone)
    rows: list[list[Any]] = []
    for degree in args.tensor_parallel:
        shape = (job.world_size // degree, degree)
        mesh = init_device_mesh(job.device.type, shape, mesh_dim_names=AXES)
        case = OnMesh("both", lambda: Llama(config), batches, mesh=mesh)
        differs = max(parity.largest_difference(parity.train(case, args, job, OnBothAxes), alone))
        both = OnBothAxes(case, job)
        step = partial(parity.accumulate, both, *map(both.share, batches[0]))
        with AxisTraffic(mesh) as counted:
            step()
        predicted = predicted_bytes(args, config, *shape, reduction_factor(job.backend))
        mb = [side[axis] / 1e6 for axis in AXES for side in (predicted, counted.bytes)]
        own = sum(parameter.to_local().numel() for parameter in both.model.parameters())
        rows.append([f"{shape[0]} x {degree}", differs, 100 * own / total, *mb])
        if degree == job.local_world_size < job.world_size:  # only data goes between the nodes
            by_node = bytes_sent(step, job)
            run.compare("sent by a node's interface", degree * predicted["data"], by_node, "B")
    run.table(
        "meshes", COLUMNS, rows,
        caption=f"difference to one process in {args.steps} steps: losses, first gradients, "
        "parameters; MB: what a rank sends in a step",
    )  # fmt: skip
    _, worst, _, *sent = map(list, zip(*rows, strict=True))
    run.check_below("the largest difference to one process", max(worst), parity.TOLERANCE)
    run.check_close("MB counted are those predicted", sent[1::2], sent[::2], 1e-9)


class OnBothAxes(parity.Torchs):
    """A case's model, split along tensor and what is left of it sharded along data."""

    def __init__(self, case: parity.Case, job: Runtime) -> None:
        assert isinstance(case, OnMesh) and case.mesh is not None
        self.case, self.job, self.mesh = case, job, case.mesh
        model: Any = parity.begin(case, job)
        split_along_tensor(model, self.mesh["tensor"])
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=self.mesh["data"])
        self.model = model

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """Ranks that differ along tensor alone have the same sequences."""
        return batch.chunk(self.mesh.size(0))[self.mesh.get_local_rank("data")]

    @contextmanager
    def synchronizing(self, really: bool) -> Iterator[None]:
        with tp.loss_parallel():  # no rank ever has the logits of all words
            yield

    def clip(self) -> None:
        """`clip_grad_norm_` refuses parameters of two meshes; norm layers' are on data alone."""
        parameters = list(self.model.parameters())
        norms = torch.stack([p.grad.norm().full_tensor() for p in parameters])
        clip_grads_with_norm_(parameters, parity.LARGEST_NORM, norms.norm(), foreach=False)


def split_along_tensor(model: Llama, mesh: DeviceMesh) -> None:
    """Columns first, then rows: one sum over the ranks for each half of a layer, in each pass."""
    columns, rows, whole = tp.ColwiseParallel(), tp.RowwiseParallel(), Replicate()
    layer: dict[str, tp.ParallelStyle] = {
        "self_attn": tp.PrepareModuleInput(  # its input's gradient, once for q, k and v
            input_layouts=(whole, None, None), desired_input_layouts=(whole, None, None)
        ),
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), columns),
        "mlp": tp.PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), columns),
        **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), rows),
    }
    for block in model.model.layers:
        tp.parallelize_module(block, mesh, layer)
    ends: dict[str, tp.ParallelStyle] = {
        "model.embed_tokens": tp.RowwiseParallel(input_layouts=whole),
        "lm_head": tp.ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    tp.parallelize_module(model, mesh, ends)
    model.tie_weights()  # which parallelize_module has separated
    # The loss as a plain tensor, and no view: FSDP warns of views, which may be changed unseen.
    model.register_forward_hook(lambda module, args, loss: loss.to_local().clone())


def predicted_bytes(
    args: Namespace, config: ModelConfig, data: int, tensor: int, reduction: int
) -> dict[str, float]:
    """What a rank sends in a step along each axis, in bytes.

    Along data a unit's part is gathered twice and reduced once, the root's gathered once. Along
    tensor each half of a layer needs an all-reduce of activations in each pass, the embedding one
    forward and the output layer one backward.
    """
    halves, tables = 2 * config.num_hidden_layers, 1 if config.tie_word_embeddings else 2
    norms = (halves + 1) * config.hidden_size
    root = config.hidden_size * (tables * config.vocab_size / tensor + 1)
    whole = (num_parameters(config) - norms) / tensor + norms
    tokens = args.batch_size // data * min(args.seq_len, parity.FEW)
    sums = 2 * (halves + 1)
    return {
        "data": FLOAT * (data - 1) / data * ((2 + reduction) * whole - root),
        "tensor": FLOAT
        * (tensor - 1)
        / tensor
        * 2
        * tokens
        * (sums * config.hidden_size + OF_THE_LOSS),
    }


if __name__ == "__main__":
    script.exit(main)
