"""Resuming: the same bits at any step, on any ranks; all ranks from one checkpoint; or one line."""

from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import checkpoint_resume
from ddp import training_state
from ddp.checkpoints import Checkpoints
from ddp.resuming import Trainee, differing
from distlab import data, runtime, script
from distlab.errors import RunError, UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu"]


@contextmanager
def alone():
    """A job of this process only, its arguments, and its tokens."""
    args = checkpoint_resume.parse_args([*SMOKE, "--steps", "6"])
    with runtime.distributed("gloo", device="cpu") as job:
        yield args, job, data.prepare_from_args(args, 512)


def test_the_same_bits_from_every_step(tmp_path):
    with alone() as setting, Checkpoints(tmp_path, keep=9) as store:
        steps = setting[0].steps
        undisturbed = Trainee(*setting, seed=0)
        losses = []
        for step in range(steps):
            store.save(step, undisturbed.state())
            losses += undisturbed.train(1).tolist()
        store.wait()
        for step in range(steps):
            resumed = Trainee(*setting, seed=5)
            resumed.restore(store.load(store.path(step)).state)
            assert resumed.train(steps - step).tolist() == losses[step:]
            assert differing(undisturbed.state(), resumed.state())[0] == []


@pytest.mark.slow
def test_the_script_holds_on_four_ranks():
    """More than two ranks are another case: a sum of three floats depends on its order."""
    for checks in spawn(run_the_script, 4, timeout_s=200):
        assert [check.name for check in checks if not check.ok] == []


def run_the_script(job):
    args = checkpoint_resume.parse_args([*SMOKE, "--steps", "5", "--stop-after", "2"])
    with script.run(args) as run, checkpoint_resume.shared_folder(args, job) as folder:
        checkpoint_resume.demonstrate(run, args, job, data.prepare_from_args(args, 512), folder)
    return run.checks


def train_one_more(job, folder, resume):
    """Train from the newest checkpoint, or from the beginning, and save; what the rank then has."""
    args = checkpoint_resume.parse_args(SMOKE)
    trainee = Trainee(args, job, data.prepare_from_args(args, 512), seed=3 + resume)
    store = Checkpoints(folder)
    if resume:
        loaded = training_state.load_agreed(store, job)
        trainee.restore(loaded.state)
        before, now = ({k: v for k, v in state.items() if k not in ("random", "world_size")}
                       for state in (loaded.state, trainee.state()))  # fmt: skip
        wrong, _ = differing(before, now)
        random = [state["torch"] for state in loaded.state["random"]]
        return loaded.step, loaded.state["world_size"], wrong, random
    trainee.train(2)
    state = trainee.state()
    if job.is_main:
        store.save(2, state)
        store.close()
    return state["random"][job.rank]["torch"]


def test_another_world_size_has_all_but_the_random_states(tmp_path):
    own = spawn(train_one_more, 2, tmp_path, False, timeout_s=60)
    assert not torch.equal(*own)  # each rank draws its own numbers, and both are saved
    for ranks in (1, 2):
        for *found, random in spawn(train_one_more, ranks, tmp_path, True, timeout_s=60):
            assert found == [2, 2, []] and all(map(torch.equal, random, own))


def agree(job, cases):
    """What this rank loads from its own folder of each pair, or the line that it fails with."""
    found = []
    for folders in cases:
        said = []
        store = Checkpoints(folders[job.rank], report=said.append)
        try:
            loaded = training_state.load_agreed(store, job)
            found.append((loaded and loaded.step, *said))
        except (RunError, UsageError) as error:
            found.append((f"{type(error).__name__}: {error}", *said))
    return found


