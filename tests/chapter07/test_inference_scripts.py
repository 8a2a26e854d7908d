"""Chunked prefill, operator fusion and hybrid placement: their parts by hand, and smoke runs."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chunked_prefill
import hybrid_placement
import operator_fusion
from distlab import script
from radix.placement import Part, by_popularity, whole_layers


@pytest.mark.parametrize("module", [chunked_prefill, hybrid_placement, operator_fusion])
def test_a_smoke_run(module, tmp_path):
    path = tmp_path / "run.json"
    assert module.main(["--preset", "smoke", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["tables"]


def test_what_operations_move_is_counted_without_the_harness():
    """RMSNorm with its residual, in whole arrays: 10 read or written, and 4 in one pass."""
    norm, *_ = operator_fusion.cases(256, 256, torch.device("cpu"))
    with torch.inference_mode(), operator_fusion.BytesMoved() as moved:
        norm.eager()
    assert moved.bytes / norm.own_bytes == pytest.approx(2.5, rel=0.01)


class FakeSGLang(BaseHTTPRequestHandler):
    """Streams a token every 5 ms, after 1 ms for each ten tokens of the prompt."""

    def log_message(self, *unused):
        pass

    def do_GET(self):
        self._answer(b'{"chunked_prefill_size": 128}')

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["input_ids"] == [0]:
            self._answer(b'data: {"error": "no"}\n\n')
            return
        self.send_response(200)
        self.end_headers()
        time.sleep(len(asked["input_ids"]) / 10_000)
        try:
            for _ in range(asked["sampling_params"]["max_new_tokens"]):
                self.wfile.write(b'data: {"text": ""}\n\n')
                self.wfile.flush()
                time.sleep(0.005)
        except OSError:
            pass  # the client has left, as it may

    def _answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def sglang_url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeSGLang)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_the_same(sglang_url):
    import asyncio

    flags = ["--preset", "smoke", "--sglang-url", sglang_url]
    seen, chunk = asyncio.run(chunked_prefill.by_http(chunked_prefill.parse_args(flags)))
    assert chunk == 128 and len(seen) == 3
    assert all(one.ttft >= 0.05 and one.gap >= 0.004 for one in seen)  # 512 tokens take 51 ms


def test_a_server_that_is_not_there_is_told(capsys):
    flags = ["--preset", "smoke", "--sglang-url", "http://127.0.0.1:9"]
    assert script.status_of(lambda: chunked_prefill.main(flags)) == 1
    assert "--sglang-url http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_bytes_are_counted_as_the_operations_move_them():
    x = torch.ones(100, 4)
    with operator_fusion.BytesMoved() as moved:
        (x.t() + 1).mul_(2)  # reads and writes 1600 bytes each, twice; a view moves nothing
    assert moved.bytes == 2 * (1600 + 1600)


def test_the_clock_that_rings_first_is_drawn_by_probability():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    noise = torch.empty_like(logits).exponential_()
    drawn = operator_fusion.gumbel(logits, noise)
    assert torch.equal(drawn, operator_fusion.race(logits, noise))
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    wanted = torch.softmax(logits[0] / operator_fusion.TEMPERATURE, -1)
    torch.testing.assert_close(shares, wanted, atol=0.015, rtol=0)  # 4 standard deviations


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 40))
def test_popularity_is_the_best_for_parts_of_one_size(counts, budget):
    uses = {Part(0, place): count for place, count in enumerate(counts)}
    sizes = dict.fromkeys(uses, 5)
    chosen = by_popularity(sizes, uses, budget)
    fits = [some for n in range(budget // 5 + 1) for some in combinations(uses, n)]
    assert sum(uses[part] for part in chosen) == max(sum(uses[p] for p in some) for some in fits)
    assert 5 * len(chosen) <= budget


def test_whole_layers_are_taken_from_the_first_on():
    sizes = {Part(layer, expert): 10 for layer in range(3) for expert in (-1, 0)}
    assert whole_layers(sizes, 45) == {Part(0, -1), Part(0, 0), Part(1, -1), Part(1, 0)}
    assert whole_layers(sizes, 19) == frozenset()


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        (chunked_prefill, ["--chunks", "32", "64"], "use 3 or more"),
        (chunked_prefill, ["--chunks", "4", "8", "16"], "--chunks 4 has no room beside 4"),
        (chunked_prefill, ["--prompt-tokens", "4000"], "does not fit into the model's 2048"),
        (operator_fusion, ["--hidden", "100"], "--hidden 100 is no multiple of 64"),
        (operator_fusion, ["--repeats", "1"], "--repeats 1 gives no median"),
        (hybrid_placement, ["--experts", "2"], "--experts 2: a token uses 2"),
        (hybrid_placement, ["--slowdown", "0.5"], "makes the slow pool fast"),
    ],
)
def test_wrong_flags(capsys, module, flags, words):
    assert script.status_of(lambda: module.main(["--preset", "smoke", *flags])) == 2
    assert words in capsys.readouterr().err
