"""The sharded training is one process's in every mode; it goes on with any ranks; it refuses."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train_fsdp
from distlab import data, script
from distlab.errors import RunError, UsageError
from distlab.files import repo_root
from distlab.model import Llama, config_from_args, load
from distlab.ranks import digest
from distlab.spawning import spawn
from distlab.training.memory import DeviceMemory
from distlab.training.progress import StopRequest
from fsdp.contents import named_shards
from fsdp.plan import refuse_small_memory
from fsdp.training import new_mesh, refuse_sharding

SHORT = ["--preset", "smoke", "--device", "cpu", "--steps", "3", "--eval-every", "2"]
# Seven windows do not divide by the ranks; 3 layers give units of 1 and 2; the gradient is clipped.
SHORT += ["--eval-windows", "7", "--clip", "0.2", "--layers", "3", "--vocab-size", "300"]

LIMIT_S = 280
MODES = [
    [],
    ["--shard", "grad", "--units", "2", "--accumulate", "2"],
    ["--shard", "hybrid", "--replicas", "2", "--activation-checkpointing", "full"],
    ["--shard", "none", "--offload", "cpu"],
    ["--accumulate", "2", "--reduce-every-micro-batch", "--units", "1"],
    ["--activation-checkpointing", "selective"],
    ["--offload", "disk"],
]
NARROW = ["--dtype", "bfloat16"]


def trained(job, flags, tokens, alone=False):
    """Losses of 3 steps, the mean of the ranks; and whether the beginning was one process's."""
    args = train_fsdp.parse_args([*SHORT, *flags])
    config = config_from_args(args)
    mesh = None if alone else new_mesh(args, job)
    job = replace(job, world_size=1) if alone else job
    with train_fsdp.Trainer(args, config, job, tokens, DeviceMemory(job, None), mesh) as trainer:
        shards = named_shards(trainer.model)
        whole = [p.detach() if alone else p.detach().full_tensor() for p in shards.values()]
        torch.manual_seed(args.seed)
        same = digest(whole) == digest(Llama(config).parameters())
        losses = torch.stack([trainer.step(step) for step in range(3)])
    if not alone:
        dist.all_reduce(losses)
    return (losses / job.world_size).tolist(), same


def every_mode(job, folder):
    os.chdir(folder)
    tokens = data.prepare_from_args(train_fsdp.parse_args(SHORT), 300)
    found = [trained(job, flags, tokens) for flags in [*MODES, NARROW]]
    return trained(job, [], tokens, alone=True), found


def test_every_mode_begins_and_trains_as_one_process(tmp_path):
    (alone, begun), found = spawn(every_mode, 4, tmp_path, timeout_s=LIMIT_S)[0]
    assert begun
    for flags, (losses, same) in zip(MODES, found, strict=False):
        assert same, f"{flags}: other weights at the beginning"
        assert losses == pytest.approx(alone, abs=1e-5), flags
    # bfloat16 keeps 8 bits of each product, 2^-9 of it: of a loss of 6 nats some 0.01
    assert found[-1][0] == pytest.approx(alone, abs=2e-2)


def run_script(job, flags, stop_on_rank=None):
    """The whole script; a rank may be asked to stop in its 2nd step."""
    args = train_fsdp.parse_args([*SHORT, *flags])
    said = []
    with script.run(args) as run, StopRequest() as stop:
        if job.rank == stop_on_rank:
            step = train_fsdp.Trainer.step

            def asked(self, number):
                os.kill(os.getpid(), signal.SIGUSR1)
                return step(self, number)

            train_fsdp.Trainer.step = asked
        run.print = said.append
        train_fsdp.train_and_report(run, args, job, stop)
    failed = [check.name for check in run.checks if not check.ok]
    return SimpleNamespace(failed=failed, said=said, metrics=run.metrics)


