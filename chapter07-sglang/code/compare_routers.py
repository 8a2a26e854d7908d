"""Our router against sglang-router, smg and vllm-router: same workers, same load, in turns.

Three questions. What does a router cost? One core for the router, the other for a worker that
answers at once and for wrk, which is written in C: the work done is divided by the processor
seconds that the router used, so that a busy machine does not decide. Does it keep prefix caches
warm and workers evenly busy? A trace of conversations goes to four workers with small caches. And
what does a client see when a worker is killed, hangs, or refuses?

Run:
    python chapter07-sglang/code/compare_routers.py
    python chapter07-sglang/code/compare_routers.py --parts faults --peers smg

You should see: more requests and events from a core than the best of them, the highest hit rate
with the load as even, no stream lost, a hanging worker noticed, a returning one back in seconds.
"""

import asyncio
import signal
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import numpy as np
import uvloop

from distlab import script
from distlab.lab.blocks import environment_python
from distlab.script import Run, Skipped, UsageError
from distlab.service import Service
from llm_router import contenders
from llm_router.contenders import OURS, PEERS, Contender, Outcome, call, fake_workers
from llm_router.fake_model import save_tokenizer
from llm_router.traces import zipf_trace

PARTS = ("overhead", "trace", "faults")
PRESETS = {
    "smoke": {"rounds": 1, "seconds": 1.0, "requests": 150, "seeds": 1, "fault_seconds": 2.0,
              "return_seconds": 6.0},
    "laptop": {"rounds": 5, "seconds": 2.0, "requests": 2000, "seeds": 3, "fault_seconds": 8.0,
               "return_seconds": 70.0},
    "gpu": {"rounds": 9, "seconds": 3.0, "requests": 2000, "seeds": 5, "fault_seconds": 12.0,
            "return_seconds": 70.0},
}  # fmt: skip
ROUTER = Path(__file__).with_name("router.py")
BODY = {"model": "fake", "prompt": "x" * 900, "max_tokens": 64}
EVENTS, CLIENTS, AT_ONCE = 64, 32, 16
ANSWER = {"model": "fake", "max_tokens": 20, "temperature": 0}
ADVANTAGE = 1.5
EVEN = 1.10  # requests of the busiest worker, over the mean
PROBES = 3  # requests of a router's own, at most, until a worker is used again


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if which("wrk") is None and "overhead" in args.parts:
        raise Skipped("wrk makes the load; install it (Debian: apt install wrk)")
    python = environment_python("routers") if args.peers else None
    with script.run(args) as run:
        if "overhead" in args.parts:
            measure_overhead(run, args, python)
        if "trace" in args.parts:
            replay_trace(run, args, python)
        if "faults" in args.parts:
            plant_faults(run, args, python)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add = parser.add_argument
    add("--parts", nargs="+", default=[*PARTS], choices=PARTS)
    add("--peers", nargs="*", default=[*PEERS], help=f"of {', '.join(PEERS)}; none: ours alone")
    add("--rounds", type=script.positive_int, help="in turns, of the overhead")
    add("--seconds", type=script.positive_float, help="of load, each time")
    add("--requests", type=script.positive_int, help="of a trace")
    add("--seeds", type=script.positive_int, help="traces")
    add("--fault-seconds", type=script.positive_float, help="of load around a fault")
    add("--return-seconds", type=script.positive_float, help="until a worker must be in use again")
    args = parser.parse_args(argv)
    if unknown := set(args.peers) - PEERS.keys():
        raise UsageError(f"--peers {' '.join(sorted(unknown))} is unknown; use {', '.join(PEERS)}")
    return args  # type: ignore[no-any-return]


def all_alike(args: Namespace, python: Path | None) -> list[Contender]:
    """Ours and the peers, each with the policy that looks at least."""
    return [Contender(OURS, "power_of_two")] + [
        Contender(name, "round_robin", python) for name in args.peers
    ]


# ---- what it costs


