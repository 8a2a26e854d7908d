"""The reader of /metrics against a server that counts right, wrong, or something else."""

import pytest

import read_metrics
from distlab.errors import RunError
from fake_openai import Fake, fake_openai

SMOKE = ["--preset", "smoke", "--timeout", "20"]


@pytest.fixture(autouse=True)
def soon_settled(monkeypatch):
    monkeypatch.setattr(read_metrics, "SETTLE_S", 0.2)


@pytest.mark.parametrize("prefix", ["vllm:", "paged_engine:"])
def test_what_was_counted_is_what_was_received(prefix, capsys):
    with fake_openai(prefix=prefix, delay_s=0.2, tokens=1000, answers=7) as fake:
        assert read_metrics.main([*SMOKE, "--base-url", fake.url]) == 0
    printed = capsys.readouterr().out
    assert f"{prefix} metrics" in printed
    assert "mean time to first token seconds: 500 ms" in printed
    assert "no request waited" in printed


def test_a_queue_is_told(capsys):
    with fake_openai(delay_s=0.5, waiting=5) as fake:
        assert read_metrics.main([*SMOKE, "--base-url", fake.url]) == 0
    assert "verdict: up to 5 requests waited" in capsys.readouterr().out


def test_a_server_that_tells_no_usage_cannot_be_checked():
    with fake_openai(tells_usage=False) as fake, pytest.raises(RunError, match="tells no usage"):
        read_metrics.main([*SMOKE, "--base-url", fake.url])


def test_a_server_that_loses_tokens_fails(monkeypatch, capsys):
    with fake_openai() as fake:
        monkeypatch.setattr(Fake, "counted", _losing(Fake.counted))
        assert read_metrics.main([*SMOKE, "--base-url", fake.url]) == 1
    assert "output tokens counted and received … FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other_metric 1\n", "has no metric vllm:num_requests_running or paged_engine:"),
        ("vllm:num_requests_running {{{ nonsense\n", "is no Prometheus text"),
    ],
)
def test_another_servers_metrics_are_one_line(text, message):
    with fake_openai(metrics=text) as fake, pytest.raises(RunError, match=message):
        read_metrics.main([*SMOKE, "--base-url", fake.url])


def test_a_counter_that_has_not_counted_is_zero_and_a_mean_of_nothing_unknown():
    now = read_metrics.parse('vllm:num_requests_running{engine="0"} 2\n', "here")
    assert now["num_requests_running"] == 2
    assert now["num_preemptions_total"] == 0
    assert now.mean_since("time_to_first_token_seconds", now) is None


def _losing(counted):
    def less(self: Fake) -> str:
        self.miscounted = -(self.answers // 2)
        return counted(self)

    return less
