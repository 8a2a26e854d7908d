"""Checkpoints: exact, never half there, checked when read, and no run is lost with one of them."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from grader_disk import save_until_cut
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint_writer import (
    is_state_of,
    killed_at_random_moments,
    killed_before_each_system_call,
    left_over,
    state_of,
)
from ddp import checkpoints
from ddp.checkpoints import Checkpoints
from ddp.resuming import full_disk
from distlab import checkpoint_files
from distlab.errors import RunError, UsageError
from distlab.spawning import fork_context

write_files = checkpoints.write_files

VALUES = st.recursive(
    st.none() | st.booleans() | st.text() | st.floats() | st.integers(-(2**200), 2**200),
    lambda inner: st.lists(inner) | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner),
    max_leaves=20,
)  # fmt: skip


@pytest.fixture
def said():
    return []


@pytest.fixture
def store(tmp_path, said):
    """Synchronous: what a save has done is there when it returns."""
    with Checkpoints(tmp_path / "kept", keep=3, asynchronous=False, report=said.append) as made:
        yield made


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_numbers_strings_and_what_holds_them_come_back_exactly(state):
    tree, tensors = checkpoint_files.encode(state)
    back = checkpoint_files.decode(json.loads(json.dumps(tree, allow_nan=False)), tensors)
    assert repr(back) == repr(state)  # tells -0.0 from 0.0, True from 1, a tuple from a list


def test_tensors_of_every_dtype_and_shape_come_back_exactly(store):
    bits = torch.randint(0, 256, (48,), dtype=torch.uint8)
    state = {str(dtype): bits.bool() if dtype == torch.bool else bits.view(dtype)
             for dtype in checkpoint_files.DTYPES}  # fmt: skip
    state |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "t": torch.rand(3, 4).T}
    store.save(7, state)
    back = store.load_newest().state
    for name, tensor in state.items():
        same = back[name].contiguous().reshape(-1), tensor.contiguous().reshape(-1)
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(*(flat.view(torch.uint8) for flat in same)), name
    assert load_file(store.path(7) / "tensors.safetensors").keys() == state.keys()


def test_tied_tensors_are_stored_once_and_stay_tied(store):
    weight = torch.rand(1000)
    store.save(1, {"a": weight, "b": weight, "part": weight[:10], "c": {"1": 1, 1: weight + 1}})
    back = store.load_newest().state
    assert back["a"] is back["b"] and torch.equal(back["part"], weight[:10])
    size = sum(file.stat().st_size for file in store.path(1).iterdir())
    assert 2 * weight.nbytes < size < 3 * weight.nbytes


def test_what_has_no_place_in_a_checkpoint_is_named(store):
    with pytest.raises(TypeError, match=r"^model.hooks is a set; a checkpoint holds tensors"):
        store.save(1, {"model": {"hooks": {1}}})
    with pytest.raises(TypeError, match=r"^x: a checkpoint has no place for torch.complex128"):
        store.save(1, {"x": torch.zeros(1, dtype=torch.complex128)})


def test_an_asynchronous_save_is_of_the_state_as_it_was(tmp_path):
    state = state_of(1, 1_000_000)
    with Checkpoints(tmp_path, keep=9) as store:
        for step in range(1, 5):  # the same buffers are used again
            state |= {"step": step}
            state["weights"].fill_(step)
            assert store.save(step, state)
        state["weights"].fill_(-1.0)
    assert all(is_state_of(store.load(store.path(step))) for step in range(1, 5))


def test_the_newest_are_kept_and_the_others_go_last(store, monkeypatch):
    for step in (1, 2, 3, 10):
        store.save(step, state_of(step))
    assert store.steps() == [2, 3, 10]
    monkeypatch.setattr(checkpoints, "write_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save(11, state_of(11))
    assert store.steps() == [2, 3, 10] and not left_over(store)


def test_a_run_set_back_keeps_the_later_checkpoints_and_says_so(store, said):
    for step in (7, 8, 9, 5, 6):
        store.save(step, state_of(step))
    assert store.steps() == [5, 6, 7, 8, 9]
    assert said[-1] == f"checkpoint of step 6 saved, yet {store.path(9)} is newer"


def test_a_step_saved_again_replaces_the_one_before(store):
    store.save(4, state_of(3))
    store.save(4, state_of(4))
    assert is_state_of(store.load_newest()) and not left_over(store)


def damaged_copies(folder):
    """The checkpoint with each byte of it changed in turn, each file cut in turn, and each gone."""
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            yield f"{file.name} at {place}"
        for length in range(0, len(content), 37):
            file.write_bytes(content[:length])
            yield f"{file.name} cut to {length}"
        file.unlink()
        yield f"no {file.name}"
        file.write_bytes(content)


def test_whatever_byte_is_changed_it_is_noticed(store):
    state = {"weights": torch.arange(20.0), "name": "a"}
    store.save(120, state)
    for damage in damaged_copies(store.path(120)):
        try:
            loaded = store.load(store.path(120))
        except RunError as error:
            assert "step_00000120 is damaged: " in str(error) and "\n" not in str(error), damage
        else:  # a blank of the manifest that became another blank
            assert "manifest" in damage and repr(loaded.state) == repr(state), damage


def test_the_newest_that_is_whole_is_used_and_the_others_are_named(store, said):
    assert store.load_newest() is None
    for step in (1, 2, 3):
        store.save(step, state_of(step))
    size = (store.path(3) / "tensors.safetensors").stat().st_size
    os.truncate(store.path(3) / "tensors.safetensors", 100)
    (store.path(2) / "state.json").unlink()
    assert store.load_newest().step == 1
    assert said == [
        "damaged checkpoint passed over: step_00000003: "
        f"tensors.safetensors has 100 of {size} bytes",
        "damaged checkpoint passed over: step_00000002: state.json is missing",
    ]
    shutil.rmtree(store.path(1))
    shutil.copytree(store.path(3), store.path(1))
    with pytest.raises(RunError, match=r"^no checkpoint in \S+ is whole; the newest, step_0+3: "):
        store.load_newest()


def test_a_checkpoint_under_another_step_s_name_is_damaged(store):
    store.save(1, state_of(1))
    store.path(1).rename(store.path(2))
    with pytest.raises(RunError, match="step_00000002 is damaged: its files are those of step 1"):
        store.load(store.path(2))


def test_what_is_no_checkpoint_is_a_mistake(store, tmp_path):
    for path in (store.path(5), store.folder, tmp_path / "none"):
        with pytest.raises(UsageError, match="is no checkpoint; name a folder such as .*step_"):
            store.load(path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the folder of checkpoints .*file: "):
        Checkpoints(tmp_path / "file")
    with pytest.raises(UsageError, match="--keep 0 would keep no checkpoint; use 1 or more"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_costs_the_checkpoint_not_the_run(tmp_path, said, asynchronous):
    store = Checkpoints(tmp_path, asynchronous=asynchronous, report=said.append)
    store.save(1, state_of(1, 100_000))
    store.wait()
    with full_disk():
        store.save(2, state_of(2, 100_000))
        store.wait()
    assert said == ["checkpoint of step 2 not saved: File too large; the run goes on"]
    assert store.steps() == [1] and not left_over(store)
    store.save(3, state_of(3))
    store.close()
    assert store.steps() == [1, 3] and is_state_of(store.load_newest())


@pytest.mark.parametrize("call", range(5))
def test_no_room_at_any_moment(store, said, monkeypatch, call):
    """Three files, the checkpoint's folder and the one around it are flushed: each may fail."""
    store.save(1, state_of(1))
    calls = iter(range(99))
    fsync = os.fsync

    def fails_once(file):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", fails_once)
    store.save(2, state_of(2))
    assert said == ["checkpoint of step 2 not saved: No space left on device; the run goes on"]
    assert not left_over(store) and is_state_of(store.load_newest())
    store.save(3, state_of(3))
    assert store.load_newest().step == 3 and is_state_of(store.load_newest())


