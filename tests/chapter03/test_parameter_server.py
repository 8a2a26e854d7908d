"""The parameter server: equal to DDP, every gradient applied once, staleness counted, no hang."""

import pytest
import torch
import torch.distributed as dist

from distlab import script
from distlab.cluster import sweep
from distlab.errors import RunError, UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu"]


class Counter:
    """A replica of two parameters whose gradient is always one; it may fail."""

    def __init__(self, fails_at=None):
        self.size, self.count, self.fails_at = 2, 0, fails_at
        self.seen = []

    def load(self, flat):
        self.seen.append(float(flat[0]))

    def gradient(self):
        self.count += 1
        if self.count == self.fails_at:
            raise ValueError("this worker is broken")
        return torch.ones(2)


def trained(job, design, share="full", fails_at=None):
    """One training of five steps by counters; the parameters, the staleness, what was seen."""
    from ddp.server_training import Log
    from parameter_server import take_part

    group = dist.new_group(range(1, job.world_size))
    log, parameters = Log(5, learning_rate=1.0, share=share), torch.zeros(2)
    replica = Counter(fails_at if job.rank == 1 else None)
    take_part(design, job, group, replica, parameters, log)
    return parameters.tolist(), log.staleness, replica.seen


def test_a_synchronous_server_applies_the_mean_once_a_step():
    (parameters, staleness, _), *workers = spawn(trained, 3, "synchronous", timeout_s=60)
    assert parameters == [-5.0, -5.0]
    assert staleness == [0] * 10
    assert [seen for _, _, seen in workers] == [[0.0, -1.0, -2.0, -3.0, -4.0]] * 2


@pytest.mark.parametrize(("share", "moved"), [("full", -15.0), ("K-th", -5.0)])
def test_an_asynchronous_server_applies_every_gradient_once(share, moved):
    (parameters, staleness, _), *workers = spawn(trained, 4, "asynchronous", share, timeout_s=60)
    assert parameters == pytest.approx([moved] * 2)
    assert len(staleness) == 15
    assert all(0 <= stale <= before for before, stale in enumerate(staleness))
    # each of the applied ones was computed once, and each worker's last came too late
    assert sum(len(seen) for _, _, seen in workers) == 15 + 3
    for _, _, seen in workers:
        assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("design", ["synchronous", "asynchronous", "all-reduce"])
@pytest.mark.slow
def test_a_broken_worker_ends_the_job_and_is_named(design):
    with pytest.raises(RunError, match="(?s)rank 1 failed.*this worker is broken"):
        spawn(trained, 3, design, "full", 3, timeout_s=15)


def equality(job, change=lambda module: None):
    """The checks of the script's first part on this rank."""
    import parameter_server
    from ddp.server_measurements import prove_equality

    change(parameter_server)
    args = parameter_server.parse_args(SMOKE)
    group = dist.new_group(range(1, job.world_size))
    with script.run(args) as run:
        prove_equality(run, args, job, group, parameter_server.take_part)
    return {item.name: item.ok for item in run.checks}


def a_sum(module):
    """The server forgets to divide by the workers."""
    mean = module.serve_synchronously

    def serve(parameters, workers, log):
        log.learning_rate *= len(workers)
        mean(parameters, workers, log)

    module.serve_synchronously = serve


@pytest.mark.slow
def test_four_workers_equal_ddp():
    for checks in spawn(equality, 5, timeout_s=120):
        assert len(checks) == 5 and all(checks.values())


@pytest.mark.slow
def test_a_sum_where_the_mean_belongs_is_noticed():
    checks = spawn(equality, 3, a_sum, timeout_s=60)[0]
    wrong = ["synchronous: losses equal DDP's", "synchronous: parameters equal DDP's"]
    assert [name for name, ok in checks.items() if not ok] == wrong


def test_predictions_by_hand():
    from ddp.server_measurements import largest_stable_rate, predicted_step, stable_rate

    # 100 bytes at 1 ms a byte; four workers compute 2 s
    compute, n, beta = [2.0] * 4, 100.0, 1e-3
    assert predicted_step("all-reduce", n, compute, beta) == pytest.approx(2.15)
    assert predicted_step("synchronous", n, compute, beta) == pytest.approx(2.8)
    assert predicted_step("asynchronous", n, compute, beta) == pytest.approx(2.2)
    assert predicted_step("asynchronous", n, [0.1] * 4, beta) == pytest.approx(0.4)  # the link
    # one needs 8 s: 3/2 + 1/8 gradients a second when nothing is to be sent
    slow = [2.0, 2.0, 2.0, 8.0]
    assert predicted_step("synchronous", 0.0, slow, beta) == 8.0
    assert predicted_step("asynchronous", 0.0, slow, beta) == pytest.approx(4 / 1.625)
    for delay in (0, 1, 4):
        assert largest_stable_rate(delay) == pytest.approx(stable_rate(delay), abs=0.02)
    assert [stable_rate(0), stable_rate(1)] == pytest.approx([2.0, 1.0])


def test_the_bytes_of_a_training_by_hand():
    from ddp.server_measurements import payload

    # a ring of two sends and receives each half twice; a server's link carries two whole copies
    assert payload("all-reduce", 100.0, steps=3, workers=2) == 2 * 100 * 3
    assert payload("synchronous", 100.0, steps=3, workers=2) == (3 + 3 + 1) * 2 * 100
    assert payload("asynchronous", 100.0, steps=3, workers=2) == (3 + 3 + 1 + 1 + 1) * 2 * 100


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "nccl"], "--backend nccl is wrong because NCCL cannot receive"),
        (["--link-steps", "2"], "--link-steps 2 gives no median; use 3 or more"),
        (["--workers", "2", "9"], "--workers 9 is too many nodes here; use 1 to 8"),
        (["--rate", "slow"], "--rate slow is wrong because"),
        (["--link-rate", "9"], "--link-rate 9 is wrong because"),
        (["--heads", "3"], "3"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    import parameter_server

    with pytest.raises(UsageError, match=words):
        parameter_server.parse_args([*SMOKE, *flags])


def test_a_machine_without_virtual_clusters_skips(monkeypatch):
    import parameter_server

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sweep, "unavailable", lambda: "no namespaces here")
    with pytest.raises(script.Skipped, match="no namespaces here"):
        parameter_server.main(SMOKE)
