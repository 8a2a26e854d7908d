"""DeepSpeed's pipeline: the language model cut into stages, with data parallelism beside it.

PipelineModule takes the model as a list of layers, each one's output the next's input: embedding,
blocks, norm, head. The list is cut into d stages, one to a rank; more ranks are replicas, whose
gradients are averaged. The embedding is the head too: TiedLayerSpec puts a copy of it on both ends,
and sums their gradients. `train_batch` takes m micro-batches and runs 1F1B, so that a stage idles
for (d - 1)/(m + d - 1) of the step, with messages that take no time.

It proves that each cut trains what one process trains, with ZeRO stage 1 too, and provokes what
stages 2 and 3 say. Then it times steps of 1 to 8 micro-batches. A forward pass sleeps until it has
lasted --stage-ms, a backward twice that, so that stages overlap on fewer cores than ranks.

Run:
    torchrun --nproc_per_node=2 chapter05-deepspeed-zero/code/pipeline.py
    torchrun --nproc_per_node=4 chapter05-deepspeed-zero/code/pipeline.py

You should see: losses and weights of one process; that the default cut, by parameters, does not
share the blocks out evenly where the embedding is large; an AssertionError for ZeRO 2 and 3; and a
bubble some points above the formula's, since DeepSpeed's messages block, and nothing hides them.
"""

from argparse import Namespace
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from distlab import data, predict, runtime, script
from distlab.display import quantity
from distlab.errors import Skipped, UsageError
from distlab.launch import detect_launch
from distlab.model import Llama, add_model_flags, config_from_args, num_parameters
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime
from zero.engine import engine_of, stage_config
from zero.pipeline_parts import Block, Paced, cut, weights_of

PRESETS = {
    "smoke": {"model": "smoke", "layers": 4, "corpus_mb": 0.2, "seq_len": 16, "batch_size": 8,
              "stage_ms": 20.0, "repeats": 1},
    "laptop": {"model": "laptop", "hidden_size": 64, "layers": 4, "corpus_mb": 1.0, "seq_len": 32,
               "batch_size": 8, "stage_ms": 20.0, "repeats": 10},
    "gpu": {"model": "laptop", "layers": 8, "corpus_mb": 12.0, "seq_len": 256, "batch_size": 32,
            "stage_ms": 30.0, "repeats": 6},
}  # fmt: skip
STEPS, MICRO_BATCHES = 3, 4  # of the proof
TIMED = (1, 2, 4, 8)  # micro-batches
METHODS = ("parameters", "uniform", "type:Block")  # DeepSpeed's own choice stands first
SAME = 1e-5  # float32 sums in another order, through some steps of AdamW
SLOWER = 1.2  # than the formula: each message takes some milliseconds of a busy processor