def test_stopped_on_two_ranks_it_goes_on_with_three_and_is_exported(tmp_path):
    """The whole run's held-out loss is that of an undisturbed one."""
    kept = ["--checkpoint-dir", str(tmp_path / "kept"), "--batch-size", "6"]
    spawn(run_script, 2, kept, 1, timeout_s=LIMIT_S)
    assert [path.name for path in (tmp_path / "kept").glob("step_*")] == ["step_00000002"]
    exported = ["--export", str(tmp_path / "model")]
    ranks = spawn(run_script, 3, [*kept, *exported], timeout_s=LIMIT_S)
    assert not ranks[0].failed and not ranks[1].failed
    resumed = [line for line in ranks[0].said if "resumed from" in line]
    assert resumed[0].endswith("step_00000002, written by 2 rank(s)")
    [undisturbed] = spawn(run_script, 1, ["--batch-size", "6", "--prove", "2"], timeout_s=LIMIT_S)
    assert not undisturbed.failed
    losses = [one.metrics["held_out_loss"]["value"] for one in (ranks[0], undisturbed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert load(tmp_path / "model").config.vocab_size == 300


def job(ranks, on_node=None):
    return SimpleNamespace(world_size=ranks, local_world_size=on_node or ranks)


def refused(flags, ranks=4, on_node=None):
    args = train_fsdp.parse_args([*SHORT, *flags])
    with pytest.raises(UsageError) as caught:
        refuse_sharding(args, config_from_args(args), job(ranks, on_node))
        refuse_small_memory(args, config_from_args(args))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_is_refused_in_one_line():
    hybrid = ["--shard", "hybrid"]
    assert refused([*hybrid, "--replicas", "3"]) == (
        "--replicas 3 does not divide 4 rank(s); use --replicas 2, 4"
    )
    assert refused(hybrid) == (
        "--shard hybrid on one node is full, without --replicas; use --replicas 2, 4"
    )
    assert refused([*hybrid, "--replicas", "2"], 1) == (
        "--replicas 2 does not divide 1 rank(s); use --shard full"
    )
    assert refused(["--replicas", "2"]) == "--replicas 2 is for --shard hybrid, not full"
    assert refused(["--units", "4"]) == "--units 4 is neither block nor a number from 1 to 3"
    assert refused(["--dtype", "float16"]).startswith("--dtype float16 needs a loss scale")
    assert refused(["--memory-mb", "0.3", "--units", "1"]) == (
        "--memory-mb 0.3 is too small for one unit: a unit of blocks is whole while it computes, "
        "as is its gradient, together 1.11 MB; use --memory-mb 2 or more, or more --units"
    )


def with_little_memory(job, flags):
    """The line of each rank that has too little."""
    try:
        return run_script(job, flags).failed
    except RunError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT_S)
def test_a_model_larger_than_a_rank_s_memory_is_trained_saved_resumed_and_exported(tmp_path):
    """74 MB of weights and ranks of 66 MB: 2 train it, with their state on disk, and 3 go on."""
    large = ["--hidden-size", "384", "--layers", "11", "--memory-mb", "66", "--seq-len", "8"]
    large += [
        "--batch-size",
        "6",
        "--eval-windows",
        "3",
        "--checkpoint-dir",
        str(tmp_path / "kept"),
    ]
    large += ["--offload", "disk", "--offload-dir", str(tmp_path / "offload")]
    first = spawn(run_script, 2, [*large, "--steps", "1"], timeout_s=LIMIT_S)[0]
    assert not first.failed
    exported = ["--steps", "2", "--export", str(tmp_path / "model")]
    ranks = spawn(run_script, 3, [*large, *exported], timeout_s=LIMIT_S)
    assert not ranks[0].failed
    assert any(line.endswith("step_00000001, written by 2 rank(s)") for line in ranks[0].said)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 73e6


@pytest.mark.slow
def test_what_does_not_fit_says_so_and_what_would():
    """A replica of this model needs 4 times its 26 MB of weights."""
    wide = ["--hidden-size", "512", "--layers", "2", "--memory-mb", "72", "--batch-size", "4"]
    wide += ["--seq-len", "8", "--steps", "1", "--shard", "none"]
    [told] = spawn(with_little_memory, 1, wide, timeout_s=LIMIT_S)
    assert told.startswith("rank 0: its 72.0 MB are used up in the "), told
    assert "weights 2" in told and "; the plan had predicted 1" in told
    assert "would fit (" in told and "\n" not in told


def test_the_sbatch_file_is_chapter_3_s():
    """Which is tested on a real Slurm: the comments on the folder of checkpoints are its own."""
    texts = []
    for chapter, name in (("chapter03-ddp", "train_ddp"), ("chapter04-fsdp", "train_fsdp")):
        text = (repo_root() / chapter / "configs" / f"{name}.sbatch").read_text()
        lines = text.replace(chapter, "CHAPTER").replace(name, "NAME").splitlines()
        texts.append([line for line in lines if not line.startswith("# ")])
    texts[1] = [line.replace("train-fsdp", "train-ddp") for line in texts[1]]
    assert texts[0] == texts[1]
