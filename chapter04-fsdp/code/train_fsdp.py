"""Train a model that no rank can hold: chapter 3's training script, sharded by `fully_shard`.

Weights, gradients and AdamW's moments are shared out to the ranks, a K-th each. A unit of the model
(a block) is gathered when it computes, and its gradient is reduce-scattered. No rank ever holds the
whole model: it is made on the meta device, filled tensor by tensor, saved shard by shard, resumed
on any number of ranks, and exported as it was filled. --memory-mb gives each rank a memory of fixed
size, so that this can be seen.

Run:
    python chapter04-fsdp/code/train_fsdp.py
    torchrun --nproc_per_node=4 chapter04-fsdp/code/train_fsdp.py --memory-mb 120
    torchrun --nproc_per_node=2 chapter04-fsdp/code/train_fsdp.py --checkpoint-dir build/sharded
    torchrun --nproc_per_node=2 chapter04-fsdp/code/train_fsdp.py --shard hybrid --replicas 2
    sbatch chapter04-fsdp/configs/train_fsdp.sbatch

You should see: the same losses as one process has (--prove), the held-out loss far below the
entropy of the token frequencies, a K-th of the state on each rank, to the byte, and, with --export,
that transformers computes from the folder what the sharded model computes.
"""

import contextlib
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

