"""Checkpoints become each other bit for bit, and what cannot become another says so in a line."""

import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import migrate
from ddp.checkpoints import Checkpoints as Replicated
from ddp.training_state import check_same_optimizer
from distlab import model as house
from distlab import script
from distlab.checkpoint_files import hash_file, write_manifest
from distlab.errors import RunError, UsageError
from distlab.model import SIZES, Llama
from distlab.model_config import ModelConfig, config_to_json
from distlab.spawning import spawn
from fsdp import contents
from fsdp.checkpoints import Checkpoints as Sharded
from zero import deepspeed_files, migrated_runs, migration
from zero.engine import engine_of
from zero.state import MOMENTS, State, anew, differing, settings_of

CONFIG = ModelConfig(**{**vars(SIZES["smoke"]), "vocab_size": 500})  # 3 divides none of its sizes
TIED = ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": not CONFIG.tie_word_embeddings})
LIMIT_S = 300


def state_of(config=CONFIG):
    """A state whose every number is another, so that none can be lost or take another's place."""
    torch.manual_seed(3)
    weights = {name: torch.randn(p.shape) for name, p in Llama(config).named_parameters()}
    moments = {key: {n: torch.rand(w.shape) for n, w in weights.items()} for key in MOMENTS}
    groups = [settings_of({"lr": 0.01, "weight_decay": 0.1}), settings_of({"weight_decay": 0.0})]
    fields = {"config": config_to_json(config), "loader": {"samples_consumed": 84, "seed": 5}}
    return State(7, 6, weights, moments, groups, {**fields, "flags": {"steps": 9}})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def optimizer_for(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)


def train(model, optimizer):
    for _ in range(2):
        ids = torch.arange(48).view(2, 24)
        model(ids, targets=ids).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["tied or not", "the other"])
def test_every_kind_that_needs_no_ranks_gives_back_what_it_was_given(config, tmp_path):
    state = state_of(config)
    for kind in ("ddp", "fsdp", "universal", "hf"):
        migration.write(kind, state, tmp_path / kind, 1, LIMIT_S)
        assert migrate.changed(kind, state, tmp_path / kind) == [], kind
        assert list(migration.found(tmp_path / kind)) == [kind]
    state.moments["exp_avg"]["model.norm.weight"][3] += 1e-7
    assert migrate.changed("ddp", state, tmp_path / "ddp") == ["exp_avg of model.norm.weight"]


def test_chapter_3_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    model = Llama(CONFIG)
    optimizer = optimizer_for(model)
    train(model, optimizer)
    saved = {
        "world_size": 2, "model": model.state_dict(), "optimizer_class": "AdamW",
        "optimizer": optimizer.state_dict(), "scheduler": None, "scaler": {}, "random": [],
        "loader": {"samples_consumed": 4}, "flags": {"steps": 9},
    }  # fmt: skip
    with Replicated(tmp_path / "theirs") as store:
        store.save(2, saved)
    state = migration.read("ddp", tmp_path / "theirs", CONFIG)
    assert (state.step, state.updates, state.groups[0]["lr"]) == (2, 2, 3e-3)
    assert same(state.weights, dict(model.named_parameters()))
    assert state.fields["loader"] == {"samples_consumed": 4}

    migration.write("ddp", state, tmp_path / "ours", 1, LIMIT_S)
    loaded = Replicated(tmp_path / "ours").load_newest()
    other = Llama(CONFIG)
    resumed = optimizer_for(other)
    check_same_optimizer(loaded.state, resumed)
    other.load_state_dict(loaded.state["model"])
    resumed.load_state_dict(loaded.state["optimizer"])
    assert same(dict(model.named_parameters()), dict(other.named_parameters()))
    one, two = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert one.keys() == two.keys() and all(same(one[number], two[number]) for number in one)


def sharded(seed):
    torch.manual_seed(seed)
    model = Llama(CONFIG)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, optimizer_for(model)


def whole(model, optimizer):
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
            for name, t in contents.tensors_of(model, optimizer).items()}  # fmt: skip


def save_sharded(job, folder):
    model, optimizer = sharded(1)
    train(model, optimizer)
    fields = {"loader": {"samples_consumed": 4}, "flags": {}, "world_size": 2,
              "optimizer_class": "AdamW", "config": config_to_json(CONFIG)}  # fmt: skip
    with Sharded(folder, job, asynchronous=False) as store:
        store.save(2, model, optimizer, fields)
    return {name: tensor.tolist() for name, tensor in whole(model, optimizer).items()}


def load_sharded(job, folder):
    model, optimizer = sharded(2)
    loaded = Sharded(folder, job, reads=True).load_newest(model, optimizer)
    return loaded.fields["loader"], {n: t.tolist() for n, t in whole(model, optimizer).items()}


