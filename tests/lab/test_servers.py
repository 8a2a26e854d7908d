"""Servers live as long as their section, and are waited for."""

import socket

import pytest

from distlab.errors import RunError
from distlab.lab import blocks, lessons, servers
from distlab.lab.blocks import run_block
from distlab.lab.lessons import read_blocks
from distlab.lab.servers import Servers
from processes import running_below


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A checkout of its own, without GPUs."""
    for module in (blocks, lessons, servers):
        monkeypatch.setattr(module, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(blocks, "gpu_count", lambda: 0)
    monkeypatch.setattr(servers, "READY_TIMEOUT_S", 10.0)
    monkeypatch.setattr("distlab.process.GRACE_S", 0.5)
    return tmp_path


LESSON = """# One

```bash background ready=http://127.0.0.1:{port}/page.txt
echo x >> starts
python -m http.server {port} --bind 127.0.0.1
```

```bash
python -c "from urllib.request import urlopen as get; \\
    print(get('http://127.0.0.1:{port}/page.txt').read().decode())"
```

# Two

```bash
echo alone
```
"""


@pytest.fixture
def lesson(checkout):
    (checkout / "page.txt").write_text("hello\n")
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    path = checkout / "main.md"
    path.write_text(LESSON.format(port=port))
    return read_blocks(path)


def test_a_server_lives_from_its_block_to_the_end_of_its_section(lesson, checkout, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a user's proxy has no say in it
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server, asks, alone = lesson
    with Servers("smoke", checkout / "records") as running:
        running.start_for(asks)  # it starts what its section needs
        assert run_block(asks, "smoke", checkout / "records").stdout.strip() == "hello"
        running.start_for(server)
        running.start_for(asks)
        assert len(running_below("http.server")) == 1
        assert (checkout / "starts").read_text() == "x\n"
        running.start_for(alone)
        assert running_below("http.server") == []


def test_a_server_ends_with_the_lesson_and_after_an_error(lesson, checkout):
    with pytest.raises(ZeroDivisionError), Servers("smoke", checkout / "records") as running:
        running.start_for(lesson[0])
        assert len(running_below("http.server")) == 1
        raise ZeroDivisionError
    assert running_below("http.server") == []


def test_a_server_that_ends_before_it_is_ready_says_why(checkout):
    broken = 'echo "no such model" >&2; exit 3'
    path = checkout / "main.md"
    path.write_text(f"```bash background ready=http://127.0.0.1:9/\n{broken}\n```\n")
    with (
        Servers("smoke", checkout / "records") as running,
        pytest.raises(RunError, match="main.md:1: the server ended before.*no such model"),
    ):
        running.start_for(read_blocks(path)[0])


def test_a_server_that_never_answers_is_ended(checkout, monkeypatch):
    monkeypatch.setattr(servers, "READY_TIMEOUT_S", 0.5)
    path = checkout / "main.md"
    path.write_text("```bash background ready=http://127.0.0.1:9/\nexec sleep 321\n```\n")
    with Servers("smoke", checkout / "records") as running:
        with pytest.raises(RunError, match="http://127.0.0.1:9/ did not answer within 0.5 s"):
            running.start_for(read_blocks(path)[0])
        assert running_below("321") == []


def test_a_stranger_at_the_servers_address_is_not_taken_for_it(lesson, checkout):
    with Servers("smoke", checkout / "records") as first:
        first.start_for(lesson[0])
        with (
            Servers("smoke", checkout / "records") as second,
            pytest.raises(RunError, match="answers before the server is started; end it"),
        ):
            second.start_for(lesson[0])
        assert len(running_below("http.server")) == 1
