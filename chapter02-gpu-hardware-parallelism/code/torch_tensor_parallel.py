"""Tensor parallelism with torch: a plan says which matrix is split how, and DTensor does the rest.

What the library does for you: `parallelize_module` replaces each weight by a DTensor, of which a
rank holds its part. From the layouts of a product's input and output DTensor works out the
collectives of both passes, splits the loss by words (`loss_parallel`), and gives the optimizer and
the checkpoint parameters that know their whole shape. The model's code stays as it was.

What it does not do for you: a plan that names only the matrices, as most do, gives q, k and v (and
gate and up) an f each. Their gradients are then all-reduced one by one: 5 all-reduces a layer
backward, where Megatron has 2. Preparing the block's input once mends that. And it separates tied
weights, silently: tie them again afterwards.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/torch_tensor_parallel.py

You should see: loss and every gradient equal to one process's under all three plans, and more than
twice the bytes backward under the first of them.
"""

from argparse import Namespace

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from distlab import runtime, script
from distlab.launch import detect_launch
from distlab.model import Llama, config_from_args
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.problem import (
    Problem,
    check_degree,
    check_equal,
    gradients_of,
    one_process,
    parser,
)
from parallelism.tensor import OF_THE_LOSS, all_reduce_bytes, parts_of
from parallelism.traffic import CountCollectives

EACH, BLOCK, SEQUENCE = "each matrix", "block by block", "with sequence parallel"
Plan = dict[str, ParallelStyle]


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    check_degree(detect_launch().world_size, parts_of(config_from_args(args)))
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    problem = one_process(run, args, job)
    mesh = init_device_mesh(job.device.type, (job.world_size,))
    for form in (EACH, BLOCK, SEQUENCE):
        loss, gradients, sent = step(problem, mesh, form)
        check_equal(run, form, loss, gradients, problem)
        report(run, form, args, *sent)


def step(
    problem: Problem, mesh: DeviceMesh, form: str
) -> tuple[Tensor, dict[str, Tensor], list[CountCollectives]]:
    """The loss, the whole gradients, and what was sent forward and backward."""
    model = split(problem.new_model(), mesh, form)
    with loss_parallel():
        with CountCollectives() as forward:
            loss = model.loss(problem.input_ids, problem.targets)
        with CountCollectives() as backward:
            loss.backward()
    gradients = {name: whole(gradient) for name, gradient in gradients_of(model).items()}
    return whole(loss.detach()), gradients, [forward, backward]


def split(model: Llama, mesh: DeviceMesh, form: str) -> Llama:
    """`model` with its weights as DTensors, changed in place."""
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan_of_a_layer(form))
    between = Shard(1) if form == SEQUENCE else Replicate()  # [batch, seq, hidden]
    ends: Plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "lm_head": ColwiseParallel(
            input_layouts=between, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    if form == SEQUENCE:
        ends["model.norm"] = SequenceParallel()
    parallelize_module(model, mesh, ends)
    model.tie_weights()
    return model


def plan_of_a_layer(form: str) -> Plan:
    between = Shard(1) if form == SEQUENCE else Replicate()
    plan: Plan = {
        **{f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        **{f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")},
        "mlp.down_proj": RowwiseParallel(output_layouts=between),
    }
    if form != EACH:
        plan["self_attn"] = prepared((between, None, None), (Replicate(), None, None))
        plan["mlp"] = prepared((between,), (Replicate(),))
    if form == SEQUENCE:
        plan["input_layernorm"] = plan["post_attention_layernorm"] = SequenceParallel()
    return plan


def prepared(here: tuple, inside: tuple) -> PrepareModuleInput:
    """One f for a whole block: its inputs' layouts, None for those that are no activations."""
    return PrepareModuleInput(input_layouts=here, desired_input_layouts=inside)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def report(
    run: Run, form: str, args: Namespace, forward: CountCollectives, backward: CountCollectives
) -> None:
    """In all-reduces of 4·b·s·h bytes: 2 a layer and one at an end of the vocabulary, both passes.

    Each matrix: 3 for q, k and v, and 2 for gate and up, backward. With sequence parallelism the
    output layer's f is still an all-reduce backward, where half of it, a reduce-scatter, would do,
    and the norms' gradients remain partial sums, which DTensor adds up when somebody uses them.
    """
    config, workers = config_from_args(args), forward.world_size
    one = all_reduce_bytes(args, workers, config.hidden_size)
    pairs = 2 * config.num_hidden_layers + 1
    back = {EACH: 5 * config.num_hidden_layers + 1, BLOCK: pairs, SEQUENCE: pairs + 0.5}[form]
    loss = OF_THE_LOSS * all_reduce_bytes(args, workers, 1)
    run.compare(f"{form}: forward, bytes", pairs * one + loss, forward.total, "B")
    run.compare(f"{form}: backward, bytes", back * one, backward.total, "B")


if __name__ == "__main__":
    script.exit(main)
