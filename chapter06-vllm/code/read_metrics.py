"""Read /metrics of a server under load, and say what to watch: queue, cache, preemptions.

A server tells Prometheus, in plain text, gauges (what is now) and counters (what has been since the
start, so that only their difference over a time means anything). Three of them say whether it is
well. `num_requests_waiting` above 0 for long: more comes than the server can do, and TTFT grows
with the queue. `kv_cache_usage_perc` near 1: the cache, not the arithmetic, limits the batch.
`num_preemptions_total` growing: the cache was promised twice, and what was computed is computed
again. vLLM's names begin with `vllm:`, paged_engine's are the same after `paged_engine:`.

Run, with a server in another terminal (`bash chapter06-vllm/code/vllm_server.sh`):
    python chapter06-vllm/code/read_metrics.py
    python chapter06-vllm/code/read_metrics.py --base-url http://127.0.0.1:8000/v1 --requests 200

You should see: the gauges rise under the load that the script makes and fall back after it,
counters that have grown by exactly the tokens that the answers report, and a verdict on queue and
cache.
"""

import asyncio
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from distlab import script
from distlab.errors import RunError
from distlab.run import Run
from distlab.serving.clients import Answer, add_server_flags, connected, counted_tokens

PRESETS = {
    "smoke": {"requests": 24, "max_tokens": 24},
    "laptop": {"requests": 128, "max_tokens": 64},
    "gpu": {"requests": 1024, "max_tokens": 256},
}
PREFIXES = ("vllm:", "paged_engine:")
POLL_S = 0.05
SETTLE_S = 5.0  # a server may count its last tokens a moment after it has sent them
SHOWN = [
    ("num_requests_running", "requests in the batch"),
    ("num_requests_waiting", "requests in the queue"),
    ("kv_cache_usage_perc", "share of the cache in use"),
    ("num_preemptions_total", "preemptions so far"),
    ("prefix_cache_hits_total", "prompt tokens found in the cache"),
    ("prompt_tokens_total", "prompt tokens computed or found"),
    ("generation_tokens_total", "output tokens"),
]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        asyncio.run(watch(run, args))
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_server_flags(parser)
    add = parser.add_argument
    add("--requests", type=script.positive_int, metavar="N", help="sent at once")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Metrics:
    """One reading: each name without its prefix, summed over its labels (models, engines, ...)."""

    prefix: str
    values: dict[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0.0)  # a counter with labels has no line before it counts

    def grown(self, counter: str, before: "Metrics") -> float:
        """How much a counter has grown since `before`."""
        return self[counter] - before[counter]

    def mean_since(self, histogram: str, before: "Metrics") -> float | None:
        """The mean of what a histogram has observed since `before`; None if nothing."""
        count = self.grown(f"{histogram}_count", before)
        return self.grown(f"{histogram}_sum", before) / count if count else None


async def watch(run: Run, args: Namespace) -> None:
    """Read the metrics before, all through, and after a load of --requests at once."""
    async with connected(args.base_url, args.timeout, args.model) as server:
        before = await read(args)
        prompts = [f"# request {i}\nclass Thing{i}:\n" for i in range(args.requests)]
        load = asyncio.create_task(server.ask_all(prompts, args.max_tokens, args.requests))
        during = await sample(load, args)
        answers, seconds = await load
        after = await settled(before, answers, args)
    run.print(f"job: {len(answers)} requests at once to {server.model}, {before.prefix} metrics")
    report(run, before, during, after)
    run.metric("output_tokens", counted_tokens(answers) / seconds, "tok/s")
    check(run, before, after, answers)
    say_verdict(run, before, during, after)


async def sample(load: asyncio.Task, args: Namespace) -> list[Metrics]:
    """The metrics every POLL_S, while `load` runs."""
    seen = []
    while not load.done():
        seen.append(await read(args))
        await asyncio.wait([load], timeout=POLL_S)
    return seen