def test_all_ranks_resume_from_the_same_or_none_does(tmp_path):
    [none, good, bad, worse] = [tmp_path / name for name in ("none", "good", "bad", "worse")]
    for folder in (good, bad, worse):
        with Checkpoints(folder, asynchronous=False) as store:
            for step in (1, 2):
                store.save(step, {"weights": torch.zeros(3)})
    (bad / "step_00000002" / "manifest.json").unlink()
    (worse / "step_00000002" / "manifest.json").unlink()
    (worse / "step_00000001" / "state.json").unlink()
    cases = [(none, none), (bad, good), (good, bad), (good, none), (worse, good)]
    first, second = spawn(agree, 2, cases, timeout_s=60)
    assert first[0] == second[0] == (None,)
    passed_over = "damaged checkpoint passed over: step_00000002: manifest.json is missing"
    assert first[1] == (1, passed_over) and second[1] == (1,)
    assert first[2][0].startswith("RunError: 1 rank(s) cannot read the checkpoint; is the folder")
    assert second[2][0].endswith("step_00000002 is damaged: manifest.json is missing")
    assert second[3][0].startswith("RunError: rank 1 does not see ")
    assert first[4][0].startswith("RunError: no checkpoint in ")
    assert second[4][0].startswith("RunError: rank 0 found no whole checkpoint in ")


def changed(args, **changes):
    return Namespace(**{**vars(args), **changes})


def test_resuming_with_another_run_s_state_is_refused_and_changes_nothing():
    with alone() as (args, job, tokens):
        saved = Trainee(args, job, tokens, 0)
        saved.train(2)
        state = saved.state()
        wider = Trainee(changed(args, hidden_size=32), job, tokens, 0)
        other = Trainee(args, job, replace(tokens, fingerprint="another"), 0)
        sgd = Trainee(args, job, tokens, 0)
        sgd._parts = (sgd.ddp, torch.optim.SGD(sgd.model.parameters(), 0.1), *sgd._parts[2:])
        unscheduled = Trainee(args, job, tokens, 0)
        unscheduled._parts = (*unscheduled._parts[:3], None, unscheduled.scaler)
        for trainee, said in [
            (wider, r"another model: model.embed_tokens.weight is float32 \[512, 64\] in it and "
                    r"float32 \[512, 32\] here; use the model flags"),
            (other, "trained on other data; use the --corpus"),
            (sgd, "the checkpoint's optimizer is AdamW, not SGD; use AdamW"),
            (unscheduled, "only one of the checkpoint and this run has a learning-rate schedule"),
        ]:  # fmt: skip
            before = [parameter.clone() for parameter in trainee.model.parameters()]
            with pytest.raises(UsageError, match=said):
                trainee.restore(state, settle=False)
            assert all(map(torch.equal, before, trainee.model.parameters()))


def test_the_first_parameter_that_differs_is_named():
    def said(saved, own):
        with pytest.raises(UsageError) as caught:
            training_state.check_same_model(saved, own)
        return str(caught.value).partition(": ")[2].partition(";")[0]

    one, half = torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)
    assert said({"a": one}, {"a": one, "b": one}) == "b is missing in it and float32 [2] here"
    assert said({"a": one, "b": one}, {"a": one}) == "b is float32 [2] in it and missing here"
    assert said({"a": half}, {"a": one}) == "a is bfloat16 [2] in it and float32 [2] here"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "8", "--stop-after", "7"], "--stop-after 7 of --steps 8 leaves no two steps"),
        (["--steps", "2"], "--stop-after 1 of --steps 2 leaves no two steps"),
        (["--folder", "nowhere"], "--folder nowhere is no folder; name one that all ranks share"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, capsys):
    assert script.status_of(lambda: checkpoint_resume.main([*SMOKE, *flags])) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_part_that_is_forgotten_is_noticed(monkeypatch):
    """The script's own checks, when `collect` or `restore` would lose something."""
    monkeypatch.setattr(training_state, "set_random_states", lambda *_: None)
    with alone() as (args, job, tokens):
        args.stop_after = 2
        with (
            script.run(args) as run,
            checkpoint_resume.shared_folder(args, job) as folder,
        ):
            checkpoint_resume.demonstrate(run, args, job, tokens, folder)
    failed = [check.name for check in run.checks if not check.ok]
    assert "losses after resuming: largest difference" in failed
    assert any(name.startswith("those that differ by a bit, ") for name in failed)