def test_chapter_4_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    saved = spawn(save_sharded, 2, tmp_path / "theirs", timeout_s=LIMIT_S)[0]
    state = migration.read("fsdp", tmp_path / "theirs", SIZES["laptop"])  # it names its own model
    assert {f"model.{n}": w.tolist() for n, w in state.weights.items()}.items() <= saved.items()
    assert state.updates == 2 and state.groups[0]["betas"] == [0.9, 0.95]
    migration.write("fsdp", state, tmp_path / "ours", 1, LIMIT_S)
    for loader, found in spawn(load_sharded, 3, tmp_path / "ours", timeout_s=LIMIT_S):
        assert loader == {"samples_consumed": 4} and found == saved


def through_deepspeed(job, folder, made):
    """Written by us, loaded by DeepSpeed and saved as its own; and DeepSpeed's own converter."""
    for stage in (1, 2, 3):
        deepspeed_files.save_zero(job, folder, made / f"zero{stage}", stage)
    if job.is_main:
        for stage in (2, 3):
            tag = migration.found(made / f"zero{stage}")[f"zero{stage}"]
            migrated_runs.to_universal(tag, made / f"converted{stage}")
    job.barrier()
    crossed = refused(job, made, 2, by=3), refused(job, made, 3, by=2)
    return crossed, unmended(job, made / "converted3")


def refused(job, made, of, by):
    """The error that DeepSpeed's stage `by` says of what its converter made of stage `of`."""
    state = state_of()
    with engine_of(*deepspeed_files.parts_for(state, by, job, universal=True)) as engine:
        try:
            engine.load_checkpoint(str(made / f"converted{of}"))
        except Exception as error:
            return type(error).__name__
    return "loads"


def unmended(job, folder):
    """What stage 3 has after a load of what its own converter made."""
    with engine_of(*deepspeed_files.parts_for(state_of(), 3, job, universal=True)) as engine:
        engine.load_checkpoint(str(folder))
        steps = [values["step"] for values in engine.optimizer.optimizer.state.values()]
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        return decays, steps[0] is steps[1]


def test_deepspeed_loads_what_we_write_at_every_stage_and_we_read_what_it_saves(tmp_path):
    state = state_of()
    deepspeed_files.write_universal(state, tmp_path / "universal")
    [told] = spawn(through_deepspeed, 1, tmp_path / "universal", tmp_path, timeout_s=LIMIT_S)
    for name in ("zero1", "zero2", "zero3", "converted2", "converted3"):
        kind = "universal" if "converted" in name else name
        assert differing(state, migration.read(kind, tmp_path / name, CONFIG)) == [], name
    # What DeepSpeed calls universal is not: neither stage reads the other's, and stage 3 has the
    # settings of one group, and one counter, for both. Once this fails, `mend` can go.
    crossed, (decays, one_counter) = told
    assert crossed == ("AssertionError", "AssertionError")
    assert decays == [0.1, 0.1] and one_counter


