"""How often the same block of KV cache lies in several workers, and what that costs.

Four workers with a prefix cache each are one large cache only if the router treats them so. With
requests in turns every popular document comes to lie in all of them, and a part of what they could
hold together is copies. Routing by prefix keeps one copy, until a document is so popular
that one worker cannot serve it alone: then it must be copied, deliberately or by price.

The router's own policies choose here, before simulated LRU caches (no sockets, no model). A request
is a document, drawn by Zipf's law, and a question of its own. Che's approximation predicts it: a
document stays in an LRU cache of C blocks for a time T after its last use, so it is there with
probability 1 - exp(-rate · T), and T is such that what is there fills the cache.

Run:
    python chapter07-sglang/code/kv_duplication.py
    python chapter07-sglang/code/kv_duplication.py --alpha 1.6

You should see: in turns a quarter of all blocks are copies, and the hit rate is little more than
half of what the same caches reach with one copy of each; cache-aware routing keeps nearly one.
Where one document is nearly half of all traffic, one copy means one overloaded worker; copying by
price costs few hits and evens it out.

Source: Che, Tung and Wang, "Hierarchical Web caching systems", IEEE JSAC 20(7), 2002.
"""

from argparse import Namespace
from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq

from distlab import script
from distlab.script import Run, UsageError
from llm_router.cache_aware import CacheAware, Costs
from llm_router.policies import ConsistentHash, LeastLoaded, Policy, RoundRobin
from llm_router.simulation import PREFILL_S, Clock, Result, SimRequest, Simulation, keys_of

PRESETS = {
    "smoke": {"requests": 1200, "documents": 60, "blocks": 256},
    "laptop": {"requests": 6000, "documents": 150, "blocks": 512},
    "gpu": {"requests": 20000, "documents": 300, "blocks": 1024},
}
BLOCK, DOCUMENT, QUESTION = 16, 16, 4  # tokens; blocks of a document and of a question
WARMUP = 0.4  # of the requests fill the caches
AT_ONCE = 16
NEVER = 1e3  # a price at which nothing is copied
SKEWED = 1.6  # the exponent at which one document is more than a worker's share


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        results = {
            name: simulate(args, make, args.alpha)
            for name, make in run.progress(policies(args), "policies")
        }
        predicted = {
            "round_robin": predict(args, copies_everywhere=True),
            "cache_aware, by price": predict(args, copies_everywhere=False),
        }
        show(run, args, results, predicted)
        skewed = show_replication(run, args)
        check(run, results, predicted, skewed)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add = parser.add_argument
    add("--requests", type=script.positive_int)
    add("--documents", type=script.positive_int)
    add("--blocks", type=script.positive_int, help="of a worker's cache")
    add("--workers", type=script.positive_int, default=4)
    add("--alpha", type=script.positive_float, default=0.9, help="of Zipf: 1 / rank^alpha")
    args = parser.parse_args(argv)
    if args.workers < 2:
        raise UsageError("--workers 1 has nobody to share with; use at least 2")
    if args.blocks < 4 * (DOCUMENT + QUESTION):
        raise UsageError(
            f"--blocks {args.blocks} hold fewer than 4 prompts of {DOCUMENT + QUESTION}; use more"
        )
    if args.documents * DOCUMENT <= args.blocks:
        raise UsageError(
            f"--documents {args.documents} all fit into --blocks {args.blocks} of one worker; use "
            f"at least {args.blocks // DOCUMENT + 1}"
        )
    if args.requests < 200:
        raise UsageError(f"--requests {args.requests} fill no cache; use at least 200")
    return args  # type: ignore[no-any-return]


Maker = Callable[[Clock], Policy]


def cache_aware(copy: float) -> Maker:
    """`copy` is the price of a copy, beside what it takes to compute: Costs.copy."""
    return lambda clock: CacheAware(keys_of, Costs(prefill=PREFILL_S, copy=copy), now=clock)


def policies(args: Namespace) -> list[tuple[str, Maker]]:
    return [
        ("round_robin", lambda clock: RoundRobin()),
        ("least_loaded", lambda clock: LeastLoaded()),
        ("consistent_hash", lambda clock: ConsistentHash()),
        ("cache_aware, by price", cache_aware(Costs.copy)),
        ("cache_aware, copies free", cache_aware(0.0)),
    ]


def popularity(documents: int, alpha: float) -> np.ndarray:
    """Shares [documents] of the requests."""
    weights = np.arange(1, documents + 1) ** -alpha
    return np.asarray(weights / weights.sum())


