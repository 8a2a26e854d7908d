"""The server as a process: what it computes, what benchmarks ask of it, how it ends."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from distlab.model import SIZES, Llama, load, save
from distlab.process import run_command
from distlab.service import service
from fake_engine import tiny_tokenizer
from paged_engine.detokenizer import TokenTexts

pytestmark = pytest.mark.slow
START_S, BENCH_S, END_S = 120, 240, 60
READY = re.compile(r"^ready: (http\S+)/v1 serves tiny$")
SMALL = ["--num-blocks", "256", "--max-sequences", "8", "--max-batch-tokens", "128", "--no-compile"]
# The command `vllm bench serve`, which the CPU's package cannot run: it asks for its version under
# the name of the other one.
BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and a token for each byte."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(Llama(SIZES["smoke"]), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[SimpleNamespace]:
    """One process for all tests; SIGTERM ends it with status 0, and nothing of it is left."""
    command = [sys.executable, "-m", "paged_engine", "--model", str(model), "--port", "0", *SMALL]
    with service(command, READY, start_s=START_S) as running:
        with httpx.Client(base_url=running.url, timeout=END_S) as client:
            yield SimpleNamespace(url=running.url, client=client, model=model, running=running)
        assert running.stop(END_S) == 0


def test_it_serves_what_the_model_computes(server):
    """The same greedy tokens as the plain decoder of the bench, which keeps no cache in blocks."""
    prompt = [5, 17, 200, 3, 3, 98]
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    answer = server.client.post("/v1/completions", json=body).json()
    plain, ids = load(server.model), list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(plain(torch.tensor([ids]))[0, -1].argmax()))
    tokenizer = tiny_tokenizer()
    place = TokenTexts(tokenizer, prompt)
    texts = []
    for token in ids[len(prompt) :]:
        texts.append(place.read(token)[0])
        place.take(token)
    assert answer["choices"][0]["logprobs"]["tokens"] == texts


def test_its_log_has_the_request_and_not_its_text(server):
    asked = {"prompt": "do not write this down", "max_tokens": 2}
    answer = server.client.post("/v1/completions", json=asked, headers={"x-request-id": "known"})
    assert answer.status_code == 200
    server.running.wait_for_log("known POST /v1/completions 200", END_S)
    assert "write this down" not in server.running.log


def test_vllm_bench_serve_runs_without_an_error(vllm_python, server, tmp_path):
    result = run_vllm_bench(vllm_python, server, tmp_path)
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] == 12 * 8


def test_genai_bench_runs_without_an_error(bench_python, server, tmp_path):
    """It talks in streams to /v1/chat/completions, as one client and as four."""
    for result in run_genai_bench(bench_python, server, tmp_path):
        metrics = result["aggregated_metrics"]
        # It looks now and then whether there have been enough.
        assert metrics["num_completed_requests"] == metrics["num_requests"] >= 8
        assert metrics["num_error_requests"] == 0


def run_genai_bench(python: Path, server: SimpleNamespace, folder: Path) -> list[dict[str, Any]]:
    flags = {
        "--api-backend": "openai", "--api-base": server.url, "--api-key": "none",
        "--api-model-name": "tiny", "--task": "text-to-text",
        "--model-tokenizer": str(server.model), "--traffic-scenario": "D(50,20)",
        "--max-time-per-run": "1", "--max-requests-per-run": "8",
        "--experiment-base-dir": str(folder), "--experiment-folder-name": "experiment",
        "--log-dir": str(folder / "logs"),
    }  # fmt: skip
    bench = [str(python.with_name("genai-bench")), "benchmark"]
    run_bench([*bench, "--num-concurrency", "1", "--num-concurrency", "4"], flags, {})
    runs = sorted((folder / "experiment").glob("D*.json"))
    assert len(runs) == 2, list(folder.rglob("*"))
    return [json.loads(run.read_text()) for run in runs]


def run_vllm_bench(python: Path, server: SimpleNamespace, folder: Path) -> dict[str, Any]:
    flags = {
        "--backend": "openai", "--base-url": server.url, "--endpoint": "/v1/completions",
        "--model": "tiny", "--tokenizer": str(server.model), "--dataset-name": "random",
        "--random-input-len": "20", "--random-output-len": "8", "--num-prompts": "12",
        "--max-concurrency": "4", "--result-dir": str(folder), "--result-filename": "result.json",
    }  # fmt: skip
    bench = [str(python), "-c", BENCH, "--ignore-eos", "--save-result", "--disable-tqdm"]
    run_bench(bench, flags, {"VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(folder)})
    return json.loads((folder / "result.json").read_text())


def run_bench(command: list[str], flags: dict[str, str], variables: dict[str, str]) -> None:
    """Run a benchmark of the server to its good end, with no model hub in reach."""
    words = [word for flag in flags.items() for word in flag]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    ended = run_command([*command, *words], env, timeout_s=BENCH_S)
    assert ended.status == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