from distlab import data, hardware, runtime, script
from distlab.hf_format import as_transformers_tokenizer
from distlab.model import Llama, config_from_args
from distlab.model_config import ModelConfig, config_to_json
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.training.flags import add_training_flags, refuse, refuse_for, take_shape
from distlab.training.held_out import DTYPES, HeldOut
from distlab.training.memory import DeviceMemory, device_memory
from distlab.training.outcome import (
    compare_with_transformers,
    export_window,
    peak_of_all,
    report_losses,
    report_speed,
)
from distlab.training.progress import Progress, StopRequest, warmup_cosine
from fsdp.contents import stream_model
from fsdp.disk import OnDisk, put_on_disk
from fsdp.plan import advice, refuse_small_memory
from fsdp.training import (
    Saver,
    add_sharding_flags,
    kinds_of,
    materialise,
    new_mesh,
    new_optimizer,
    recompute,
    refuse_sharding,
    rehearse,
    report_shards,
    say_what_runs,
    units_of,
)

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": None, "corpus_mb": 1.0, "seq_len": 32, "batch_size": 8, "steps": 150,
              "learning_rate": 1e-2, "eval_every": 50, "eval_windows": 64},
    "laptop": {"model": None, "corpus_mb": 2.0, "seq_len": 128, "batch_size": 8, "steps": 200,
               "learning_rate": 6e-3, "eval_every": 100, "eval_windows": 64},
    "gpu": {"model": "gpu", "seq_len": 1024, "batch_size": 32, "steps": 300,
            "learning_rate": 6e-4, "dtype": "bfloat16", "eval_every": 100, "eval_windows": 256},
}  # fmt: skip
SHAPES = {
    "smoke": {"vocab_size": 320},
    "laptop": {"vocab_size": 1024, "hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2},
}
PEAK_LIMIT_S = {"smoke": 0.05, "laptop": 0.5, "gpu": 0.5}  # of measuring one size of product
SAME_LOSS = 1e-5  # nats: float32 sums in another order, carried through the proof's steps


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        StopRequest() as stop,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        train_and_report(run, args, job, stop)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_training_flags(parser)
    add_sharding_flags(parser)
    args = parser.parse_args(argv)
    if args.model is None:
        take_shape(args, args.preset, SHAPES[args.preset])
    refuse(args)
    return args


def train_and_report(run: Run, args: Namespace, job: Runtime, stop: StopRequest) -> None:
    config = config_from_args(args)
    refuse_for(args, job)
    refuse_sharding(args, config, job)
    refuse_small_memory(args, config)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it; no change on a CPU
    tokens = data.prepare_from_args(args, config.vocab_size, workers=hardware.machine().cores)
    say_what_runs(run, args, job, config)
    # What the bound does not count is there before: transformers alone is larger than some bounds.
    tokenizer = None
    if args.export and job.is_main:
        tokenizer = as_transformers_tokenizer(tokens.tokenizer)
    logits = progress = None
    mesh = new_mesh(args, job)  # and process groups: their threads' stacks are no tensors
    with (
        Saver(run, args, job, config) as saver,
        device_memory(job, args.memory_mb, lambda: rehearse(mesh)) as memory,
        Trainer(args, config, job, tokens, memory, mesh) as trainer,
    ):
        progress = train(run, args, job, trainer, saver, stop)
        if progress is not None and args.export:
            memory.phase = "the export"
            stream_model(trainer.model, args.export, config_to_json(config), tokenizer, job)
            with torch.no_grad():  # all ranks together
                logits = trainer.model(export_window(tokens).to(job.device)).float().cpu()
    if progress is None:
        return
    if args.prove:
        prove(run, args, config, job, tokens, progress)
    if logits is not None and job.is_main:
        compare_with_transformers(run, args.export, tokens, logits)
    run.print(
        f"verdict: held-out loss {progress.last_held_out:.3f} nats, "
        f"perplexity {math.exp(progress.last_held_out):.1f}"
    )


def train(
    run: Run, args: Namespace, job: Runtime, trainer: "Trainer", saver: Saver, stop: StopRequest
) -> Progress | None:
    """Train up to step --steps and report; None where the run was asked to stop before."""
    memory, model = trainer.memory, trainer.model
    held_out = HeldOut(
        trainer.tokens.validation, job, windows=args.eval_windows, seq_len=args.seq_len,
        batch_size=args.batch_size,
    )  # fmt: skip
    memory.phase = "resuming"
    first_step = saver.resume(trainer)
    progress = Progress(run, job, args.steps, args.batch_size * args.seq_len, first_step)
    for step in progress.steps():
        loss = trainer.step(step)
        if progress.share(step, loss, stop.is_asked):
            saver.save_and_stop(step + 1, trainer)
            return None
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            memory.phase = "the checkpoint"
            saver.save(step + 1, trainer)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            memory.phase = "the evaluation"
            progress.tell(step + 1, held_out.loss(model))
    if not progress.held_out:  # no step was left to do
        progress.tell(args.steps, held_out.loss(model))
    report_training(run, args, job, trainer, progress, held_out)
    return progress


class Trainer:
    """This rank's shards of the model and the optimizer, and its batches.

    Without a mesh it is the one process of the proof, which holds the whole model.
    """

    def __init__(
        self, args: Namespace, config: ModelConfig, job: Runtime, tokens: data.Tokens,
        memory: DeviceMemory, mesh: DeviceMesh | None,
    ) -> None:  # fmt: skip
        self.args, self.tokens, self.memory = args, tokens, memory
        memory.phase = "making the shards"
        with torch.device("meta"):  # shapes and no memory
            self.model = Llama(config)
        recompute(self.model, args.activation_checkpointing)
        if mesh is not None:
            shard(args, self.model, mesh)
        on_disk = mesh is not None and args.offload == "disk"
        if not on_disk:
            self.model.to_empty(device="cpu" if args.offload == "cpu" else job.device)
            self.model.tie_weights()
        self.optimizer = new_optimizer(args, self.model)  # of the shards: after sharding
        self.disk: OnDisk | None = None
        if on_disk:
            flag = "--offload-dir"
            self.disk = put_on_disk(self.model, self.optimizer, args.offload_dir, flag=flag)
        materialise(self.model, args.model, args.seed, job.device)
        told = "" if args.memory_mb is None else advice(args, config, job)
        memory.watch(told, **kinds_of(self.model, self.optimizer))
        self.batches = data.Loader(
            tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed, job.device,
            prefetch=2 if job.device.type == "cuda" else 0,
        )  # fmt: skip

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.batches.close()
        if self.disk is not None:
            self.disk.__exit__(*exception)

    def step(self, step: int) -> Tensor:
        """One optimizer step on the next global batch; this rank's mean loss, not waited for."""
        losses = []
        for (inputs, targets), is_last in self.micro_batches():
            if isinstance(self.model, FSDPModule):  # else whole gradients stay, and add up
                self.model.set_requires_gradient_sync(is_last or self.args.reduce_every_micro_batch)
            self.memory.phase = "the forward pass"
            loss = self.model(inputs, targets=targets) / self.args.accumulate
            self.memory.phase = "the backward pass"
            loss.backward()
            losses.append(loss.detach())
        self.memory.phase = "the optimizer's step"
        # The norm of the shards is summed up over the ranks: none knows it from its own.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * warmup_cosine(
                step, self.args.steps, self.args.warmup
            )
        (self.disk or self.optimizer).step()
        self.optimizer.zero_grad()
        return torch.stack(losses).sum()

    def micro_batches(self) -> Iterator[tuple[tuple[Tensor, Tensor], bool]]:
        """The rank's share of the next global batch in equal pieces, and which is the last."""
        inputs, targets = next(self.batches)  # [batch / ranks, seq] each
        count = self.args.accumulate
        pieces = zip(inputs.chunk(count), targets.chunk(count), strict=True)
        for number, piece in enumerate(pieces, start=1):
            yield piece, number == count