def simulate(args: Namespace, make: Maker, alpha: float, replicas: int = 0) -> Result:
    """The trace through a policy; the first `replicas` documents lie in every worker from the
    start."""
    draw = np.random.default_rng(0)
    documents = [[i, *[0] * (DOCUMENT * BLOCK - 1)] for i in range(args.documents)]
    drawn = draw.choice(args.documents, args.requests, p=popularity(args.documents, alpha))
    requests = [
        SimRequest(f"document {d}", [*documents[d], -1 - i, *[0] * (QUESTION * BLOCK - 1)])
        for i, d in enumerate(drawn)
    ]
    clock = Clock()
    simulation = Simulation(make(clock), clock, args.workers, args.blocks)
    simulation.warm(documents[:replicas])
    return simulation.run(requests, AT_ONCE, int(WARMUP * args.requests))


def predict(args: Namespace, copies_everywhere: bool) -> tuple[float, float]:
    """Hit rate, and copies of a document's block, by Che's approximation.

    With copies everywhere each of n caches sees 1/n of every document's requests. Without, all are
    one cache n times as large, which sees them all.
    """
    n = args.workers
    caches, seen = (n, 1 / n) if copies_everywhere else (1, 1.0)
    shares = popularity(args.documents, args.alpha)
    capacity = args.blocks * n / caches

    def filled(requests: float) -> float:  # T, counted in requests to all workers
        there = DOCUMENT * (1 - np.exp(-shares * seen * requests)).sum()
        return float(there + QUESTION * seen * requests - capacity)

    longest = brentq(filled, 0, 100 * args.blocks * n)
    there = 1 - np.exp(-shares * seen * longest)
    hit = float((shares * there).sum()) * DOCUMENT / (DOCUMENT + QUESTION)
    questions = QUESTION * seen * longest * caches
    held = DOCUMENT * caches * there.sum() + questions
    distinct = DOCUMENT * (1 - (1 - there) ** caches).sum() + questions
    return hit, float(held / distinct)


def show(
    run: Run, args: Namespace, results: dict[str, Result], predicted: dict[str, tuple[float, float]]
) -> None:
    whole = args.workers * args.blocks
    run.table(
        "duplication",
        ["policy", "copies of a block", "useful capacity %", "hit rate", "requests max/mean",
         "requests/s"],
        [[name, r.duplication, 100 / r.duplication, r.hit_rate, r.imbalance, r.rate]
         for name, r in results.items()],
        caption=f"{args.workers} caches of {args.blocks} blocks, {args.documents} documents of "
        f"{DOCUMENT}; Zipf's exponent {args.alpha:g}",
    )  # fmt: skip
    for name, (hit, copies) in predicted.items():
        run.compare(f"hit rate, {name}", hit, results[name].hit_rate)
        run.compare(f"copies of a block, {name}", copies, results[name].duplication)
    lost = whole - whole / results["round_robin"].duplication
    run.metric("blocks_lost_to_copies", lost, "blocks", f"of {whole}, in turns")
    names = [*results]
    run.figure(
        "kv_duplication", kind="bar", title="What the same four caches hold",
        x_label="policy", y_label="% of all blocks",
        series=[
            {"label": "distinct", "x": names, "y": [100 / results[n].duplication for n in names]},
            {"label": "copies", "x": names,
             "y": [100 - 100 / results[n].duplication for n in names]},
        ],
    )  # fmt: skip


def show_replication(run: Run, args: Namespace) -> dict[str, Result]:
    """One document is more than a worker's share: how it is copied."""
    ways = [
        ("one copy only", NEVER, 0),
        ("copied by price", Costs.copy, 0),
        ("the first 2 replicated", Costs.copy, 2),
    ]
    results = {
        name: simulate(args, cache_aware(copy), SKEWED, replicas) for name, copy, replicas in ways
    }
    run.table(
        "replication",
        ["cache_aware", "copies of a block", "hit rate", "requests max/mean", "p99 ms",
         "requests/s"],
        [[name, r.duplication, r.hit_rate, r.imbalance,
          1000 * float(np.percentile(r.latencies, 99)), r.rate] for name, r in results.items()],
        caption=f"Zipf's exponent {SKEWED}: the first document is "
        f"{100 * popularity(args.documents, SKEWED)[0]:.0f} % of the requests",
    )  # fmt: skip
    return results


def check(
    run: Run,
    results: dict[str, Result],
    predicted: dict[str, tuple[float, float]],
    skewed: dict[str, Result],
) -> None:
    for name, (hit, _) in predicted.items():
        run.check_close(f"Che's hit rate, {name}", results[name].hit_rate, hit, tolerance=0.04)
    turns, aware = results["round_robin"], results["cache_aware, by price"]
    run.check_below("cache-aware routing keeps fewer copies", aware.duplication, turns.duplication)
    run.check_above("and hits more", aware.hit_rate, turns.hit_rate)
    run.check_below("with requests as even: max/mean", aware.imbalance, 1.25)
    copied, single = skewed["copied by price"], skewed["one copy only"]
    run.check_below("a copied document evens out the load", copied.imbalance, single.imbalance)


if __name__ == "__main__":
    script.exit(main)