def test_the_command_writes_for_as_many_ranks_as_one_says(tmp_path, capsys):
    state = state_of()
    migration.write("ddp", state, tmp_path / "ddp", 1, LIMIT_S)
    words = ["--from", "ddp", "--to", "zero3", "--ranks", "3", "--preset", "smoke"]
    folders = ["--input", str(tmp_path / "ddp"), "--output", str(tmp_path / "three")]
    assert migrate.main([*words, *folders]) == 0
    assert "job: ddp of step 7 to zero3: weights and moments of" in capsys.readouterr().out
    tag = tmp_path / "three" / "global_step7"
    assert len(deepspeed_files.optim_files(tag)) == 3 and deepspeed_files.stage_of(tag) == 3
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(RunError, match="has no partition of rank 1"):
        migration.read("zero3", tmp_path / "three", CONFIG)
    for file in tag.glob("*_model_states.pt"):
        file.unlink()
    (tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(RunError, match="has no mp_rank_00_model_states.pt"):
        migration.read("zero3", tmp_path / "three", CONFIG)


def test_the_matrix_touches_every_kind_from_and_to():
    """The command of main.md runs it at smoke size; here is what that leaves out."""
    kinds = set(migration.KINDS)
    assert {a for a, _ in migrate.FEW} == {b for _, b in migrate.FEW} == kinds
    assert set(migrate.FEW) < set(migrate.ALL) and len(migrate.ALL) == 7 * 7 - 1


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tag = tmp_path / "zero" / "global_step1"
    tag.mkdir(parents=True)
    torch.save({"optimizer_state_dict": Trap()}, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(RunError, match="cannot be read: Weights only load failed"):
        migration.read("zero1", tag, CONFIG)
    migration.write("fsdp", state_of(), tmp_path / "fsdp", 1, LIMIT_S)
    step = tmp_path / "fsdp" / "step_00000007"
    (step / ".metadata").write_bytes(pickle.dumps(Trap()))
    _sign(step)
    with pytest.raises(RunError, match="damaged: .metadata names posix.system, which is not DCP's"):
        migration.read("fsdp", tmp_path / "fsdp", CONFIG)
    assert not Path("trapped").exists()


def _sign(step):
    """A manifest that fits what is there: an attacker has one too."""
    tree = json.loads((step / "manifest.json").read_text(encoding="utf-8"))
    (step / "manifest.json").unlink()
    files = {name: hash_file(step / name) for name in tree["files"]}
    write_manifest(step, tree["step"], files)


def status_and_error(capsys, *words):
    status = script.status_of(lambda: migrate.main(["--preset", "smoke", *map(str, words)]))
    return status, capsys.readouterr().err.strip().removeprefix("error: ")


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys):
    state = state_of()
    migration.write("ddp", state, tmp_path / "ddp", 1, LIMIT_S)
    house.save(Llama(CONFIG), tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    before = sorted(os.listdir(tmp_path))

    def refused(source, target, folder, out="new", *more):
        return status_and_error(capsys, "--from", source, "--to", target, "--input",
                                tmp_path / folder, "--output", tmp_path / out, *more)  # fmt: skip

    for expected, given in {
        "holds ddp, not fsdp; use --from ddp": ("fsdp", "hf", "ddp"),
        "holds no checkpoint; name the folder of a run": ("ddp", "hf", "empty"),
        "nowhere holds no checkpoint": ("ddp", "hf", "nowhere"),
        "--from hf has no moments, which --to ddp wants; convert": ("hf", "ddp", "hf"),
        "--to zero2 needs a number of ranks, such as --ranks 2": ("ddp", "zero2", "ddp"),
        "--to fsdp needs no --ranks": ("ddp", "fsdp", "ddp", "new", "--ranks", 2),
        "--ranks 900: a group of 320 numbers leaves nothing": (
            "ddp", "zero1", "ddp", "new", "--ranks", 900,
        ),
        "hf is not empty; name a new folder": ("ddp", "fsdp", "ddp", "hf"),
    }.items():  # fmt: skip
        status, error = refused(*given)
        assert status == 2 and expected in error and "\n" not in error, error
    status, error = status_and_error(capsys, "--from", "ddp")
    assert status == 2 and error.startswith("--to is missing; give it, or use --matrix")
    file = tmp_path / "ddp" / "step_00000007" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    status, error = refused("ddp", "hf", "ddp")
    assert status == 1 and "is damaged: tensors.safetensors has " in error
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("kind", ["fsdp", "universal"])
def test_a_full_disk_is_told_and_leaves_nothing(kind, tmp_path):
    state = state_of()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot be written; is the disk full"):
            migration.write(kind, state, tmp_path / "new", 1, LIMIT_S)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_a_changed_byte_is_told_by_the_sum_of_its_part(tmp_path):
    deepspeed_files.write_universal(state_of(), tmp_path)
    file = next(tmp_path.glob("*/zero/model.norm.weight/fp32.pt"))
    content = bytearray(file.read_bytes())
    content[content.index(torch.load(file)["param"].numpy().tobytes()) + 9] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="fp32.pt is damaged: .* does not have its sum"):
        migration.read("universal", tmp_path, CONFIG)


def test_what_a_reader_cannot_put_together_is_one_line(tmp_path, monkeypatch):
    """As where one rank's file was copied over another's, whose part is of another size."""
    migration.write("ddp", state_of(), tmp_path / "ddp", 1, LIMIT_S)

    def fails(path):
        raise RuntimeError("shape '[4]' is invalid for input of size 3\nand more")

    monkeypatch.setitem(migration.READERS, "ddp", fails)
    with pytest.raises(RunError, match="is not understood: shape .* of size 3$"):
        migration.read("ddp", tmp_path / "ddp", CONFIG)


def test_deepspeeds_step_folder_is_no_run_of_chapter_3(tmp_path, monkeypatch):
    tag = tmp_path / "step_00000002"
    tag.mkdir()
    (tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    monkeypatch.setattr(migration, "stage_of", lambda tag: 2 if any(tag.glob("*.pt")) else None)
    assert migration.found(tmp_path) == {"zero2": tag}, "its file latest is missing"


def test_another_model_is_told_by_its_first_tensor(tmp_path):
    state = state_of()
    del state.fields["config"]
    with pytest.raises(UsageError, match=r"weight of model.embed_tokens.weight is \(500, 64\) in"):
        state.fitted(SIZES["smoke"])
    state.weights["model.norm.weight"] = state.weights["model.norm.weight"].bfloat16()
    with pytest.raises(RunError, match="only float32 state is converted"):
        state.fitted(CONFIG)


def test_weights_alone_become_a_run_that_begins_anew(tmp_path):
    model = Llama(CONFIG)
    house.save(model, tmp_path / "hf")
    words = ["--from", "hf", "--to", "ddp", "--new-moments", "--preset", "smoke"]
    folders = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ddp")]
    assert migrate.main([*words, *folders]) == 0
    state = migration.read("ddp", tmp_path / "ddp", CONFIG)
    assert state.updates == 0 and same(state.weights, dict(model.named_parameters()))
    assert all(same(state.moments[key], anew(state.weights)[key]) for key in MOMENTS)
