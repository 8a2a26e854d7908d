"""Sharded checkpoints: any number of ranks, never half there, checked when read, converted."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ddp.checkpoints import Checkpoints as Replicated
from ddp.training_state import restore
from distlab import model as house
from distlab.checkpoint_files import encode
from distlab.errors import RunError, UsageError
from distlab.model import SIZES, Llama
from distlab.model_config import config_to_json
from distlab.ranks import digest
from distlab.spawning import spawn
from fsdp import contents
from fsdp.checkpoints import Checkpoints

# 3 ranks divide neither 500 words nor 64 dimensions.
CONFIG = replace(SIZES["smoke"], vocab_size=500)
FIELDS = {"loader": {"samples_consumed": 24}, "flags": {"steps": 9}, "world_size": 4,
          "optimizer_class": "AdamW", "config": config_to_json(CONFIG)}  # fmt: skip
LIMIT_S = 200


def sharded(seed=0, config=CONFIG, apart=True):
    torch.manual_seed(seed)
    model = Llama(config)
    if apart:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    groups = [[p for p in model.parameters() if p.dim() == 2],
              [p for p in model.parameters() if p.dim() < 2]]  # fmt: skip
    return model, torch.optim.AdamW([{"params": group} for group in groups], fused=True)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        ids = torch.arange(48).view(2, 24)
        model(ids, targets=ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def sums(model, optimizer):
    """Of each whole tensor, bit for bit."""
    tensors = contents.tensors_of(model, optimizer)
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {name: digest([tensor]) for name, tensor in whole.items()}


def begin(job, folder):
    """Train and save: what was saved, as it was, while the run goes on."""
    model, optimizer = sharded()
    train(model, optimizer, 2)
    with Checkpoints(folder, job) as store:
        saved = sums(model, optimizer)
        assert store.save(2, model, optimizer, FIELDS)
        train(model, optimizer)
    return saved


def go_on(job, folder, later):
    """What a run that began differently has after loading; it is saved again."""
    model, optimizer = sharded(seed=5)
    with Checkpoints(folder, job, asynchronous=False) as store:
        loaded = store.load_newest(model, optimizer)
        found = sums(model, optimizer)
        store.save(later, model, optimizer, loaded.fields)
    return loaded.step, loaded.fields["loader"], found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which 4 ranks saved step 2, and what they had then."""
    folder = tmp_path_factory.mktemp("run")
    return folder, spawn(begin, 4, folder, timeout_s=LIMIT_S)[0]


def test_four_to_two_to_three_to_one_bit_for_bit(run):
    folder, saved = run
    assert len(saved) == 4 * len(dict(Llama(CONFIG).named_parameters()))  # and 3 of AdamW for each
    for ranks, step in ((2, 3), (3, 4), (1, 5)):
        for found in spawn(go_on, ranks, folder, step, timeout_s=LIMIT_S):
            assert found == (step - 1, FIELDS["loader"], saved), f"on {ranks} ranks"
    assert sorted(os.listdir(folder)) == [f"step_{step:08d}" for step in (3, 4, 5)]


def damaged(job, folder):
    """What is said of checkpoints damaged in all ways, and which is used."""
    model, optimizer = sharded()
    train(model, optimizer)
    said = []
    store = Checkpoints(folder, job, keep=9, asynchronous=False, report=said.append)
    for step in range(1, 6):
        store.save(step, model, optimizer, FIELDS)
    if job.is_main:
        flip(store.path(5) / "__1_0.distcp")
        (store.path(4) / "__0_0.distcp").unlink()
        os.truncate(store.path(3) / ".metadata", 100)
        (store.path(2) / "manifest.json").unlink()
    job.barrier()
    step = store.load_newest(model, optimizer).step
    with pytest.raises(RunError, match="step_00000005 is damaged: __1_0.distcp does not have its"):
        store.load(store.path(5), model, optimizer)
    with pytest.raises(UsageError, match="is no checkpoint; name a folder such as .*step_00000120"):
        store.load(folder, model, optimizer)
    job.barrier()
    if job.is_main:
        flip(store.path(1) / "state.json")
    job.barrier()
    with pytest.raises(RunError, match=r"no checkpoint in \S+ is whole; the newest, step_0+5: "):
        store.load_newest(model, optimizer)
    return step, said[:4]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def refuse(job, folder):
    """A disk that takes half of a file costs the checkpoint, and neither run nor old one."""
    model, optimizer = sharded()
    train(model, optimizer)
    said = []
    store = Checkpoints(folder, job, report=said.append)
    store.save(1, model, optimizer, FIELDS)
    store.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if job.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    store.save(2, model, optimizer, FIELDS)
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(os.listdir(folder))
    store.save(3, model, optimizer, FIELDS)
    store.close()
    wider = sharded(config=replace(CONFIG, hidden_size=32))
    before = sums(*wider)
    with pytest.raises(UsageError, match="of another model: model.embed_tokens.weight is float32 "):
        store.load(store.path(3), *wider)
    assert sums(*wider) == before
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(UsageError, match="checkpoint's optimizer is not the SGD of this run"):
        store.load(store.path(3), model, sgd)
    return said, left, store.steps()


