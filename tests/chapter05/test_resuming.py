"""What --checkpoint-dir and --resume may hold: taken up, or told in a line; not passed by."""

import errno
import os
import zipfile

import pytest
import torch

import train_deepspeed
from distlab import data
from distlab.errors import RunError, UsageError
from distlab.spawning import spawn
from zero import deepspeed_files, engine, resuming
from zero.resuming import checkpoint_in

SHORT = ["--preset", "smoke", "--device", "cpu", "--steps", "4", "--layers", "2"]
MODEL, SHARD = deepspeed_files.MODEL[0], "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def tag_in(folder, step=2, whole=True):
    tag = folder / f"step_{step:08d}"
    tag.mkdir(parents=True)
    torch.save({"global_steps": step}, tag / MODEL)
    if not whole:
        (tag / MODEL).write_bytes((tag / MODEL).read_bytes()[:-100])
    return tag


def test_a_run_begins_in_a_missing_folder_or_an_empty_one_and_nowhere_else(tmp_path):
    assert checkpoint_in(tmp_path / "none") is None and checkpoint_in(tmp_path) is None
    tag = tag_in(tmp_path)
    (tmp_path / "latest").write_text(f"{tag.name}\n", encoding="utf-8")
    assert checkpoint_in(tmp_path) == tag


def latest_missing(folder):
    pass


def latest_empty(folder):
    (folder / "latest").write_text("")


def latest_binary(folder):
    (folder / "latest").write_bytes(b"\xff\x00")


def latest_a_folder(folder):
    (folder / "latest").mkdir()


def latest_of_a_deleted_tag(folder):
    (folder / "latest").write_text("step_00000004")


@pytest.mark.parametrize(
    "break_it",
    [latest_missing, latest_empty, latest_binary, latest_a_folder, latest_of_a_deleted_tag],
)
def test_a_latest_that_leads_nowhere_is_told_with_what_to_write_into_it(tmp_path, break_it):
    tag_in(tmp_path, 2)
    tag_in(tmp_path, 3, whole=False)
    break_it(tmp_path)
    with pytest.raises(UsageError, match="latest names no .*; write step_00000002 into it, or"):
        checkpoint_in(tmp_path)


def a_file(folder):
    (folder / "notes.txt").write_text("loss 3.1")


def a_hugging_face_folder(folder):
    (folder / "config.json").write_text("{}")


def chapter_3s(folder):
    (folder / "step_00000100").mkdir()
    (folder / "step_00000100" / "manifest.json").write_text("{}")


def a_universal_one(folder):
    tag = tag_in(folder)
    (tag / "zero").mkdir()
    (folder / "latest_universal").write_text(tag.name)


def an_unfinished_one_of_which_latest_speaks(folder):
    tag_in(folder, whole=False)
    (folder / "latest").write_text("step_00000004")


@pytest.mark.parametrize(
    "fill",
    [a_file, a_hugging_face_folder, chapter_3s, a_universal_one,
     an_unfinished_one_of_which_latest_speaks],
)  # fmt: skip
def test_a_folder_of_something_else_is_refused(tmp_path, fill):
    fill(tmp_path)
    with pytest.raises(UsageError, match="holds files, and no whole .* migrate.py, or name a new"):
        checkpoint_in(tmp_path)


def test_a_first_save_that_was_cut_short_is_told_and_does_not_block(tmp_path):
    tag_in(tmp_path, whole=False)
    (tmp_path / resuming.SCRIPT).write_text("")
    told = []
    assert checkpoint_in(tmp_path, told.append) is None
    assert "step_00000002 was never finished" in told[0]


def test_a_full_disk_is_one_line(tmp_path):
    class Engine:
        def save_checkpoint(self, *words):
            raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(RunError, match="cannot be written; is the disk full"):
        resuming.save(Engine(), tmp_path, 2, 3, {})


