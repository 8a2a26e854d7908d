"""The command `python -m paged_engine.server`: its mistakes in one line, and how it drains."""

import asyncio
import errno
import json
import os
import signal
import socket
import threading
from typing import Any

import httpx
import pytest

from distlab import script
from fake_engine import fake_engine
from paged_engine.server import Server, listening_socket, main, serve_engine
from server_helper import LIMIT_S, wait_until


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--model", "nowhere"], 2, "nowhere"),
        (["--port", "70000"], 2, "--port 70000 is not a port"),
        (["--chat-template", "nowhere.jinja"], 2, "--chat-template nowhere.jinja"),
        (["--max-queue", "-1"], 2, "--max-queue"),
        (["--frobnicate"], 2, "--frobnicate"),
        (["--host", "203.0.113.1"], 2, "--host 203.0.113.1"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, capsys, flags, status, said):
    assert status_of(["--model", str(tmp_path), "--port", "0", *flags]) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert said in printed.err


def test_a_port_in_use_is_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert status_of(["--model", str(tmp_path), "--port", str(port)]) == 2
    said = f"error: --port {port} is in use on 127.0.0.1; choose another\n"
    assert capsys.readouterr().err == said


def test_a_port_taken_while_the_model_is_loaded_is_one_line(capsys):
    ours = listening_socket("127.0.0.1", 0)
    port = ours.getsockname()[1]
    with ours, listening_socket("127.0.0.1", port) as other:
        other.listen()
        engine = fake_engine()
        server = Server(serve_engine(engine, "fake"), ours, "fake", drain_seconds=1)
        assert script.status_of(server.run_to_end) == 2
    assert f"--port {port} is in use" in capsys.readouterr().err


def test_a_first_token_does_not_wait_for_an_acknowledgement():
    """Nagle's algorithm would keep a stream's second piece until the client has told of the first:
    asyncio turns it off for the connections of a socket that names its protocol."""
    without_delay = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        without_delay.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect() -> None:
        with listening_socket("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(connected, sock=listener):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await reader.read()  # until the other end has closed
                writer.close()

    asyncio.run(asyncio.wait_for(connect(), LIMIT_S))
    assert without_delay == [1]


def test_a_chat_template_with_a_mistake_is_refused_at_the_start():
    with pytest.raises(script.UsageError, match="--chat-template is no Jinja template: line 1"):
        serve_engine(fake_engine(), "fake", chat_template="{% for %}")


def test_an_empty_api_key_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PAGED_ENGINE_API_KEY", " ")
    assert status_of(["--model", str(tmp_path)]) == 2
    assert "PAGED_ENGINE_API_KEY is set, but empty" in capsys.readouterr().err


def test_connections_without_a_file_are_told_of_in_one_line(caplog):
    """asyncio would tell of each, thousands of times a second, and with a traceback."""
    server = Server(serve_engine(fake_engine(), "fake"), None, "fake", drain_seconds=1)
    server.open_files = 64
    loop = asyncio.new_event_loop()
    full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    for problem in (full, full, ValueError("another"), full):
        server.tell_problem(loop, {"message": "socket.accept() failed", "exception": problem})
    loop.close()
    server.engine.stop()
    first, other = caplog.messages
    assert first.startswith("new connections wait: Too many open files; raise ulimit -n, which is")
    assert other == "socket.accept() failed"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("drain_seconds", "finishes"), [(60, True), (0.2, False)])
def test_sigterm_lets_finish_what_it_can_and_tells_the_rest(drain_seconds, finishes, stream):
    """In this process: the signal's handler is the server's, the client is a thread."""
    engine = fake_engine(step_seconds=0.02)
    listener = listening_socket("127.0.0.1", 0)
    server = Server(serve_engine(engine, "fake"), listener, "fake", drain_seconds)
    body = {"prompt": "a", "max_tokens": 40 if finishes else 500, "stream": stream}
    seen: dict[str, Any] = {}
    url = "http://{}:{}".format(*listener.getsockname())
    client = threading.Thread(target=ask_and_signal, args=(server, url, body, seen))
    client.start()
    assert server.run_to_end() == 0
    client.join(LIMIT_S)
    assert "refused" in seen["after"]
    answer: httpx.Response = seen["answer"]
    last = answer.text.rstrip().split("\n\n")[-1].removeprefix("data: ")
    if finishes:
        assert answer.status_code == 200
        assert last == "[DONE]" if stream else json.loads(last)["usage"]["completion_tokens"] == 40
    else:
        assert json.loads(last)["error"]["message"] == "The server is shutting down"
        assert answer.status_code == (200 if stream else 503)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert not server.engine._thread.is_alive()


def ask_and_signal(server: Server, url: str, body: dict, seen: dict[str, Any]) -> None:
    """Ask, send SIGTERM as soon as the engine is at work, and knock once more."""

    def signal_and_knock() -> None:
        wait_until(lambda: server.engine.engine.stats().num_running)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: not listens(url, seen))

    wait_until(lambda: server.started)
    other = threading.Thread(target=signal_and_knock)
    other.start()
    seen["answer"] = httpx.post(f"{url}/v1/completions", json=body, timeout=LIMIT_S)
    other.join(LIMIT_S)


def listens(url: str, seen: dict[str, Any]) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=LIMIT_S)
    except httpx.TransportError as error:
        seen["after"] = str(error)
        return "refused" not in str(error)
    return True


def status_of(argv: list[str]) -> int:
    try:
        return script.status_of(lambda: main(argv))
    except SystemExit as end:  # argparse's
        return int(end.code or 0)