def test_damage_is_told_and_the_one_before_is_used(tmp_path):
    (step, said), _ = spawn(damaged, 2, tmp_path, timeout_s=LIMIT_S)
    assert step == 1
    told = [line.removeprefix("damaged checkpoint passed over: ") for line in said]
    assert told[0] == (
        "step_00000005: __1_0.distcp does not have its sha256: bytes of it were changed"
    )
    assert told[1] == "step_00000004: __0_0.distcp is missing"
    assert told[2].startswith("step_00000003: .metadata has 100 of ")
    assert told[3] == "step_00000002: manifest.json is missing"


def test_a_full_disk_and_another_model_change_nothing(tmp_path):
    for said, left, steps in spawn(refuse, 2, tmp_path, timeout_s=LIMIT_S):
        assert left == ["step_00000001"] and steps == [1, 3]
        assert said in ([], ["checkpoint of step 2 not saved: File too large; the run goes on"])


def killed(job, folder):
    """A rank dies while its shards are written: 1 of 2 is left alone with the files of both."""
    model, optimizer = sharded()
    train(model, optimizer)
    store = Checkpoints(folder, job, asynchronous=False)
    store.save(1, model, optimizer, FIELDS)
    if job.rank == 1:
        half = folder / ".step_00000002.tmp"
        half.mkdir()
        (half / "__1_0.distcp").write_bytes(b"half of it")
        os._exit(9)
    store.save(2, model, optimizer, FIELDS)


def test_a_rank_that_dies_in_a_save_leaves_the_one_before(tmp_path):
    with pytest.raises(RunError, match="rank 1 died without a result"):
        spawn(killed, 2, tmp_path, timeout_s=LIMIT_S)
    assert (tmp_path / "step_00000001").is_dir() and not (tmp_path / "step_00000002").exists()
    (tmp_path / ".step_00000001.old").mkdir()  # as a writer killed between two renames leaves it
    [(step, _, _)] = spawn(go_on, 1, tmp_path, 7, timeout_s=LIMIT_S)
    assert step == 1
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000007"]


def replicated(job, folder, path=None):
    """Load a checkpoint, given or the one beside, into one process as chapter 3 has it."""
    model, optimizer = sharded(seed=7, apart=False)
    state = Replicated(folder).load(path).state
    ordinary = {k: v for k, v in state.items() if k not in ("loader", "scaler")}
    restore({**ordinary, "loader": None}, model, optimizer, Loader(), job=job)
    return sums(model, optimizer), state["loader"]


class Loader:
    def load_state_dict(self, state):
        assert state is None


def test_to_chapter_3_and_back(run, tmp_path):
    """Its own loader reads it; what it wrote is read on 3 ranks, each keeping its shards."""
    folder, saved = run
    newest = max(folder.glob("step_*"))
    path = contents.to_replicated(newest, tmp_path)
    [(found, loader)] = spawn(replicated, 1, tmp_path, path, timeout_s=LIMIT_S)
    assert found == saved and loader == FIELDS["loader"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".step")] == []
    for step, position, found in spawn(go_on, 3, tmp_path, 6, timeout_s=LIMIT_S):
        assert (f"step_{step:08d}", position) == (newest.name, FIELDS["loader"])
        assert found == saved


def test_to_hugging_face_in_several_files(run, tmp_path):
    folder, saved = run
    newest = max(folder.glob("step_*"))
    made = contents.to_hugging_face(newest, tmp_path / "model", shard_bytes=200_000)
    index = json.loads((made / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(p.name for p in made.glob("*.safetensors")) and len(files) == 3
    model = house.load(made)
    weights = {f"model.{name}": digest([p]) for name, p in model.named_parameters()}
    assert weights == {name: one for name, one in saved.items() if name.startswith("model.")}
    assert set().union(*(load_file(made / name) for name in files)) == set(index["weight_map"])
    with pytest.raises(UsageError, match="is not empty; name a new folder"):
        contents.to_hugging_face(newest, made)


def test_a_pickle_of_anything_else_is_refused(run, tmp_path):
    folder, _ = run
    newest = max(folder.glob("step_*"))
    copy = shutil.copytree(newest, tmp_path / newest.name)
    (copy / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(
        RunError, match="is refused: .metadata names posix.getcwd, which is not DCP"
    ):
        contents.Sharded(copy)
    assert encode(contents.Sharded(newest).fields)[1] == {}


TRY_A_SMALL_DISK = """
import sys
from torch import nn, optim
from distlab import runtime
from fsdp.checkpoints import Checkpoints
model = nn.Linear(100, 500)
with runtime.distributed("gloo", device="cpu") as job:
    store = Checkpoints(sys.argv[1], job, keep=2, report=lambda line: print(line, flush=True))
    for step in range(1, 4):
        store.save(step, model, optim.SGD(model.parameters()), {})
        store.wait()
    print(store.steps(), [path.name for path in store.folder.glob(".step_*")], flush=True)
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
    done = subprocess.run([*own_mounts, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "checkpoint of step 3 not saved: No space left on device; the run goes on",
        "[1, 2] []",
    ]
