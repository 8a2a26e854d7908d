"""router.py as a process, kv_duplication.py, and compare_routers.py without its peers."""

import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

import compare_routers
import kv_duplication
import router
from distlab.errors import RunError, Skipped, UsageError
from llm_router.contenders import OURS, Contender, fake_workers
from llm_router.serving import listening, written


def test_the_router_starts_serves_and_drains():
    with (
        fake_workers(2, "--decode-ms", "400") as (workers, _),
        Contender(OURS, "least_loaded").running(compare_routers.ROUTER, workers) as served,
    ):
        body = {"prompt": "w1", "max_tokens": 2, "temperature": 0}
        asking = subprocess.Popen(
            [sys.executable, "-c", "import sys, urllib.request as u; "
             "print(u.urlopen(u.Request(*sys.argv[1:2], sys.argv[2].encode())).status)",
             f"{served.url}/v1/completions", json.dumps(body)], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        control = served.log.split("control plane at ")[1].split()[0]
        while not any(w["load"] for w in httpx.get(f"{control}/workers").json()):
            assert asking.poll() is None
        served.job.process.send_signal(signal.SIGTERM)
        assert asking.communicate(timeout=20)[0].strip() == "200"
        assert served.job.wait(20) == 0, served.log


def test_half_a_request_and_a_long_one_do_not_hold_the_router():
    with (
        fake_workers(1) as (workers, _),
        Contender(OURS, "least_loaded").running(compare_routers.ROUTER, workers) as served,
    ):
        httpx.post(f"{workers[0].url}/fault", json={"mode": "hang"})
        _, control, port = served.log.split("control plane at ")[1].split()[0].split(":")
        body = b'{"prompt": "w1"}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
        with (
            socket.create_connection((control.strip("/"), int(port))) as half,
            socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as long,
        ):
            half.sendall(b"POST /workers HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{")
            long.sendall(head + body)
            while not httpx.get(f"http:{control}:{port}/workers").json()[0]["load"]:
                time.sleep(0.05)
            served.job.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            served.job.process.send_signal(signal.SIGTERM)
            assert served.job.wait(10) == 0, served.log
            assert long.recv(100).startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_where_it_listens(host):
    try:
        with listening(host, 0, "--port") as made:
            assert "{}:{}".format(*written(made)).startswith(f"[{host}]:" if ":" in host else host)
    except RunError:
        pytest.skip("this machine has no IPv6")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "best"], "--policy best is unknown"),
        (["--workers", "localhost"], "is no address"),
        (["--workers", "http://a:1", "http://a:1/"], "names a worker twice"),
        (["--kv-events", "ipc://a", "--workers"], "--kv-events has 1 endpoints for 0"),
        (["--kv-events", "ipc://a", "--policy", "round_robin"], "--policy cache_aware only"),
    ],
)
def test_wrong_flags_of_the_router(flags, message):
    with pytest.raises(UsageError, match=message):
        router.main(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "1"], "nobody to share with"),
        (["--blocks", "20"], "hold fewer than 4 prompts"),
        (["--documents", "3"], "all fit into"),
        (["--requests", "10"], "fill no cache"),
    ],
)
def test_wrong_flags_of_kv_duplication(flags, message):
    with pytest.raises(UsageError, match=message):
        kv_duplication.main(["--preset", "smoke", *flags])


def test_copies_cost_what_is_predicted(tmp_path):
    record = tmp_path / "record.json"
    assert kv_duplication.main(["--preset", "smoke", "--json", str(record)]) == 0
    rows = json.loads(record.read_text())["tables"]["duplication"]["rows"]
    assert [row[0] for row in rows][:2] == ["round_robin", "least_loaded"]


@pytest.mark.slow
def test_the_comparison_of_routers_alone():
    flags = ["--preset", "smoke", "--peers", "--requests", "60", "--fault-seconds", "3"]
    assert compare_routers.main([*flags, "--parts", "trace", "faults"]) == 0


def test_wrong_flags_of_the_comparison(monkeypatch):
    with pytest.raises(UsageError, match="--peers nginx is unknown; use sglang-router"):
        compare_routers.main(["--peers", "nginx"])
    monkeypatch.setattr(compare_routers, "which", lambda name: None)
    with pytest.raises(Skipped, match="install it"):
        compare_routers.main(["--parts", "overhead"])