def args_of(*flags):
    return train_deepspeed.parse_args([*SHORT, *flags])


def trainer_of(args, job, tokens):
    settings = engine.fill(engine.read_config(args.config), args, job)
    return train_deepspeed.Trainer(args, settings, job, tokens)


def flip_a_byte(path):
    """In the first tensor, which is stored as it is."""
    with zipfile.ZipFile(path) as archive:
        one = next(i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 64)
    content = bytearray(path.read_bytes())
    content[one.header_offset + 30 + len(one.filename) + 128] ^= 1
    path.write_bytes(content)


def taken_up(job, folder):
    """One trainer saves at steps 2, 3 and 4, keeping two; then it is told what cannot be loaded."""
    os.chdir(folder)
    args = args_of("--checkpoint-dir", "run", "--keep", "2")
    tokens = data.prepare_from_args(args, 320)
    told = {}
    with trainer_of(args, job, tokens) as trainer:
        for step in (2, 3, 4):
            trainer.engine.global_steps = step
            trainer.save(step)
        job.barrier()
        kept = sorted(path.name for path in (folder / "run").glob("step_*"))
        tag = folder / "run" / kept[0]

        def refused(name, tag=tag, **changes):
            job.barrier()
            given = {"settings": trainer.settings, "model": trainer.shape, "job": job, **changes}
            try:
                resuming.take_up(trainer.engine, tag, "--resume", **given)
            except (UsageError, RunError) as error:
                told[name] = error
            job.barrier()

        def config(name):
            return engine.fill(engine.read_config(engine.CONFIGS / name), args, job)

        refused("stage", settings=config("deepspeed_stage3_config.json"))
        refused("none", settings=config("deepspeed_stage0_config.json"))
        refused("adam", settings={**trainer.settings, "zero_optimization": {
            "stage": 2, "offload_optimizer": {"device": "cpu"}}, "optimizer": {}})  # fmt: skip
        refused("layers", model={**trainer.shape, "num_hidden_layers": 5})
        refused("no checkpoint", tag=folder)
        shard = tag / SHARD
        whole = shard.read_bytes()
        for name, broken in {"cut": whole[:-500], "empty": b"", "text": b"x" * 900}.items():
            if job.is_main:
                shard.write_bytes(broken)
            refused(name)
        if job.is_main:
            shard.write_bytes(whole)
            flip_a_byte(shard)
        refused("flipped")
        if job.is_main:
            shard.unlink()
        refused("missing")
    with trainer_of(args_of("--resume", str(folder / "run" / kept[1])), job, tokens) as trainer:
        resumed = trainer.resume()
    return kept, resumed, {name: (type(e).__name__, str(e)) for name, e in told.items()}


def test_what_does_not_fit_the_run_is_told_on_every_rank_before_anything_is_loaded(tmp_path):
    found = spawn(taken_up, 2, tmp_path, timeout_s=200)
    assert found[0] == found[1]
    kept, resumed, told = found[0]
    assert kept == ["step_00000003", "step_00000004"] and resumed == 4
    for name, (kind, says) in {
        "stage": ("UsageError", "is of stage 2 with torch's AdamW, and --config of stage 3"),
        "none": ("UsageError", "and --config of stage 0"),
        "adam": ("UsageError", "with DeepSpeed's CPUAdam; use the config that saved it"),
        "layers": ("UsageError", "its num_hidden_layers is 2, and this run's 5"),
        "no checkpoint": ("UsageError", "is no checkpoint of DeepSpeed's; name a folder"),
        "cut": ("RunError", "cannot be read"),
        "empty": ("RunError", "cannot be read"),
        "text": ("RunError", "cannot be read"),
        "flipped": ("RunError", "does not have its sum"),
        "missing": ("RunError", "has no partition of rank 0"),
    }.items():
        assert told[name][0] == kind and says in told[name][1], (name, told.get(name))
        assert "\n" not in told[name][1]
