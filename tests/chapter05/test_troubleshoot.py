"""Each error of the table is caused and cured once, found by what the table says, and bounded."""

import json
import sys
from pathlib import Path

import troubleshoot
from distlab import script
from distlab.process import run_command
from zero import messages
from zero.rehearsal import BY_CHECK, BY_COUNT, BY_LOG
from zero.troubles import TROUBLES

# what finds it, and what is seen of it
FOUND = {
    "batch_sizes": (f"{BY_CHECK}: batch sizes", "train_batch_size is not equal"),
    "misspelt_key": (f"{BY_CHECK}: unknown keys", "4 optimizer steps in 4 micro-batches, not 1"),
    "pipeline_with_stage_2": (f"{BY_CHECK}: pipeline", "incompatible with pipeline parallelism"),
    "optimizer_twice": (f"{BY_CHECK}: optimizer twice", "rate 0.1, not the config's 0.001"),
    "operator_missing": (f"{BY_CHECK}: operator missing", "cpu_adam op"),
    "nvme_folder": (f"{BY_CHECK}: nvme folder", "DeepSpeed makes the folder"),
    "stale_lock": (f"{BY_CHECK}: stale lock", "file_baton.py"),
    "world_size_changed": (f"{BY_LOG}: world size changed", "used a DP world size of 2"),
    "loss_scale_at_its_minimum": (f"{BY_LOG}: loss scale", "already at minimum"),
    "plain_backward": (f"{BY_LOG}: plain backward", "Direct calls to tensor.backward()"),
    "step_at_boundaries_only": (BY_COUNT, "0 optimizer steps in 8 micro-batches, not 2"),
    "whole_model_on_every_rank": (BY_COUNT, "98,944 bytes of weights on each rank"),
    "parameter_not_gathered": (BY_COUNT, "torch.Size([0])"),
    "layer_unused_on_one_rank": (f"{BY_LOG}: ranks part ways", "op.preamble.length"),
    "saved_by_rank_0_alone": (f"{BY_LOG}: one rank alone", "Timed out waiting 3000ms"),
}


def rehearsed(folder: Path, names: list[str]) -> tuple[dict[str, str], dict[str, list]]:
    """Of each error what the script says that it is found by, and its row."""
    path = folder / "record.json"
    command = [sys.executable, troubleshoot.__file__, "--preset", "laptop", "--timeout", "3"]
    done = run_command([*command, "--json", str(path), "--only", *names], timeout_s=300)
    assert (done.status, done.left_running) == (0, ()), done.stdout + done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["diagnoses"], dict(zip(names, record["tables"]["troubles"]["rows"], strict=True))


def assert_found(folder: Path, names: list[str]) -> None:
    diagnoses, rows = rehearsed(folder, names)
    assert diagnoses == {name: FOUND[name][0] for name in names}
    assert all(FOUND[name][1] in row[1] for name, row in rows.items()), rows


def test_each_error_is_caused_found_and_cured(tmp_path):
    assert FOUND.keys() == set(troubleshoot.ALL)
    assert_found(tmp_path, [name for name in FOUND if not TROUBLES[name].needs])


def test_those_that_need_operators_too(tmp_path, deepspeed_operators):
    assert_found(tmp_path, [name for name in FOUND if TROUBLES[name].needs])


def test_an_operator_that_is_not_built_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    argv = ["--preset", "smoke", "--only", "nvme_folder"]
    assert script.status_of(lambda: troubleshoot.main(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --only nvme_folder needs the operator cpu_adam; ")
    assert error.count("\n") == 1


def test_an_unknown_name_is_one_line(capsys):
    try:
        troubleshoot.parse_args(["--only", "nothing"])
    except SystemExit as ended:
        assert ended.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_line_is_told_without_its_place_in_a_library():
    gloo = "RuntimeError: [/a/gloo/pair.cc:78] Timed out waiting 4000ms for recv"
    assert messages.brief(gloo) == "RuntimeError: Timed out waiting 4000ms for recv"
    frame = 'File "/x/lib/site-packages/torch/utils/file_baton.py", line 50 in wait'
    assert messages.brief(frame) == 'File "torch/utils/file_baton.py", line 50 in wait'
    assert messages.brief("a.b.ZeRORuntimeException: " + "word " * 30).endswith("word ...")