def shard(args: Namespace, model: Llama, mesh: DeviceMesh) -> None:
    """Each unit's parameters are gathered together; the root is what no unit has, and stays."""
    how: dict[str, Any] = {"mesh": mesh}
    if args.dtype != "float32":  # gathered and computed narrow; shards and sums stay float32
        how["mp_policy"] = MixedPrecisionPolicy(DTYPES[args.dtype], reduce_dtype=torch.float32)
    if args.offload == "cpu":
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for unit in units_of(model, args.units):
        if args.compile:
            for block in unit:
                block.compile()
        fully_shard(unit, reshard_after_forward=args.shard != "grad", **how)
    fully_shard(model, reshard_after_forward=False, **how)


def report_training(
    run: Run, args: Namespace, job: Runtime, trainer: Trainer, progress: Progress, held_out: HeldOut
) -> None:
    """What became of the run, and what each rank held of it."""
    report_shards(run, args, job, trainer.model, trainer.memory)
    peak = peak_of_all(job, args.dtype, PEAK_LIMIT_S[args.preset])
    if job.is_main:
        report_losses(run, progress, held_out, trainer.model, trainer.tokens)
        report_speed(run, trainer.model, args.seq_len, progress, peak)
        run.check_equal("every held-out window counts once", held_out.counted, held_out.count)


def prove(
    run: Run, args: Namespace, config: ModelConfig, job: Runtime, tokens: data.Tokens,
    progress: Progress,
) -> None:  # fmt: skip
    """Compare the first losses with those of one process, which rank 0 is now, without a bound."""
    if progress.first_step > 0:
        run.print("proof: left out, since this run was resumed and has no first steps")
        return
    steps = min(args.prove, args.steps)
    with contextlib.ExitStack() as stack:
        if job.is_main:
            alone = Namespace(**{**vars(args), "memory_mb": None})
            trainer = stack.enter_context(
                Trainer(alone, config, replace(job, world_size=1), tokens, DeviceMemory(job, None),
                        mesh=None)
            )  # fmt: skip
            losses = [trainer.step(step).item() for step in range(steps)]
            worst = max(abs(a - b) for a, b in zip(losses, progress.losses(), strict=False))
            run.check_below("first losses differ from one process's by", worst, SAME_LOSS, "nats")
    job.barrier()


if __name__ == "__main__":
    script.exit(main)
