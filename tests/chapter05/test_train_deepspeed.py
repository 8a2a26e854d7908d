"""The training is one process's under every config; it goes on; it is exported; it refuses."""

import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train_deepspeed
from distlab import data
from distlab.errors import RunError, UsageError
from distlab.spawning import spawn
from zero import engine

CONFIGS = sorted(path.name for path in engine.CONFIGS.glob("*.json"))
SHORT = ["--preset", "smoke", "--device", "cpu", "--steps", "4", "--layers", "2"]
LIMIT_S = 200
JOB = SimpleNamespace(device=torch.device("cpu"), world_size=2)


def args_of(*flags):
    return train_deepspeed.parse_args([*SHORT, *flags])


def trainer_of(args, job, tokens):
    return train_deepspeed.Trainer(
        args, engine.fill(engine.read_config(args.config), args, job), job, tokens
    )


def mean_losses(trainer, steps, job):
    losses = torch.stack([trainer.step(step).detach() for step in steps])
    dist.all_reduce(losses)
    return (losses / job.world_size).tolist()


def every_config(job, folder):
    """Of each config: 4 losses; the last two again, resumed; and its weights, exported."""
    os.chdir(folder)
    tokens = data.prepare_from_args(args_of(), 320)
    found = {}
    for name in CONFIGS:
        own = ["--config", str(engine.CONFIGS / name), "--checkpoint-dir", f"saved-{name}"]
        own += ["--accumulate", "2"] if "stage2_config" in name else []
        args = args_of(*own)
        with trainer_of(args, job, tokens) as trainer:
            losses = mean_losses(trainer, range(2), job)
            if "offload" not in name:
                trainer.save(2)
            losses += mean_losses(trainer, range(2, 4), job)
        resumed = losses[2:]
        if "offload" not in name:
            with trainer_of(args, job, tokens) as trainer:
                assert trainer.resume() == 2
                resumed = mean_losses(trainer, range(2, 4), job)
        found[name] = losses, resumed
    return found


def alone(job, folder):
    import contextlib

    os.chdir(folder)
    args = args_of()
    tokens = data.prepare_from_args(args, 320)
    with contextlib.ExitStack() as stack:
        return train_deepspeed.alone(args, job, tokens, 4, stack)


def test_every_config_trains_as_one_process_and_goes_on(tmp_path, deepspeed_operators):
    [losses] = spawn(alone, 1, tmp_path)
    found = spawn(every_config, 2, tmp_path, timeout_s=LIMIT_S)[0]
    assert len(found) == 6
    for name, (own, resumed) in found.items():
        assert own == pytest.approx(losses, abs=train_deepspeed.SAME_LOSS), name
        assert resumed == pytest.approx(own[2:], abs=train_deepspeed.SAME_LOSS), name


def with_other_ranks(job, folder):
    os.chdir(folder)
    args = args_of("--checkpoint-dir", "saved", "--batch-size", "12")
    tokens = data.prepare_from_args(args, 320)
    with trainer_of(args, job, tokens) as trainer:
        if job.world_size == 2:
            trainer.save(1)
            return None
        with pytest.raises(RunError) as refused:
            trainer.resume()
        return str(refused.value)


def test_another_number_of_ranks_is_told_to_migrate(tmp_path):
    spawn(with_other_ranks, 2, tmp_path)
    told = spawn(with_other_ranks, 3, tmp_path)
    assert all("another number of ranks" in one and "migrate.py" in one for one in told)


def filled(config, **changes):
    args = Namespace(
        config="own.json", batch_size=8, accumulate=2, clip=1.0, learning_rate=0.01,
        weight_decay=0.1, dtype="float32",
    )  # fmt: skip
    vars(args).update(changes)
    return engine.fill(config, args, JOB)