Batch = tuple[Tensor, Tensor]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        if job.backend == "gloo" and job.device.type == "cuda":
            raise Skipped("PipelineModule wants a GPU for each rank; use --device cpu, or NCCL")
        show(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--stage-ms", type=script.positive_float, help="of a forward pass")
    parser.add_argument("--repeats", type=script.positive_int, help="timed steps of each kind")
    args = parser.parse_args(argv)
    ranks, layers = detect_launch().world_size, config_from_args(args).num_hidden_layers
    if ranks not in (2, 4):
        raise UsageError(f"{ranks} rank(s): this wants 2 or 4; use torchrun --nproc_per_node=4")
    if layers % ranks:
        raise UsageError(f"--layers {layers} is no multiple of {ranks} stages; use --layers 4 or 8")
    smallest = MICRO_BATCHES * ranks // 2
    if args.batch_size % smallest:
        raise UsageError(
            f"--batch-size {args.batch_size} does not divide into {MICRO_BATCHES} micro-batches "
            f"for each replica; use a multiple of {smallest}"
        )
    return args


def show(run: Run, args: Namespace, job: Runtime) -> None:
    config = config_from_args(args)
    loader = data.Loader(
        data.prepare_from_args(args, config.vocab_size), args.seq_len, args.batch_size,
        device=job.device,
    )  # fmt: skip
    batches = [next(loader) for _ in range(STEPS)]
    cuts = [stages for stages in (2, 4) if stages <= job.world_size]
    run.print(f"model of {quantity(num_parameters(config), 'params')}, {job.world_size} ranks")
    compare_methods(run, args, job, cuts[-1])
    prove(run, args, job, batches, cuts)
    provoke(run, args, job)
    measure_bubbles(run, args, job, batches[0], cuts)


def new_model(args: Namespace, job: Runtime) -> Llama:
    """The same on every rank, whose stage takes its layers from it."""
    torch.manual_seed(args.seed)
    with torch.device(job.device):
        return Llama(config_from_args(args))


def compare_methods(run: Run, args: Namespace, job: Runtime, stages: int) -> None:
    """Where DeepSpeed cuts: an embedding, the norm and the head are layers as a block is."""
    rows = []
    for method in METHODS:
        stage = cut(new_model(args, job), stages, job, method)
        own = [isinstance(layer, Block) for layer in stage.forward_funcs]
        everyone = gathered((len(own), sum(own), num_parameters(stage)))[
            :: job.world_size // stages
        ]
        rows.append([method, *(" | ".join(map(str, column)) for column in zip(*everyone))])  # noqa: B905
    run.table("cuts", ["partition_method", "layers", "blocks", "parameters"], rows,
              f"of {stages} stages, one after the other")  # fmt: skip


def prove(run: Run, args: Namespace, job: Runtime, batches: list[Batch], cuts: list[int]) -> None:
    """Steps of AdamW, whose weight decay both sides leave at torch's own 0.01."""
    alone = new_model(args, job)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    expected = []
    for batch in batches:
        loss = alone.loss(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    rows = []
    for stages in cuts:
        for zero in (0, 1) if stages < job.world_size else (0,):
            losses, weights = train(args, job, batches, stages, zero)
            wanted = {name: alone.get_parameter(name) for name in weights}
            what = f"{stages} stages x {job.world_size // stages}, ZeRO {zero}"
            run.check_close(f"{what}: losses are one process's", losses, expected, SAME)
            run.check_close(f"{what}: this stage's weights too", weights, wanted, SAME)
            off = max(float((weights[n] - wanted[n]).detach().abs().max()) for n in weights)
            rows.append([stages, job.world_size // stages, zero, f"{losses[-1]:.4f}",
                         f"{max(gathered(off)):.1e}"])  # fmt: skip
    run.table("proof", ["stages", "replicas", "ZeRO", "last loss, nats", "weights' difference"],
              rows, f"{STEPS} steps; one process's last loss is {expected[-1]:.4f}")  # fmt: skip


def train(
    args: Namespace, job: Runtime, batches: list[Batch], stages: int, zero: int
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, the same on all ranks, and this stage's weights, by their names."""
    stage = cut(new_model(args, job), stages, job)
    with engine_of(stage, config_of(args, job, stages, zero), job) as engine:
        replica, replicas = engine.grid.get_data_parallel_id(), job.world_size // stages
        losses = []
        for batch in batches:
            own = (part.chunk(replicas)[replica].chunk(MICRO_BATCHES) for part in batch)
            losses.append(engine.train_batch(zip(*own, strict=True)).item())
        return losses, weights_of(stage)


def config_of(args: Namespace, job: Runtime, stages: int, zero: int = 0) -> dict[str, Any]:
    sequences = args.batch_size * stages // job.world_size // MICRO_BATCHES
    return stage_config(zero, sequences, accumulate=MICRO_BATCHES)


def provoke(run: Run, args: Namespace, job: Runtime) -> None:
    """ZeRO 2 reduces a gradient in every backward, and a pipeline's step has m of them."""
    for zero in (2, 3):
        said = "nothing"
        try:
            with engine_of(cut(new_model(args, job), 2, job), config_of(args, job, 2, zero), job):
                pass
        except AssertionError as error:
            said = f"AssertionError: {error}"
        run.check_true(f"ZeRO {zero} is refused", "incompatible with pipeline" in said, said)


def measure_bubbles(run: Run, args: Namespace, job: Runtime, batch: Batch, cuts: list[int]) -> None:
    """1 - busy / step, beside the formula, which counts passes and no messages."""
    rows, ratios, both = [], {}, 3 * args.stage_ms / 1e3  # a forward and a backward
    for stages in cuts:
        stage = cut(new_model(args, job), stages, job)
        with engine_of(stage, config := config_of(args, job, stages), job) as engine:
            pace = Paced(engine, args.stage_ms / 1e3, job)
            own = [part[: config["train_micro_batch_size_per_gpu"]] for part in batch]
            for m in run.progress(TIMED, f"{stages} stages"):
                steps = list(timed(engine, pace, job, own, m, args.repeats))
                step, busy = (median(values) for values in zip(*steps, strict=True))
                predicted, measured = predict.pipeline_bubble(stages, m), 1 - busy / step
                ratios[f"{stages} stages, {m}"] = [one / ((m + stages - 1) * both)
                                                   for one, _ in steps]  # fmt: skip
                rows.append([stages, m, 1e3 * (m + stages - 1) * both, 1e3 * step,
                             100 * predicted, 100 * measured,
                             f"{100 * (predicted / measured - 1):+.0f} %"])  # fmt: skip
    columns = ["stages", "micro-batches", "step predicted, ms", "measured, ms",
               "bubble predicted, %", "measured, %", "error"]  # fmt: skip
    run.table("bubbles", columns, rows, f"a forward of {args.stage_ms:g} ms; medians")
    late = max(gathered(pace.late))
    run.metric("late", late, "s", "the most by which real computing outlasted its pass")
    run.check_within("a step, relative to (m + d - 1) forwards and backwards", ratios, SLOWER, 0.99)


def timed(
    engine: Any, pace: Paced, job: Runtime, own: list[Tensor], m: int, repeats: int
) -> Iterator[tuple[float, float]]:
    """Seconds of each step, from its first pass to its last, and of them those a stage was busy."""
    engine.set_train_batch_size(m * len(own[0]) * engine.grid.data_parallel_size)
    for repeat in range(1 + repeats):
        pace.passes.clear()
        job.barrier()
        engine.train_batch(iter([own] * m))
        if repeat:  # the first step makes buffers
            # A pipeline's first stage begins first and ends last.
            busy = sum(end - start for start, end in pace.passes)
            own_window = pace.passes[-1][1] - pace.passes[0][0]
            everyone = gathered((own_window, busy))
            windows, busies = zip(*everyone, strict=True)
            yield max(windows), mean(busies)


if __name__ == "__main__":
    script.exit(main)