async def settled(before: Metrics, answers: list[Answer], args: Namespace) -> Metrics:
    """The metrics once the server has counted what it sent, or SETTLE_S later."""
    sent = counted_tokens(answers)
    for _ in range(int(SETTLE_S / POLL_S)):
        now = await read(args)
        counted = now.grown("generation_tokens_total", before)
        if counted >= sent and now["num_requests_running"] == 0:
            break
        await asyncio.sleep(POLL_S)
    return now


async def read(args: Namespace) -> Metrics:
    """The metrics that stand beside the server's /v1."""
    url = urlsplit(args.base_url)._replace(path="/metrics", query="").geturl()
    try:
        async with httpx.AsyncClient(timeout=args.timeout, trust_env=False) as client:
            answer = await client.get(url)
    except httpx.HTTPError as error:
        raise RunError(f"{url} cannot be read: {error!r}") from error
    if answer.status_code != 200:
        raise RunError(f"{url} answered {answer.status_code}; is it an inference server?")
    return parse(answer.text, url)


def parse(text: str, source: str) -> Metrics:
    """Read Prometheus' text format. Raises `RunError` when it is none, or no inference server's."""
    values: dict[str, dict[str, float]] = {prefix: defaultdict(float) for prefix in PREFIXES}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                for prefix in PREFIXES:
                    if sample.name.startswith(prefix):
                        values[prefix][sample.name.removeprefix(prefix)] += sample.value
    except ValueError as error:
        raise RunError(f"{source} is no Prometheus text: {error}") from error
    for prefix, found in values.items():
        if "num_requests_running" in found:
            return Metrics(prefix, dict(found))
    raise RunError(
        f"{source} has no metric {' or '.join(p + 'num_requests_running' for p in PREFIXES)}; "
        "point --base-url at a server of vLLM or paged_engine"
    )


def report(run: Run, before: Metrics, during: list[Metrics], after: Metrics) -> None:
    """Each metric at the three times: under load a gauge's highest value."""
    rows = [
        [name, meaning, before[name], max(m[name] for m in [before, *during, after]), after[name]]
        for name, meaning in SHOWN
    ]
    run.table("metrics", ["metric", "what it tells", "before", "at most", "after"], rows)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        run.metric(f"most_{name}", max((m[name] for m in during), default=0.0))
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds"):
        run.metric(f"mean_{name}", after.mean_since(name, before), "s")
    looked_up = after.grown("prefix_cache_queries_total", before)
    hits = after.grown("prefix_cache_hits_total", before)
    run.metric("prefix_cache_hit_rate", 100 * hits / looked_up if looked_up else 0.0, "%")


def check(run: Run, before: Metrics, after: Metrics, answers: list[Answer]) -> None:
    """What the server counted, against what came over the wire."""
    counted = after.grown("generation_tokens_total", before)
    run.check_equal("output tokens counted and received", counted, counted_tokens(answers))
    ended = after.grown("request_success_total", before)
    run.check_equal("requests counted and answered", ended, len(answers))
    idle = after["num_requests_running"] + after["num_requests_waiting"]
    run.check_equal("requests left in the server", idle, 0)


def say_verdict(run: Run, before: Metrics, during: list[Metrics], after: Metrics) -> None:
    """What an operator would do about it."""
    queued = max((m["num_requests_waiting"] for m in during), default=0.0)
    usage = max((m["kv_cache_usage_perc"] for m in during), default=0.0)
    preempted = after.grown("num_preemptions_total", before)
    queue = (
        f"up to {queued:g} requests waited: the batch was full; raise max-num-seqs if the cache "
        "has room, else add a replica or refuse earlier"
        if queued
        else "no request waited: the batch had room for all"
    )
    cache = (
        f"the cache was used to {100 * usage:.0f} %, with {preempted:g} preemptions: give it more "
        "memory, or admit fewer requests at once"
        if preempted or usage > 0.9
        else f"the cache was used to {100 * usage:.0f} %: it is not what limits the batch"
    )
    run.print(f"verdict: {queue}")
    run.print(f"verdict: {cache}")


if __name__ == "__main__":
    script.exit(main)