TRY_A_SMALL_DISK = """
import sys
import torch
from ddp.checkpoints import Checkpoints
disk = sys.argv[1]
store = Checkpoints(disk, keep=2, report=lambda line: print(line, flush=True))
for step in range(1, 4):
    store.save(step, {"weights": torch.full((50_000,), float(step))})
    store.wait()
print(store.steps(), [path.name for path in store.folder.glob(".step_*")], flush=True)
import shutil
shutil.rmtree(store.path(1))
store.save(4, {"weights": torch.full((50_000,), 4.0)})
store.close()
print(store.steps(), store.load_newest().step, flush=True)
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=500k none {tmp_path}"
    try:
        allowed = subprocess.run([*own_mounts, mount], capture_output=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("unshare is not installed: a file's size limit stands for it above")
    if allowed.returncode:
        pytest.skip("this kernel lets nobody mount: a file's size limit stands for it above")
    script = f"{mount} && exec \"{sys.executable}\" -c '{TRY_A_SMALL_DISK}' {tmp_path}"
    done = subprocess.run([*own_mounts, script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "checkpoint of step 3 not saved: No space left on device; the run goes on",
        "[1, 2] []",
        "[2, 4] 4",
    ]


def test_a_save_waits_for_the_one_before_or_says_that_it_is_late(tmp_path, said, monkeypatch):
    monkeypatch.setattr(checkpoints, "SAVE_WAITS_S", 0.1)
    go_on = threading.Event()
    monkeypatch.setattr(
        checkpoints, "write_files", lambda *all: (go_on.wait(60), write_files(*all))
    )  # fmt: skip
    store = Checkpoints(tmp_path, report=said.append)
    assert store.save(1, state_of(1))
    assert not store.save(2, state_of(2)) and not store.wait(0.01)
    assert said == [
        "checkpoint of step 2 not saved: the one before is still being written; is the disk slow?"
    ]
    threading.Timer(0.2, go_on.set).start()
    monkeypatch.setattr(checkpoints, "SAVE_WAITS_S", 60.0)
    assert store.save(3, state_of(3)) and store.wait()
    assert store.steps() == [1, 3]


def test_an_error_that_is_no_disk_s_is_raised_by_the_next_call(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoints, "write_files", lambda *_: 1 / 0)
    store.save(1, state_of(1))
    with pytest.raises(ZeroDivisionError):
        store.wait()
    store.close()


def test_reading_while_another_writes_and_deletes(tmp_path, said):
    done = threading.Event()

    def write():
        with Checkpoints(tmp_path, keep=1, asynchronous=False) as writer:
            for step in range(1, 60):
                writer.save(step, state_of(step))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reader, last = Checkpoints(tmp_path, report=said.append), 0
    while not done.is_set():
        loaded = reader.load_newest()
        assert loaded is None or (is_state_of(loaded) and loaded.step >= last)
        last = loaded.step if loaded else 0
    thread.join()
    assert said == [] and reader.load_newest().step == 59


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "times"), [(killed_at_random_moments, 12), (killed_before_each_system_call, 36)]
)
def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path, kill, times):
    # no threads there, so it may fork
    process = fork_context().Process(target=kill, args=(tmp_path, times), daemon=True)
    process.start()
    process.join(200)
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("names_kept", [False, True], ids=["names-lost", "names-kept"])
def test_a_power_cut_at_any_moment_leaves_a_whole_checkpoint(tmp_path, names_kept):
    def save(folder, step, _):
        with Checkpoints(folder, keep=9, asynchronous=False) as store:
            store.save(step, state_of(step))

    folder = tmp_path / "new" / "run"
    for moment in range(99):
        for before in (None, 1):  # the second takes the place of the first
            _, finished = save_until_cut(save, tmp_path, folder, 1, None, moment, names_kept)
            loaded = Checkpoints(folder).load_newest()
            assert is_state_of(loaded) if loaded else not (before or finished), (moment, before)
            save(folder, 1, None)
        shutil.rmtree(folder.parent)
        if finished:
            return
    raise AssertionError("a save has more than 99 operations on the disk")


def test_a_living_writer_s_files_are_not_swept(tmp_path, monkeypatch):
    seen = []

    def interrupted(folder, *rest):
        Checkpoints(tmp_path)
        seen.append(folder.exists())
        write_files(folder, *rest)

    monkeypatch.setattr(checkpoints, "write_files", interrupted)
    Checkpoints(tmp_path, asynchronous=False).save(1, state_of(1))
    assert seen == [True] and Checkpoints(tmp_path).load_newest().step == 1
