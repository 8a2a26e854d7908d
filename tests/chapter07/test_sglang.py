"""SGLang's server through the chapter's scripts, and what each of them refuses."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import read_genai_bench
import sglang_client
import sglang_frontend
from distlab import script
from distlab.errors import RunError, UsageError
from distlab.files import repo_root
from distlab.process import run_command
from distlab.service import free_port
from distlab.serving.clients import Answer
from distlab.serving.frontier import frontier
from radix.sglang_server import has_template, serve_line, split_flags
from tune_sglang import Point

CODE = repo_root() / "chapter07-sglang" / "code"
SMOKE = ["--preset", "smoke"]


def test_cached_tokens_are_as_predicted_and_answers_as_transformers(sglang_server):
    url = ["--base-url", f"{sglang_server.url}/v1"]
    flags = ["--requests", "4", "--concurrency", "4", "--reference"]
    assert sglang_client.main([*SMOKE, *url, *flags]) == 0


def test_a_program_in_sglangs_language(sglang_server, sglang_python):
    """In its environment, as its client is imported with it."""
    command = [str(sglang_python), str(CODE / "sglang_frontend.py"), *SMOKE]
    done = run_command([*command, "--base-url", sglang_server.url], cwd=repo_root(), timeout_s=300)
    assert done.status == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "each branch finds the document in the cache … ok" in done.stdout


def result(scenario: str, users: int, **changes: object) -> dict:
    one = {"ttft": 0.1, "tpot": 0.1, "e2e_latency": 0.5, "num_input_tokens": 50,
           "num_output_tokens": 5, "error_code": None, **changes}  # fmt: skip
    stats = {"ttft": {"p50": 0.1}, "tpot": {"p50": 0.1}}
    return {
        "aggregated_metrics": {
            "scenario": scenario, "num_concurrency": users, "num_completed_requests": 4,
            "mean_output_throughput_tokens_per_s": 40.0, "num_error_requests": 0, "stats": stats,
        },
        "individual_request_metrics": [one] * 4, "_time_unit": "s",
    }  # fmt: skip


def write(folder: Path, *results: dict) -> str:
    for number, made in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(made))
    (folder / "experiment_metadata.json").write_text("{}")
    return str(folder)


def test_genai_benchs_results_are_read_in_order(tmp_path):
    folder = write(tmp_path, result("D(50,5)", 4), result("D(50,5)", 1))
    assert read_genai_bench.main([*SMOKE, folder]) == 0
    found = read_genai_bench.read_results(tmp_path)
    assert [r["aggregated_metrics"]["num_concurrency"] for r in found] == [1, 4]
    assert read_genai_bench.loop_rate(found[1]) == pytest.approx(4 * 5 / 0.5)


def test_a_time_that_is_not_the_formulas_fails(tmp_path):
    assert read_genai_bench.main([*SMOKE, write(tmp_path, result("D(50,5)", 1, tpot=0.2))]) == 1


def test_the_frontier_leaves_out_what_another_point_beats_in_both():
    def point(latency: float, rate: int) -> Point:
        answer = Answer("", rate, 0.0, latency, "stop")
        return Point(f"{latency}/{rate}", 1, [answer], 1.0, 0)

    points = [point(3.0, 9), point(1.0, 2), point(2.0, 8), point(2.5, 5), point(1.0, 1)]
    assert [p.setting for p in frontier(points)] == ["1.0/2", "2.0/8", "3.0/9"]


def test_flags_are_parted_and_the_users_stand_last(tmp_path):
    ours, others = split_flags(["--model", "D", "--tp", "2", "--port=9"], {"--model", "--help"})
    assert (ours, others) == (["--model", "D"], ["--tp", "2", "--port=9"])
    assert serve_line(tmp_path, "smoke", others)[-3:] == others
    assert not has_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_template(tmp_path) and "--chat-template" not in serve_line(tmp_path, "smoke")


@pytest.mark.parametrize(
    ("name", "flags", "status", "message"),
    [
        ("sglang_server.sh", ["--model"], 2, "--model: expected one argument"),
        ("sglang_server.sh", ["--model", "/nowhere"], 2, "--model /nowhere is no model folder"),
        ("sglang_server.sh", ["--config", "/no.yaml"], 2, "--config /no.yaml is no file"),
        ("sglang_multi_node.sh", [], 2, "NODE_RANK, NNODES and HEAD say which node this is"),
        ("genai_bench.sh", ["--out"], 2, "--out needs a value"),
        ("genai_bench.sh", ["--out", ""], 2, "--out needs a value"),
        ("genai_bench.sh", ["--engine", "TGI"], 2, "--engine TGI is not known here"),
        ("genai_bench.sh", ["--scenarios", "/no.txt"], 2, "--scenarios /no.txt is no file"),
    ],
)
def test_a_shell_script_refuses_in_one_line(sglang_python, name, flags, status, message):
    env = {k: v for k, v in os.environ.items() if k not in ("NODE_RANK", "NNODES", "HEAD")}
    env["PATH"] = f"{sglang_python.parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", CODE / name, *flags], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == status
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["sglang_server.sh", "sglang_multi_node.sh", "genai_bench.sh"])
def test_a_shell_script_tells_how_it_is_used(name):
    done = subprocess.run(
        ["bash", CODE / name, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"bash chapter07-sglang/code/{name}" in done.stdout and "--model DIR" in done.stdout


def test_no_server_is_one_line(capsys):
    url = f"http://127.0.0.1:{free_port()}/v1"
    status = script.status_of(lambda: sglang_client.main([*SMOKE, "--base-url", url]))
    error = capsys.readouterr().err
    assert status == 1 and error.startswith(f"error: no server answers at {url}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--branches", "1"], ["--branches", "27"], ["--rounds", "2"]])
def test_a_program_that_cannot_be_is_refused(flags):
    with pytest.raises(UsageError, match=f"{flags[0]} {flags[1]} "):
        sglang_frontend.main([*SMOKE, *flags])


def test_results_that_are_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="is no folder"):
        read_genai_bench.main([str(tmp_path / "nothing")])
    with pytest.raises(UsageError, match="has no results"):
        read_genai_bench.main([write(tmp_path)])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunError, match="is no JSON"):
        read_genai_bench.main([str(tmp_path)])
    (tmp_path / "bad.json").unlink()
    with pytest.raises(RunError, match="no request was answered"):
        read_genai_bench.main([write(tmp_path, result("D(50,5)", 1, error_code=400))])
