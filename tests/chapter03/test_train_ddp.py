"""The training script is the same run on any number of ranks, interrupted or not."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import train_ddp
from distlab import script
from distlab.files import repo_root
from distlab.model import load
from distlab.spawning import spawn
from distlab.training.progress import StopRequest

SCRIPT = repo_root() / "chapter03-ddp" / "code" / "train_ddp.py"
SHORT = ["--preset", "smoke", "--device", "cpu", "--steps", "9", "--eval-every", "4"]
# Seven windows do not divide by two ranks, and the norm of the gradient is above the limit.
SHORT += ["--eval-windows", "7", "--clip", "0.2", "--checkpoint-every", "100"]
LEARNING_RATE = 1e-2  # of the preset

LIMIT_S = 120


@pytest.fixture(scope="module")
def alone():
    """The undisturbed run of one process."""
    return spawn(train, 1, SHORT, timeout_s=LIMIT_S)[0]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_ranks_equal_one_process(alone, micro_batches):
    flags = [*SHORT, "--accumulate", str(micro_batches)]
    both = spawn(train, 2, flags, timeout_s=LIMIT_S)
    before_the_first_step, *synchronised = both[0].synchronised
    assert synchronised == ([False] * (micro_batches - 1) + [True]) * 9
    assert not both[0].failed
    assert both[0].losses == pytest.approx(alone.losses, abs=1e-5)
    assert both[0].held_out == pytest.approx(alone.held_out, abs=1e-5)
    # AdamW divides by the root of the second moment: it makes a step of up to the learning rate of
    # whatever a rounding has left of a gradient near 0. So no bound but this holds for each weight,
    # and few are moved so; `test_with_sgd_the_weights_are_equal_too` compares all of them.
    apart = torch.cat([(both[1].weights[n] - v).abs().flatten() for n, v in alone.weights.items()])
    assert apart.max() <= 2 * 9 * LEARNING_RATE
    assert (apart > 1e-4).double().mean() < 1e-3


def test_with_sgd_the_weights_are_equal_too():
    """SGD's step is linear in the gradient, so it does not enlarge a rounding.

    In nine steps of at most half the clipped norm the weights go 9 * 0.5 * 0.2 at most. The sums
    over 256 tokens round by 256 * 2^-24 of that, 1.4e-5, if they do it always to one side.
    """
    flags = [*SHORT, "--learning-rate", "0.5"]
    alone = spawn(train_with_sgd, 1, flags, timeout_s=LIMIT_S)[0]
    both = spawn(train_with_sgd, 2, [*flags, "--accumulate", "2"], timeout_s=LIMIT_S)
    assert both[0].losses == pytest.approx(alone.losses, abs=1e-5)
    for name, value in alone.weights.items():
        torch.testing.assert_close(both[1].weights[name], value, rtol=0, atol=1.4e-5)


def test_asked_on_one_rank_all_stop_and_one_process_goes_on_with_the_same_data(alone, tmp_path):
    flags = [*SHORT, "--checkpoint-dir", str(tmp_path)]
    spawn(train, 2, flags, 1, 4, timeout_s=LIMIT_S)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000006"]
    rest = spawn(train, 1, flags, timeout_s=LIMIT_S)[0]
    assert rest.losses == pytest.approx(alone.losses[6:], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"), [(4, ["--hidden-size", "128"]), (2, ["--dtype", "float16"])]
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path, ranks, flags):
    """With four ranks the order of DDP's buckets is in the sums' last bits."""
    whole = spawn(train, ranks, [*SHORT, *flags], timeout_s=LIMIT_S)[0]
    flags = [*SHORT, *flags, "--checkpoint-dir", str(tmp_path)]
    spawn(train, ranks, flags, 0, 3, timeout_s=LIMIT_S)
    rest = spawn(train, ranks, flags, timeout_s=LIMIT_S)[0]
    assert rest.losses == whole.losses[5:]
    assert all(torch.equal(rest.weights[name], value) for name, value in whole.weights.items())


@pytest.mark.slow
def test_float16_with_its_scaler_learns_what_float32_learns(alone):
    narrow = spawn(train, 1, [*SHORT, "--dtype", "float16"], timeout_s=LIMIT_S)[0]
    assert narrow.losses == pytest.approx(alone.losses, abs=0.02)


def test_what_cannot_be_resumed_is_told_in_one_line(tmp_path, capsys):
    kept = [*SHORT, "--checkpoint-dir", str(tmp_path)]
    runs = [["--steps", "2"], ["--hidden-size", "32"], ["--steps", "1"]]
    trained, other_model, fewer_steps = spawn(
        refusals, 1, [[*kept, *flags] for flags in runs], timeout_s=LIMIT_S
    )[0]
    assert trained is None
    assert other_model.startswith("the checkpoint is of another model: model.embed_tokens.weight ")
    assert fewer_steps.startswith("--steps 1 is less than the 2 of the checkpoint; use --steps 2")
    assert refusal([*kept, "--resume", "none"], capsys).startswith(
        f"error: --resume none: {tmp_path} holds the checkpoints of another run"
    )
    nothing = tmp_path / "step_00000009"
    assert refusal([*SHORT, "--resume", str(nothing)], capsys).startswith(
        f"error: --resume {nothing}: there is no such checkpoint; use auto, none, or a folder"
    )
    corrupt = tmp_path / "step_00000002"
    os.truncate(corrupt / "tensors.safetensors", 1000)
    told = refusal([*SHORT, "--resume", str(corrupt)], capsys, status=1)
    assert told.startswith(
        f"error: the checkpoint {corrupt} is damaged: tensors.safetensors has 10"
    )
    assert told.count("\n") == 1


def test_an_export_to_a_used_folder_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert refusal([*SHORT, "--export", str(tmp_path)], capsys) == (
        f"error: --export {tmp_path} is not empty; name a new folder, or remove it first\n"
    )


def test_without_a_folder_a_stopped_run_says_that_it_is_lost():
    [told] = spawn(refusals, 1, [SHORT], 2, timeout_s=LIMIT_S)[0]
    assert told == "stopped at step 4, and nothing is saved without --checkpoint-dir"


@pytest.mark.slow
def test_torchrun_hands_sigterm_on_and_the_run_is_saved_and_exported_later(tmp_path):
    kept = ["--checkpoint-dir", str(tmp_path / "kept")]
    with torchrun(2, [*SHORT, "--steps", "100000", *kept]) as running:
        for line in running.stdout:
            if line.startswith("step 4: "):
                running.send_signal(signal.SIGTERM)
                break
        told = running.stdout.read()
        running.wait(LIMIT_S)
    assert "preempted: checkpoint at step " in told
    step = int(told.split("preempted: checkpoint at step ")[1].split()[0])
    export = [*SHORT, "--steps", str(step), *kept, "--export", str(tmp_path / "model")]
    with torchrun(1, export) as running:
        told = running.communicate(timeout=LIMIT_S)[0]
    assert "verdict: " in told and "no step was left to do" in told
    assert "check: transformers computes the same logits … ok" in told
    assert load(tmp_path / "model").config.vocab_size == 320


def train(job, argv, stopping_rank=None, stop_at=None):
    """The script's own run on this rank, asked to stop during a step, without what it samples."""
    torch.manual_seed(0)  # as `distributed` does it for every run
    args = train_ddp.parse_args(argv)
    stop, trainers, synchronised = StopRequest(), [], []

    class Interrupted(train_ddp.Trainer):
        def step(self, step):
            stop.is_asked |= step == stop_at and job.rank == stopping_rank
            return super().step(step)

        def loss(self, *batch):
            synchronised.append(self.ddp.require_backward_grad_sync)
            return super().loss(*batch)

        def __exit__(self, *exception):
            trainers.append(self)
            super().__exit__(*exception)

    with (
        script.run(args) as run,
        mock.patch.object(train_ddp, "report_sample"),
        mock.patch.object(train_ddp, "peak_of_all", return_value=None),
        mock.patch.object(train_ddp, "Trainer", Interrupted),
    ):
        train_ddp.train_and_report(run, args, job, stop)
    figures = {s["label"]: s["y"] for f in run.figures.values() for s in f["series"]}
    return SimpleNamespace(
        failed=[check.name for check in run.checks if not check.ok],
        losses=figures.get("training"),
        held_out=figures.get("held-out"),
        synchronised=synchronised,
        weights={
            name: value.detach().clone() for name, value in trainers[0].model.state_dict().items()
        },
    )


def train_with_sgd(job, argv):
    def sgd(args, model):
        return torch.optim.SGD(model.parameters(), lr=args.learning_rate)

    with mock.patch.object(train_ddp, "new_optimizer", sgd):
        return train(job, argv)


def refusals(job, runs, stop_at=None):
    """What the script says when it does not get to its end, for each run's flags."""
    told = []
    for argv in runs:
        try:
            train(job, argv, 0, stop_at)
            told.append(None)
        except (script.UsageError, script.RunError) as error:
            told.append(str(error))
    return told


def refusal(argv, capsys, status=2):
    """What the script prints on its standard error, ending with `status`."""
    capsys.readouterr()
    assert script.status_of(lambda: train_ddp.main(argv)) == status
    return capsys.readouterr().err


def torchrun(ranks, flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, f"--master_port={port}", str(SCRIPT), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
