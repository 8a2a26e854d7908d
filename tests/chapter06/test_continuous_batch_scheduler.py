"""Static and continuous batching by hand, and the simulated engine against the real scheduler."""

import json
from argparse import Namespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import continuous_batch_scheduler as batching
from distlab import script
from paged_engine.block_manager import BlockManager
from paged_engine.config import EngineConfig
from paged_engine.request import Request
from paged_engine.sampling_params import SamplingParams
from paged_engine.scheduler import Scheduler

STEP = np.array([1.0, 0.0, 0.0])  # a step takes a second


def serve(policy, lengths, slots=2, budget=100, arrivals=None, cost=STEP):
    engine = batching.SimulatedEngine(Namespace(slots=slots, budget=budget), cost)
    arrivals = np.zeros(len(lengths)) if arrivals is None else arrivals
    jobs = batching.make_jobs(arrivals, np.array(lengths))
    return batching.serve(jobs, engine, slots, policy), engine


def test_a_static_batch_waits_for_its_longest():
    served, _ = serve("static", [(5, 1), (5, 3), (5, 2)])
    assert served.busy == [2, 1, 1, 1, 1]
    assert served.latencies.tolist() == [1, 3, 5]
    assert served.busy_percent == pytest.approx(60) and served.throughput == 6 / 5
    assert batching.busy_in_static_batches(np.array([1, 3, 2]), 2) == pytest.approx(60)


def test_a_free_slot_is_taken_at_once():
    served, _ = serve("continuous", [(5, 1), (5, 3), (5, 2)])
    assert served.busy == [2, 2, 2]
    assert served.latencies.tolist() == [1, 3, 3]
    assert [job.started for job in served.jobs] == [0, 0, 1]


def test_idle_time_is_skipped_and_late_comers_wait():
    arrivals = np.array([1.0, 1.5, 9.0])
    static, _ = serve("static", [(5, 3), (5, 1), (5, 1)], arrivals=arrivals)
    assert static.latencies.tolist() == [3, 3.5, 1] and static.seconds == 9
    continuous, _ = serve("continuous", [(5, 3), (5, 1), (5, 1)], arrivals=arrivals)
    assert continuous.latencies.tolist() == [3, 1.5, 1]


def test_a_prompt_longer_than_the_budget_comes_in_chunks():
    served, engine = serve("continuous", [(10, 2)], budget=4)
    assert engine.steps == [(1, 4, 10), (1, 4, 26), (1, 2, 19), (1, 1, 11)]
    assert served.busy == [0, 0, 1, 1] and served.jobs[0].started == 2


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=20),
    slots=st.integers(1, 5),
    extra=st.integers(0, 40),
    policy=st.sampled_from(["static", "continuous"]),
    gap=st.floats(0, 8),
)
def test_the_simulation_schedules_as_the_engine_does(lengths, slots, extra, policy, gap):
    arrivals = gap * np.arange(len(lengths))
    budget = slots + extra
    simulated, _ = serve(policy, lengths, slots, budget, arrivals)
    jobs = batching.make_jobs(arrivals, np.array(lengths))
    real = batching.serve(jobs, SchedulerOnly(slots, budget), slots, policy)
    assert simulated.busy == real.busy
    assert [job.finished for job in simulated.jobs] == [job.finished for job in real.jobs]


class SchedulerOnly:
    """paged_engine's scheduler and block manager without a model: a step takes a second."""

    def __init__(self, slots: int, budget: int) -> None:
        blocks = BlockManager(slots * 8, 16, prefix_caching=False)
        config = EngineConfig(
            "no model", max_batch_tokens=budget, max_sequences=slots, max_model_len=64
        )
        self.scheduler = Scheduler(config, blocks)
        self.jobs = {}

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.requests)

    def add(self, job) -> None:
        params = SamplingParams(max_tokens=job.output, ignore_eos=True)
        request = Request(str(len(self.jobs)), [1] * job.prompt, params)
        self.jobs[request.sequences[0]] = job
        self.scheduler.add(request)

    def step(self):
        batch = self.scheduler.schedule()
        pairs = self.scheduler.fork_samples(batch)
        self.scheduler.update(batch, [0] * len(pairs))
        advanced = [self.jobs[sequence] for _, sequence in pairs]
        for job in advanced:
            job.written += 1
        return advanced, 1.0


@pytest.mark.parametrize("cost", [[3e-3, 2e-5, 1e-7], [3e-3, 2e-5, 0.0], [1e-3, 0.0, 2e-6]])
def test_the_cost_of_a_step_is_found_again(cost):
    generator = np.random.default_rng(0)
    steps = np.stack([np.ones(300), *generator.integers(1, 500, (2, 300))], axis=1)
    seconds = steps @ cost
    seconds[::50] *= 20  # interrupted
    np.testing.assert_allclose(batching.fit_cost(steps, seconds), cost, rtol=1e-6, atol=1e-12)


def test_no_cost_is_negative():
    steps = np.stack([np.ones(50), np.arange(50), np.zeros(50)], axis=1)
    cost = batching.fit_cost(steps, 1.0 - 0.001 * np.arange(50))
    assert cost.min() >= 0 and cost[1] == 0 and cost[0] == pytest.approx(0.9755)


@pytest.mark.slow
def test_a_smoke_run(tmp_path):
    path = tmp_path / "run.json"
    flags = ["--preset", "smoke", "--device", "cpu", "--requests", "12", "--json", str(path)]
    assert batching.main(flags) == 0
    record = json.loads(path.read_text())
    assert set(record["figures"]) == {"continuous_latency", "continuous_slots"}
    slots = [row["label"] for row in record["figures"]["continuous_slots"]["series"]]
    assert slots == [f"{p} {i}" for p in ("static", "continuous") for i in range(4)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--load", "1"], "--load 1 has no steady state"),
        (["--slots", "1"], "--slots 1 batches nothing"),
        (["--requests", "7"], "--requests 7 are not two batches of --slots 4; use at least 8"),
        (["--budget", "3"], "--budget 3 is less than a token for each of 4 slots"),
        (["--model", "none"], "--model none is no size and no folder"),
    ],
)
def test_wrong_flags(capsys, flags, words):
    status = script.status_of(lambda: batching.main(["--preset", "smoke", *flags]))
    printed = capsys.readouterr()
    assert status == 2 and not printed.out
    assert printed.err.count("\n") == 1 and words in printed.err


def test_lengths_beyond_the_models_are_one_line(capsys):
    status = script.status_of(lambda: batching.main(["--preset", "smoke", "--longest", "5000"]))
    printed = capsys.readouterr()
    assert status == 2 and printed.err.count("\n") == 1 and "--longest 5000 tokens" in printed.err


def test_a_folder_without_a_model_is_one_line(capsys, tmp_path):
    flags = ["--preset", "smoke", "--model", str(tmp_path)]
    status = script.status_of(lambda: batching.main(flags))
    printed = capsys.readouterr()
    assert status in (1, 2) and printed.err.count("\n") == 1 and str(tmp_path) in printed.err