def measure_overhead(run: Run, args: Namespace, python: Path | None) -> None:
    rates: dict[str, dict[str, list[float]]] = {"requests": {}, "events": {}}
    ttft: dict[str, list[float]] = {}
    with ExitStack() as stack:
        flags = ("--fixed", "--events", str(EVENTS))
        workers, _ = stack.enter_context(fake_workers(2, *flags, core=True))
        running = [
            (one.name, stack.enter_context(one.running(ROUTER, workers, core=True)))
            for one in all_alike(args, python)
        ]
        for _ in run.progress(range(args.rounds), "rounds"):
            for name, router in running:
                for what, body, each in (  # each: what a request counts for
                    ("requests", BODY, 1),
                    ("events", {**BODY, "stream": True}, EVENTS),
                ):
                    before = contenders.processor_seconds(router.pid)
                    done = contenders.by_wrk(router.url, body, CLIENTS, args.seconds)
                    used = contenders.processor_seconds(router.pid) - before
                    rates[what].setdefault(name, []).append(done * each / used)
                ttft.setdefault(name, []).append(uvloop.run(added_ttft(router, workers[0])))
    median = {
        what: {name: statistics.median(values) for name, values in of.items()}
        for what, of in rates.items()
    }
    run.table(
        "overhead",
        ["router", "requests per core second", "events per core second", "added TTFT ms, p50"],
        [[name, median["requests"][name], median["events"][name], statistics.median(ttft[name])]
         for name, _ in running],
        caption=f"Overhead, {CLIENTS} connections; work over the router's own processor seconds",
    )  # fmt: skip
    for what, of in rates.items():
        for name in args.peers:
            run.check_within(
                f"{what} per core second against {name}",
                [own / its for own, its in zip(of[OURS], of[name], strict=True)],
                at_least=ADVANTAGE, unit="times", more="--rounds",
            )  # fmt: skip
    if args.peers:
        least = min(statistics.median(ttft[name]) for name in args.peers)
        own = statistics.median(ttft[OURS])
        run.check_below("added TTFT, p50", own, least, "ms, the best of theirs", of_time=True)
        run.check_above("and no router is faster than none", min(own, least), 0.0, of_time=True)


async def added_ttft(router: Service, worker: Service, count: int = 60) -> float:
    """Median milliseconds to the first event through the router, less the same without it.

    On connections that are kept, and in turns, each of the two first in every other one.
    """
    urls, seen = [router.url, worker.url], dict[str, list[float]]()
    async with contenders.kept(urls) as kept:
        for turn in range(count + 4):
            for url in urls if turn % 2 else reversed(urls):
                took = await contenders.first_event(*kept[url], {**BODY, "stream": True})
                if turn >= 4:
                    seen.setdefault(url, []).append(took)
                await asyncio.sleep(0.005)
    return 1000 * (statistics.median(seen[router.url]) - statistics.median(seen[worker.url]))


# ---- warm caches, even load


def replay_trace(run: Run, args: Namespace, python: Path | None) -> None:
    traces = [zipf_trace(args.requests, seed) for seed in range(1, args.seeds + 1)]
    with TemporaryDirectory() as folder, fake_workers(4, events=True) as (workers, endpoints):
        save_tokenizer(Path(folder))
        ways = [(Contender(OURS, "least_loaded"), []), (Contender(OURS, "cache_aware"), [
            "--kv-events", *endpoints, "--tokenizer", folder])]  # fmt: skip
        sources = [
            flag for worker, endpoint in zip(workers, endpoints, strict=True)
            for flag in ("--kv-event-source", f"{worker.url}={endpoint}")
        ]  # fmt: skip
        for name in args.peers:
            for policy, more in PEERS[name][2].items():
                own = [*more, *sources] if policy == "kv_aware" else more
                ways.append((Contender(name, policy, python), own))
        seen = [
            [trace_once(one, workers, more, turns) for one, more in ways]
            for turns in run.progress(traces, "traces")
        ]
        medians = np.median(seen, axis=0)
    rows = {f"{one.name}: {one.policy}": m for (one, _), m in zip(ways, medians, strict=True)}
    columns = ["hit rate", "requests max/mean", "missed tokens max/mean", "requests/s", "p99 ms"]
    run.table(
        "trace", ["router: policy", *columns], [[name, *row] for name, row in rows.items()],
        caption=f"{args.requests} requests of 40 conversations on 4 caches, {AT_ONCE} at once",
    )  # fmt: skip
    hit, even, _, rate, _ = rows[f"{OURS}: cache_aware"]
    others = [row for name, row in rows.items() if not name.startswith(OURS)]
    if args.preset != "smoke":
        as_even = [row[0] for row in others if row[1] <= EVEN]  # affinity alone is no art
        run.check_above("hit rate, the highest at so even a load", hit, max([0.9, *as_even]))
        run.check_below("requests of the busiest worker, over the mean", even, EVEN)
    if others:
        most = max(row[3] for row in others)
        run.check_above("requests/s", rate, most, "the best of theirs", of_time=True)


def trace_once(
    one: Contender, workers: Sequence[Service], more: Sequence[str], turns: Sequence
) -> list[float]:
    with one.running(ROUTER, workers, more) as router:
        for worker in workers:
            call(worker.url + "/reset", {})
        time.sleep(0.2)
        started = time.monotonic()
        outcomes = uvloop.run(contenders.replay(router.url, turns, AT_ONCE))
        seconds = time.monotonic() - started
        stats = [call(worker.url + "/stats") for worker in workers]
    failed = sum(outcome.status != 200 for outcome in outcomes)
    if failed:
        raise script.RunError(f"{one.name}: {failed} of {len(turns)} requests failed")
    missed, asked = (np.array([each[key] for each in stats]) for key in ("missed", "requests"))
    tokens = sum(len(turn.tokens) for turn in turns)
    late = float(np.percentile([outcome.seconds for outcome in outcomes], 99))
    return [
        1 - missed.sum() / tokens, asked.max() / asked.mean(), missed.max() / missed.mean(),
        len(turns) / seconds, 1000 * late,
    ]  # fmt: skip


