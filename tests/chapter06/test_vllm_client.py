"""The client against a server that does as it is told: the load, the check, and every refusal."""

import errno
import json

import anyio
import pytest

import vllm_client
from distlab import script
from distlab.errors import RunError
from distlab.serving import clients
from fake_openai import fake_openai

SMOKE = ["--preset", "smoke", "--timeout", "20"]


def test_the_concurrency_is_what_was_asked_for():
    with fake_openai(delay_s=0.05) as fake:
        flags = ["--base-url", fake.url, "--requests", "12", "--concurrency", "6"]
        assert vllm_client.main([*SMOKE, *flags]) == 0
        assert fake.most_running == 6
        assert fake.answers == 4 + 12 + 2  # warm-up, load, and the two of the check


def test_every_answer_is_in_the_table(tmp_path, capsys):
    with fake_openai() as fake:
        assert vllm_client.main([*SMOKE, "--base-url", fake.url, "--concurrency", "1", "3"]) == 0
    printed = capsys.readouterr().out
    assert "output tokens at 3: " in printed
    assert printed.count("… ok") == 3


@pytest.mark.parametrize(
    "stream", [["def ", "answer", "(): ", "return ", "43"], ["def answer(): return 42"]]
)
def test_a_stream_that_says_something_else_fails(stream):
    with fake_openai(streamed_text=stream) as fake:
        assert vllm_client.main([*SMOKE, "--base-url", fake.url]) == 1


def test_a_server_that_tells_no_usage_has_no_throughput(tmp_path, capsys):
    """Unknown, not 0 tok/s; and a last piece of text that is null is no text."""
    file = tmp_path / "record.json"
    with fake_openai(tells_usage=False, last_text_is_null=True) as fake:
        flags = ["--base-url", fake.url, "--concurrency", "2", "--json", str(file)]
        assert vllm_client.main([*SMOKE, *flags]) == 0
    printed = capsys.readouterr().out
    assert "output tokens at 2: unknown" in printed
    assert "this server tells no usage" in printed and "0 tok/s" not in printed
    assert json.loads(file.read_text())["metrics"]["output_tokens_at_2"]["value"] is None


def test_a_proxy_is_not_asked_for_this_machine_and_one_that_fails_is_told(monkeypatch, capsys):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with fake_openai() as fake:
        assert vllm_client.main([*SMOKE, "--base-url", fake.url]) == 0
    far = [*SMOKE, "--base-url", "http://far.example/v1"]
    assert script.status_of(lambda: vllm_client.main(far)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the proxy for http://far.example/v1 cannot be used: ")
    assert error.count("\n") == 1


def test_no_server_is_one_line(capsys):
    with fake_openai() as fake:
        url = fake.url
    assert script.status_of(lambda: vllm_client.main([*SMOKE, "--base-url", url])) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: no server answers at {url} (")
    assert error.count("\n") == 1 and "--base-url" in error


def test_each_request_has_an_open_file(monkeypatch):
    allowed = []
    monkeypatch.setattr(clients, "allow_open_files", allowed.append)
    with fake_openai() as fake:
        assert vllm_client.main([*SMOKE, "--base-url", fake.url, "--concurrency", "500"]) == 0
    assert max(allowed) > 500


def test_no_open_file_left_is_told_as_such(monkeypatch, capsys):
    async def refused(*args, **settings):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(anyio, "connect_tcp", refused)
    flags = [*SMOKE, "--base-url", "http://127.0.0.1:9/v1"]
    assert script.status_of(lambda: vllm_client.main(flags)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: this process or machine has no open file left for another ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"status": 500}, [], "answered 500: .*it is refused"),
        ({"status": 401}, [], "answered 401: .*it is refused"),
        ({"delay_s": 2.0}, ["--timeout", "0.3"], "did not answer within 0.3 s"),
        ({}, ["--model", "other"], r"has no model other; it has \['fake'\]"),
        ({"models": []}, [], r"has no model; it has \[\]"),
    ],
)
def test_a_refusal_is_one_line(settings, flags, message):
    with fake_openai(**settings) as fake, pytest.raises(RunError, match=message):
        vllm_client.main([*SMOKE, "--base-url", fake.url, *flags])


@pytest.mark.parametrize("flags", [["--requests", "0"], ["--concurrency", "x"], ["--timeout", "0"]])
def test_bad_arguments_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        vllm_client.main([*SMOKE, *flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
