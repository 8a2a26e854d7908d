"""Each mistake in a config is found before a job starts, with its remedy; a sound one is silent."""

from pathlib import Path

import pytest

import check_config
from distlab import script
from distlab.files import write_text
from zero import operators
from zero.config_check import FINDINGS, Plan, check
from zero.engine import CONFIGS, read_config, stage_config

SOUND = stage_config(2, 2)
RANKS = 4


def plan_for(tmp_path: Path, config: dict, **rest: object) -> Plan:
    """A job on 4 CPU ranks where every operator is built."""
    for name in (operators.CPU_ADAM, operators.PINNED, operators.ASYNC_IO):
        write_text(tmp_path / name / f"{name}.so", "")
    return Plan(config, **{"world_size": RANKS, "extensions": tmp_path, **rest})


def zero(stage: int = 2, **keys: object) -> dict:
    return stage_config(stage, 2, **keys)


def fp16(**keys: object) -> dict:
    return {**SOUND, "fp16": {"enabled": True, **keys}}


ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
NVME = {"device": "nvme", "nvme_path": "/nowhere"}
CUDA = {"device": "cuda"}

# name, config, what else the job has, what the finding says
MISTAKES = [
    ("unknown keys", {**SOUND, "gradient_acumulation_steps": 4}, {}, "accumulation_steps?"),
    ("unknown keys", zero(reduce_buckt_size=5), {}, "zero_optimization.reduce_buckt_size"),
    ("unknown keys", zero(offload_optimizer={"pin_memry": True}), {}, "pin_memory?"),
    ("unknown keys", {**SOUND, "activation_checkpointing": {"profil": True}}, {}, "profile?"),
    ("unknown keys", {**SOUND, "colour": "red"}, {}, "colour is no key of DeepSpeed's; remove it"),
    ("stage", zero(4), {}, "use 0, 1, 2 or 3"),
    ("batch sizes", {**SOUND, "train_batch_size": 7}, {}, "micro-batch 2 x accumulation 1 x 4"),
    ("batch sizes", {"train_batch_size": 7}, {}, "use 4 or 8"),
    ("batch sizes", {"train_batch_size": 3}, {}, "use 4"),
    ("batch sizes", {"zero_optimization": {"stage": 1}}, {}, "give one of them"),
    ("batch sizes", {"train_batch_size": -8}, {}, "no whole number of at least 1"),
    ("automatic values", {**SOUND, "gradient_clipping": "auto"}, {}, "give numbers"),
    ("pipeline", SOUND, {"pipeline_stages": 2}, "use stage 1"),
    ("pipeline", {**zero(3), "pipeline": {"stages": 2}}, {}, "use stage 1"),
    ("pipeline", zero(1), {"pipeline_stages": 3}, "use a divisor of 4"),
    ("pipeline", {"train_batch_size": 8}, {"pipeline_stages": 8}, "use a divisor of 4"),
    ("precision", {**fp16(), "bf16": {"enabled": True}}, CUDA, "both enabled"),
    ("precision", fp16(), {}, "fp16 on a CPU"),
    ("loss scale", fp16(loss_scale=128), CUDA, "use 0"),
    ("loss scale", fp16(initial_scale_power=4), CUDA, "fewer than 5 halvings"),
    ("loss scale", fp16(min_loss_scale=65536), CUDA, "use 16 and 1"),
    ("optimizer twice", SOUND, {"client_optimizer": True}, "remove one"),
    ("operator missing", {**SOUND, **ADAM}, {}, "set optimizer.params.torch_adam"),
    ("nvme folder", zero(3, offload_optimizer=NVME), {}, "/nowhere is no folder"),
    ("nvme folder", zero(3, offload_param={"device": "nvme"}), {}, "nvme_path is missing"),
    ("stage 3 only", zero(stage3_max_live_parameters=10), {}, "does nothing in stage 2"),
    ("stage 3 only", zero(offload_param={"device": "cpu"}), {}, "does nothing in stage 2"),
    ("bucket sizes", zero(reduce_bucket_size=500_000_000), {"memory": 10**9}, "is 2 GB"),
    ("known messages", SOUND, {"log": "a\nType fp16 is not supported on your device."}, "use bf16"),
    ("refused", {**SOUND, "elasticity": {}}, {}, "Elastic training has been removed"),
    *[("sections", {**SOUND, name: value}, {}, f"{name} {value!r} is no section")
      for name, value in [("fp16", True), ("zero_optimization", "stage2"), ("optimizer", None),
                          ("zero_optimization", []), ("activation_checkpointing", True),
                          ("aio", True), ("checkpoint", True), ("flops_profiler", True)]],
    ("sections", {**SOUND, "optimizer": {"type": "AdamW", "params": None}}, {}, "optimizer.params"),
    ("switches", {**SOUND, "fp16": {"enabled": "no"}}, CUDA, "'no' is neither true nor false"),
    ("values", {**SOUND, "steps_per_print": 0}, {}, "steps_per_print 0 is no whole number"),
    ("values", {**SOUND, "scheduler": {"type": "Cosine"}}, {}, "use one of WarmupLR"),
    ("values", {**SOUND, "data_types": {"grad_accum_dtype": "fp8"}}, {}, "use fp32"),
    ("values", {**SOUND, "comet": {"enabled": True}}, {}, "pip install comet_ml"),
    ("stage", zero(2.0), {}, "use 0, 1, 2 or 3"),
    ("automatic values", {**SOUND, "optimizer": {"params": {"betas": ["auto", 0.9]}}}, {}, "betas"),
    ("nvme folder", zero(3, offload_param={**NVME, "nvme_path": " "}), {}, "nvme_path is missing"),
    ("stage 3 only", zero(offload_optimizer=NVME), {}, "to nvme does nothing in stage 2"),
    ("refused", zero(overlap_comm="maybe"), {}, "zero_optimization.overlap_comm 'maybe'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "rest", "says"), MISTAKES)
def test_each_mistake_is_found_and_named(tmp_path, name, config, rest, says):
    found = check(plan_for(tmp_path, config, **rest))
    assert says in " | ".join(one.text for one in found if one.name == name)
    assert all(one.text.count(";") >= 1 or "did you mean" in one.text for one in found)


def test_a_finding_is_a_short_line_whatever_the_config_has(tmp_path):
    config = {**SOUND, "one\nkey": 1, "train_batch_size": 10**400}
    for line in map(str, check(plan_for(tmp_path, config))):
        assert "\n" not in line and len(line) < 400


def test_every_check_has_a_mistake_here():
    names = {name for name, *_ in MISTAKES} | {"stale lock"}
    assert names >= {one.__name__.replace("_", " ") for one in FINDINGS}


SOUND_ONES = [
    (SOUND, {}),
    ({**SOUND, "train_batch_size": 8}, {}),
    ({"train_batch_size": 8}, {}),
    ({**SOUND, "bf16": {"enabled": True}, "steps_per_print": 10}, {}),
    ({**SOUND, "gradient_clipping": "auto", "train_batch_size": "auto"}, {"auto_filled": True}),
    (zero(1), {"pipeline_stages": 2}),
    ({**zero(1), "train_batch_size": 4}, {"pipeline_stages": 2}),
    (fp16(), CUDA),
    ({**SOUND, "comms_logger": {"enabled": True}, "flops_profiler": {"enabled": True}}, {}),
    ({**SOUND, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}, {}),
    ({**zero(offload_optimizer={"device": "cpu"}), **ADAM}, {}),
    (zero(3, stage3_max_live_parameters=10), {}),
    (zero(offload_optimizer=None), {}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "rest"), SOUND_ONES)
def test_a_sound_config_is_silent(tmp_path, config, rest):
    assert check(plan_for(tmp_path, config, **rest)) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_a_shipped_config_has_no_findings(tmp_path, path):
    """But for its NVMe folder, which is the reader's; train_deepspeed.py fills in "auto"."""
    found = check(plan_for(tmp_path, read_config(path), world_size=2, auto_filled=True))
    assert [one for one in found if one.name != "nvme folder"] == []


def test_an_operator_that_is_not_built_and_a_lock_are_found(tmp_path):
    offload = {**zero(3, offload_optimizer={"device": "nvme", "nvme_path": "."}), **ADAM}
    found = check(Plan(offload, RANKS, extensions=tmp_path))
    missing = [one.text for one in found if one.name == "operator missing"]
    assert [text.split(" operator ")[1].split(",")[0] for text in missing] == [
        "cpu_adam", "pin_memory", "async_io",
    ]  # fmt: skip
    write_text(tmp_path / "cpu_adam" / "lock", "")
    assert str(tmp_path / "cpu_adam" / "lock") in check(Plan(SOUND, 1, extensions=tmp_path))[0].text


def test_a_folder_in_memory_is_no_nvme_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("zero.config_check._file_system", lambda folder: "tmpfs")
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    [found] = check(plan_for(tmp_path, zero(3, offload_param=offload)))
    assert "is a tmpfs: memory" in found.text


def written(path: Path, text: str) -> str:
    write_text(path, text)
    return str(path)


def run_script(capsys, *argv: str) -> tuple[int, str, str]:
    status = script.status_of(lambda: check_config.main([*argv, "--preset", "smoke"]))
    out, err = capsys.readouterr()
    return status, out, err


def test_the_script_prints_each_finding_and_its_status_tells(tmp_path, capsys):
    sound = written(tmp_path / "sound.json", '{"train_batch_size": 8}')
    status, out, _ = run_script(capsys, sound, "--world-size", "4")
    assert (status, out.splitlines()[-1]) == (0, "check: findings … ok (0)")
    status, out, _ = run_script(capsys, sound, "--world-size", "4", "--micro-batch", "3")
    assert status == 1 and "use 12" in out and "findings … FAILED (1" in out
    log = written(tmp_path / "job.log", "ZeRO-2 and ZeRO-3 are incompatible with pipeline\n")
    status, out, _ = run_script(capsys, sound, "--world-size", "4", "--log", log)
    assert status == 1 and "use stage 1" in out


def test_a_flag_says_what_the_config_does_not(tmp_path, capsys):
    given = '{"train_batch_size": "auto", "zero_optimization": {"stage": 2}, '
    given += '"optimizer": {"type": "AdamW", "params": {"torch_adam": true}}}'
    config = written(tmp_path / "config.json", given)
    flags = "--world-size 2 --pipeline-stages 2 --client-optimizer --device cuda"
    status, out, _ = run_script(capsys, config, *flags.split())
    names = [line.split(":")[0] for line in out.splitlines()[1:-1]]
    assert (status, names) == (1, ["automatic values", "pipeline", "optimizer twice"])
    status, out, _ = run_script(capsys, config, "--world-size", "2", "--auto-filled")
    assert status == 0


def test_a_bad_argument_is_one_line(tmp_path, capsys):
    status, _, err = run_script(capsys, "any.json", "--world-size", "9" * 30)
    assert status == 2 and err.startswith("error: --world-size has 30 digits; no job")
    status, _, err = run_script(capsys, str(tmp_path / "none.json"), "--world-size", "2")
    assert status == 2 and err.startswith("error: FILE ") and err.count("\n") == 1
    sound = written(tmp_path / "sound.json", '{"train_batch_size": 8}')
    status, _, err = run_script(capsys, sound, "--world-size", "2", "--log", str(tmp_path))
    assert status == 2 and err.startswith("error: --log ") and err.count("\n") == 1