def test_auto_takes_what_the_flags_say():
    config = {"train_batch_size": "auto", "optimizer": {"params": {"lr": "auto"}}}
    found = filled(config, dtype="bfloat16")
    assert (found["train_batch_size"], found["optimizer"]["params"]["lr"]) == (8, 0.01)
    assert found["bf16"]["enabled"] and found["zero_optimization"]["stage"] == 0
    assert config["train_batch_size"] == "auto"


def test_a_number_that_contradicts_a_flag_is_refused():
    with pytest.raises(UsageError, match="own.json: train_batch_size is 16, and --batch-size 8"):
        filled({"train_batch_size": 16})


def test_the_config_of_hugging_faces_documentation_is_filled_in():
    found = filled({
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto",
                              "stage3_prefetch_bucket_size": "auto"},
    })  # fmt: skip
    assert found["train_micro_batch_size_per_gpu"] == 2, "8 / (2 ranks x 2)"
    assert found["zero_optimization"] == {"stage": 3}
    assert not found["bf16"]["enabled"] and not found["fp16"]["enabled"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"zero_optimization": True}, "zero_optimization True is no section; write"),
        ({"zero_optimization": None}, "zero_optimization None is no section; write"),
        ({"gradient_accumulation_steps": True}, "True is no number; write one"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping '1.0' is no number"),
        ({"gradient_accumulation_steps": 0}, 'is 0, and --accumulate 2; write "auto" there$'),
        ({"gradient_clipping": float("nan")}, 'is nan, and --clip 1.0; write "auto" there$'),
        ({"gradient_clipping": 2.0}, "or use --clip 2.0$"),
    ],
)
def test_a_value_is_looked_at_before_it_is_compared(config, told):
    with pytest.raises(UsageError, match=told):
        filled(config)


def test_what_deepspeed_refuses_as_it_begins_is_one_line_that_names_the_config():
    told = r"^--config own.json: DeepSpeed refuses it \(ImportError: no module\); correct"
    with pytest.raises(UsageError, match=told), engine.refusing("--config", "own.json"):
        raise ImportError("no module\nand more")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gradient_acumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"train_micro_batch_size_per_gpu": 3}, "8.* 3.* 2|8.*3"),
        ({"zero_optimization": {"stage": 4}}, "0, 1, 2"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "offload_param"),
    ],
)
def test_what_the_checker_finds_is_refused_before_anything_starts(change, told):
    args = args_of()
    settings = engine.fill({**engine.read_config(args.config), **change}, args, JOB)
    with pytest.raises(UsageError, match=told) as refused:
        train_deepspeed.refuse_config(args, settings, JOB)
    assert str(refused.value).startswith("--config ") and "\n" not in str(refused.value)


def test_the_shipped_configs_are_taken(monkeypatch, tmp_path, deepspeed_operators):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build" / "nvme").mkdir(parents=True)
    for name in CONFIGS:
        args = args_of("--config", str(engine.CONFIGS / name))
        settings = engine.fill(engine.read_config(args.config), args, JOB)
        train_deepspeed.refuse_config(args, settings, JOB)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "is no JSON"), (b"[1]", "holds a list"), (None, "there is no such file"),
        ("{}".encode("utf-16"), "is no JSON in UTF-8"), (b'{"a": "\xe9"}', "is no JSON in UTF-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is no JSON in UTF-8"), (b"[" * 100_000, "is no JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config_is_refused(tmp_path, content, told):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=told) as refused:
        engine.read_config(path)
    assert "\n" not in str(refused.value)


def test_a_folder_is_no_config_and_a_byte_order_mark_does_no_harm(tmp_path):
    with pytest.raises(UsageError, match="name a readable JSON file"):
        engine.read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert engine.read_config(tmp_path / "config.json") == {}


def test_an_operator_that_is_not_built_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = engine.read_config(engine.CONFIGS / "deepspeed_stage2_offload_cpu_config.json")
    with pytest.raises(
        UsageError, match="--config needs DeepSpeed's operator cpu_adam; .*env deepspeed"
    ):
        engine.load_operators(config, JOB, "--config")
