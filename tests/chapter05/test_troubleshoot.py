"""Each error of the table is caused and cured once, found by what the table says, and bounded."""

import json
import sys

import troubleshoot
from distlab.process import run_command
from zero import messages
from zero.rehearsal import BY_CHECK, BY_COUNT, BY_LOG

FOUND_BY = {
    "batch_sizes": (BY_CHECK, "train_batch_size is not equal"),
    "misspelt_key": (BY_CHECK, "4 optimizer steps in 4 micro-batches, not 1"),
    "automatic_values": (BY_CHECK, "'str' and 'int'"),
    "pipeline_with_stage_2": (BY_CHECK, "incompatible with pipeline parallelism"),
    "optimizer_twice": (BY_CHECK, "learning rate 0.1, not the config's 0.001"),
    "operator_missing": (BY_CHECK, "op"),
    "nvme_folder": (BY_CHECK, "DeepSpeed makes the folder"),
    "stale_lock": (BY_CHECK, "file_baton.py"),
    "world_size_changed": (BY_LOG, "used a DP world size of 2"),
    "loss_scale_at_its_minimum": (BY_LOG, "already at minimum"),
    "plain_backward": (BY_LOG, "Direct calls to tensor.backward()"),
    "step_at_boundaries_only": (BY_COUNT, "0 optimizer steps in 8 micro-batches, not 2"),
    "whole_model_on_every_rank": (BY_COUNT, "98,944 bytes of weights on each rank"),
    "parameter_not_gathered": (BY_LOG, "torch.Size([0])"),
    "layer_unused_on_one_rank": (BY_LOG, ""),
    "saved_by_rank_0_alone": (BY_LOG, ""),
}


def test_each_error_is_caused_found_and_cured(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, troubleshoot.__file__, "--preset", "laptop", "--timeout", "3"]
    done = run_command([*command, "--json", str(record)], timeout_s=300)
    assert done.status == 0, done.stdout + done.stderr
    assert done.left_running == ()
    rows = {
        row[0]: row for row in json.loads(record.read_text("utf-8"))["tables"]["troubles"]["rows"]
    }
    assert rows.keys() == {name.replace("_", " ") for name in FOUND_BY}
    for name, (by, says) in FOUND_BY.items():
        _, seen, seconds, found_by, cure = rows[name.replace("_", " ")]
        assert found_by.startswith(by) and says in seen, rows[name.replace("_", " ")]
        assert cure and seconds < 60


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
