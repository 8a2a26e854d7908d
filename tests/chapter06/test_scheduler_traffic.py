"""Any traffic, at any limits: every invariant at every step, and each request's exact tokens."""

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distlab.errors import UsageError
from fake_runner import EOS, MOMENTS, VOCABULARY, Engine, engine_of
from paged_engine.request import Request
from paged_engine.sampling_params import SamplingParams
from paged_engine.scheduler import Scheduler

LAST_ARRIVAL = 12


@dataclass
class Traffic:
    """Limits, requests with the step at which they arrive, and what ends some of them early."""

    num_blocks: int
    block_size: int
    caching: bool
    policy: str
    limits: dict[str, int]
    arrivals: list[tuple[int, list[int], SamplingParams]]  # step, prompt
    departures: list[tuple[int, str, int, int | None]]  # step, moment, request, one sample or all


@st.composite
def traffic(draw: st.DrawFn) -> Traffic:
    small = st.integers(1, 6)
    prefix = draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=12))
    arrivals = []
    for _ in range(draw(st.integers(2, 8))):
        own = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=10))
        prompt = prefix[: draw(st.integers(0, len(prefix)))] + own
        most = draw(st.integers(1, 16))
        params = SamplingParams(
            n=draw(st.integers(1, 3)),
            max_tokens=most,
            min_tokens=draw(st.integers(0, most)),
            ignore_eos=draw(st.booleans()),
        )
        arrivals.append((draw(st.integers(0, LAST_ARRIVAL)), prompt, params))
    sample = st.none() | st.integers(0, 2)
    moments = st.tuples(st.integers(0, 30), st.sampled_from(MOMENTS), st.integers(0, 7), sample)
    block_size = draw(small)
    return Traffic(
        num_blocks=-(-draw(st.integers(12, 40)) // block_size),
        block_size=block_size,
        caching=draw(st.booleans()),
        policy=draw(st.sampled_from(["hash", "radix"])),
        limits={
            "max_batch_tokens": draw(st.integers(1, 24)),
            "max_sequences": draw(small),
            "max_model_len": draw(st.integers(20, 40)),
        },
        arrivals=sorted(arrivals, key=lambda arrival: arrival[0]),
        departures=draw(st.lists(moments, max_size=4)),
    )


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(traffic())
def test_any_traffic_gives_each_request_the_tokens_of_a_run_alone(case: Traffic) -> None:
    """Whoever is first in line gets a token at each step, and loses it to nobody.

    Hence nobody starves: no more steps are needed than all sequences have tokens together.
    """
    own = case.num_blocks, case.block_size, case.caching, case.policy
    engine = engine_of(*own, **case.limits)
    scheduler = engine.scheduler
    pending = [
        (when, Request(str(name), prompt, params, eos_token_ids=frozenset([EOS])))
        for name, (when, prompt, params) in enumerate(case.arrivals)
    ]
    step, bound = 0, LAST_ARRIVAL + 1

    def leave(now: str) -> None:
        for when, moment, who, sample in case.departures:
            if (when, moment) == (step, now):
                _end(scheduler, str(who), sample)

    while pending or scheduler.requests:
        while pending and pending[0][0] <= step:
            bound += _add(engine, pending.pop(0)[1])
        engine.step(leave)
        step += 1
        assert step <= bound, "a request starves"
    engine.check_outputs()
    assert scheduler.blocks.num_free == case.num_blocks
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)


def _add(engine: Engine, request: Request) -> int:
    """Queue the request if it is possible; returns how many tokens it may come to."""
    try:
        engine.add(request)
    except UsageError:
        return 0
    return request.params.n * (len(request.prompt_ids) + request.params.max_tokens)


def _end(scheduler: Scheduler, request_id: str, sample: int | None) -> None:
    """Cancel a request, or end one of its samples, as a stop string does."""
    if sample is None:
        scheduler.cancel(request_id)
    elif request_id in scheduler.requests:
        for one in scheduler.requests[request_id].sequences[sample : sample + 1]:
            if one.num_output:
                scheduler.finish(one, "cancelled")
