"""A service is ready when it says so, is watched while it runs, and leaves nothing behind."""

import re
import socket
import sys
import threading
import urllib.request

import psutil
import pytest

from distlab.errors import RunError
from distlab.service import Ended, Services, answers, free_port, service

READY = re.compile(r"^ready: (\S+)$")
SERVER = """
import http.server, signal, subprocess, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"here")
        if self.path == "/end":
            import os; print("told to end", file=sys.stderr, flush=True); os._exit(3)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if "child" in sys.argv:
    subprocess.Popen(["sleep", "325"])
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f"ready: http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


def command(port: int, *words: str) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), *words]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr("distlab.process.GRACE_S", 0.5)


def get(url: str) -> bytes:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=10) as answer:
        return answer.read()


@pytest.mark.parametrize("by", ["line", "address"])
def test_it_answers_when_the_block_begins_and_is_gone_when_it_ends(by):
    port = 0 if by == "line" else free_port()
    ready = READY if by == "line" else f"http://127.0.0.1:{port}/"
    with service(command(port), ready) as server:
        assert get(server.url) == b"here"
        server.check()
        assert server.stop() == 0
    assert not psutil.pid_exists(server.pid)


def test_its_log_is_read_while_it_runs():
    with service(command(0), READY) as server:
        get(f"{server.url}/page")
        assert server.wait_for_log(r'"GET (\S+) HTTP', 10)[1] == "/page"
        with pytest.raises(RunError, match="did not write 'never' within 0.1 s"):
            server.wait_for_log("never", 0.1)


def test_one_that_ends_is_named_with_its_last_words():
    with Services() as group:
        first = group.start("first", command(0), READY)
        second = group.start("second", command(0), READY)
        group.check()
        get(f"{second.url}/end")
        second.job.process.wait(10)
        with pytest.raises(Ended, match="(?s)second ended with status 3: .*told to end"):
            group.check()
        assert get(first.url) == b"here"
    assert not psutil.pid_exists(first.pid)


def test_what_does_not_stop_or_leaves_a_child_is_told_and_ended():
    with (
        service(command(0, "stubborn"), READY, name="it") as server,
        pytest.raises(RunError, match="it did not end within 0.2 s of SIGTERM"),
    ):
        server.stop(0.2)
    assert not psutil.pid_exists(server.pid)
    with (
        service(command(0, "child"), READY, name="it") as server,
        pytest.raises(RunError, match="it left running: .*sleep 325"),
    ):
        server.stop()


def test_one_that_ends_too_early_or_never_comes_is_one_line():
    early = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        pytest.raises(RunError, match="it: the server ended before it was ready: no such model"),
        service(early, READY, name="it"),
    ):
        pytest.fail("it was never ready")
    with (
        pytest.raises(RunError, match="it did not write .* within 0.2 s"),
        service(["sleep", "326"], READY, name="it", start_s=0.2),
    ):
        pytest.fail("it was never ready")


def test_an_answer_that_is_no_http_is_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def babble() -> None:
            connection, _ = stranger.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail ready\r\n")
            connection.close()

        thread = threading.Thread(target=babble, daemon=True)
        thread.start()
        assert not answers(f"http://127.0.0.1:{stranger.getsockname()[1]}/")
        thread.join(5)