# ---- what a client sees of a fault


def plant_faults(run: Run, args: Namespace, python: Path | None) -> None:
    rows: dict[str, list[float | None]] = {}
    for one in run.progress(all_alike(args, python), "routers"):
        rows[one.name] = list(faults_of(one, args))
    columns = ["whole answers lost", "streams cut", "back in use after, s",
               "2 s after a hang: failed, %", "after answers of 400: failed, %"]  # fmt: skip
    run.table(
        "faults",
        ["router", *columns],
        [[name, *row] for name, row in rows.items()],
        caption=f"{CLIENTS} clients, two workers: one is killed, returns, hangs, answers 400",
    )
    lost, cut, back, hung, refused = rows[OURS]
    run.check_equal("whole answers lost when a worker is killed", lost, 0)
    run.check_equal("streams cut when a worker is killed", cut, 0)
    run.check_true("a worker is back in use within 5 s", back is not None and back < 5, f"{back} s")
    run.check_equal("requests that fail 2 s after a worker hangs, %", hung, 0)
    run.check_equal("requests that fail after clients' own mistakes, %", refused, 0)


def faults_of(one: Contender, args: Namespace) -> Iterator[float | None]:
    seconds = args.fault_seconds
    flags = ("--decode-ms", "100")
    with ExitStack() as stack:
        (well, *_), _ = stack.enter_context(fake_workers(1, *flags))
        streaming, after = {**ANSWER, "stream": True}, None
        lost = []
        for body in (ANSWER, streaming):  # each before a router of its own
            with ExitStack() as run:
                (doomed, *_), _ = run.enter_context(fake_workers(1, *flags))
                router = run.enter_context(one.running(ROUTER, [well, doomed]))
                seen = load(router, body, seconds / 2, partial(kill, doomed))
                lost.append(sum(not outcome.complete for outcome in seen))
                if body is streaming:
                    port = int(doomed.url.rsplit(":", 1)[1])
                    run.enter_context(fake_workers(1, *flags, port=port))
                    after = back_after(router, doomed.url, args.return_seconds)
        yield from (*lost, after)
        (broken, *_), _ = stack.enter_context(fake_workers(1, *flags))
        with one.running(ROUTER, [well, broken]) as router:
            seen = load(router, ANSWER, seconds, partial(misbehave, broken, "hang"))
            yield failed_later(seen, 2.0)
        misbehave(broken, "ok")
        with one.running(ROUTER, [well, broken]) as router:
            refusing = [partial(misbehave, each, "status") for each in (well, broken)]
            load(router, ANSWER, seconds / 4, *refusing)
            for each in (well, broken):
                misbehave(each, "ok")
            yield failed_later(load(router, ANSWER, seconds / 2), 0.0)


def kill(worker: Service) -> None:
    worker.job.process.send_signal(signal.SIGKILL)


def misbehave(worker: Service, mode: str) -> None:
    call(worker.url + "/fault", {"mode": mode, "status": 400})


def load(router: Service, body: dict, seconds: float, *faults: Callable[[], None]) -> list[Outcome]:
    """What clients see for so many seconds, of which the faults begin after a quarter."""

    async def during() -> None:
        await asyncio.sleep(seconds / 4)
        for fault in faults:
            fault()

    return uvloop.run(contenders.load(router.url, body, CLIENTS, seconds, during))


def failed_later(outcomes: Sequence[Outcome], after_s: float) -> float:
    """Percent of the requests sent so long after the first failure that could be, or from 0."""
    begin = min(outcome.at for outcome in outcomes)
    quarter = (max(outcome.at for outcome in outcomes) - begin) / 4 if after_s else 0.0
    late = [outcome for outcome in outcomes if outcome.at >= begin + quarter + after_s]
    return 100 * float(np.mean([outcome.status != 200 for outcome in late])) if late else 0.0


def back_after(router: Service, url: str, limit_s: float) -> float | None:
    """Seconds until the worker that returned has answered a request of ours; None: not so soon."""
    started, before = time.monotonic(), call(url + "/stats")["requests"]
    while time.monotonic() < started + limit_s:
        load(router, ANSWER, 0.25)
        if call(url + "/stats")["requests"] > before + PROBES:
            return time.monotonic() - started
    return None


if __name__ == "__main__":
    script.exit(main)
