"""Task 3: choices by hand, random ones against the rules, and traffic that must be shared."""

from collections import Counter
from dataclasses import dataclass, field, replace

from token_kinds import token_kinds


@dataclass
class Worker:
    name: str
    cached: list = field(default_factory=list)
    queued: int = 0
    requests: int = 0
    last: int = -1


def copied(workers):
    return [replace(w, cached=[list(sequence) for sequence in w.cached]) for w in workers]


def told(worker):
    return (
        f"{worker.name} (cached {worker.cached}, queued {worker.queued}, requests "
        f"{worker.requests}, last {worker.last})"
    )


def chosen(student, prompt, workers, limit, page_size):
    handed, asked = copied(workers), list(prompt)
    got = student.choose(asked, handed, limit, page_size)
    assert (handed, asked) == (list(workers), list(prompt)), (
        f"{'; '.join(map(told, workers))}: the workers or the prompt were changed; only choose"
    )
    return got


def assert_chosen(student, prompt, workers, limit, page_size, expected, why):
    got = chosen(student, prompt, workers, limit, page_size)
    assert got == expected, (
        f"expected {expected}, got {got} ({why}): prompt {list(prompt)}, limit {limit}, pages of "
        f"{page_size}; workers {'; '.join(map(told, workers)) or 'none'}"
    )


def by_the_rules(prompt, workers, limit, page_size):
    """(the best worker's name, why, how many cost as little); candidates go rule by rule."""
    best = [worker for worker in workers if worker.requests < limit]
    costs = {worker.name: worker.queued + missed(prompt, worker, page_size) for worker in best}
    equals = list(costs.values()).count(min(costs.values(), default=0))
    for rule in (lambda w: costs[w.name], lambda w: w.requests, lambda w: w.last):
        if best:
            least = min(map(rule, best))
            best = [worker for worker in best if rule(worker) == least]
    if not best:
        return None, "all are full", 0
    return best[0].name, f"it costs {costs[best[0].name]}", equals


def missed(prompt, worker, page_size):
    """Page by page: how much is left from the first page on that no cached sequence has."""
    pages = 0
    while (pages + 1) * page_size < len(prompt):
        wanted = prompt[: (pages + 1) * page_size]
        if not any(sequence[: len(wanted)] == wanted for sequence in worker.cached):
            break
        pages += 1
    return len(prompt) - pages * page_size


def random_workers(chance, prompt, kinds, loads, requests):
    """Workers that have cached beginnings of the prompt and of others; few kinds of load: ties."""
    workers = []
    turns = (chance.permutation(9) * chance.choice([1, 10**6])).tolist()
    for number in range(int(chance.integers(1, 6))):
        cached = []
        for _ in range(int(chance.integers(4))):
            kept = int(chance.integers(len(prompt) + 1))
            more = chance.choice(kinds, chance.integers(5)).tolist()
            after = prompt[kept + len(more) :] if chance.random() < 0.3 else []
            cached.append(prompt[:kept] + more + after)
        workers.append(
            Worker(
                f"w{number}", cached, int(chance.choice(loads)), int(chance.choice(requests)),
                turns[number] if chance.random() < 0.7 else -1,
            )
        )  # fmt: skip
    return workers


def assert_random(student, chance, count, loads, requests, limit, ties=False):
    """With `ties` those cases too in which several cost as little."""
    while count:
        page_size = int(chance.choice([1, 1, 2, 3, 4, 16]))
        kinds = token_kinds(chance)
        prompt = chance.choice(kinds[:2], chance.integers(1, 6 * page_size)).tolist()
        workers = random_workers(chance, prompt, kinds, loads, requests)
        expected, why, equals = by_the_rules(prompt, workers, limit, page_size)
        if equals < 2 or ties:
            assert_chosen(student, prompt, workers, limit, page_size, expected, why)
            count -= 1


def test_the_longest_matched_prefix(student, chance):
    prompt = [1, 2, 3, 4, 5, 6]
    for one, other, page_size, expected, why in (
        ([[1, 2]], [[1, 2, 3]], 1, "b", "b misses 3 tokens, a 4"),
        ([[1, 2], [7, 2], [1, 2, 3, 4]], [[1, 2, 3]], 1, "a", "its third sequence is the best"),
        ([[1, 9, 3, 4, 5]], [[1, 2]], 1, "b", "only what both begin with counts"),
        ([[2, 3, 4, 5, 6]], [[1]], 1, "b", "a prefix begins at the first token"),
        ([], [[1, 2]], 2, "b", "a has cached nothing"),
        ([[1, 2]], [[1, 2, 3]], 2, "a", "both have one page; the first in the list"),
        ([[1, 2, 3]], [[1, 2, 3, 4]], 2, "b", "two whole pages"),
        ([[1, 2, 3, 4, 9, 9]], [[1, 2, 3, 4, 5, 9]], 2, "a", "both have two pages"),
        ([[1, 2, 3]], [[1, 2, 3, 4, 5, 6]], 3, "a", "b has all, and must compute its last page"),
        ([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 6, 7]], 1, "a", "the last token is always computed"),
        ([[]], [[1]], 1, "b", "an empty sequence is cached"),
    ):
        workers = [Worker("a", one), Worker("b", other)]
        assert_chosen(student, prompt, workers, 4, page_size, expected, why)
    long = range(150_000, 153_000)
    for prompt, one, other, page_size, why in (
        (list(long), [list(long[:2000])], [list(long[:2500])], 16, "2,000 and 2,496 tokens"),
        ([1, 11, 5], [[11, 1, 7]], [[1]], 1, "1, 11 is not 11, 1"),
        ([257, 2, 3], [[1, 2]], [[257]], 1, "257 is not 1"),
        ([70_000, 2, 3], [[70_000 - 2**16, 2]], [[70_000]], 1, "70,000 is not 4,464"),
        ([1, 2, 3, 4, 5], [[1, 9, 9], [7, 2, 3]], [[1, 2]], 1, "a prefix of one sequence counts"),
    ):
        workers = [Worker("a", one), Worker("b", other)]
        assert_chosen(student, prompt, workers, 4, page_size, "b", why)
    assert_chosen(student, [5], [Worker("a"), Worker("b", [[5]])], 4, 1, "a",
                  "one token: nothing is saved")  # fmt: skip
    assert_random(student, chance, 120, loads=[0], requests=[0], limit=9)


def test_a_queue_outweighs_a_cache(student, chance):
    prompt = list(range(10))
    for queued, expected, why in (
        (3, "a", "3 + 4 against 10"),
        (5, "a", "5 + 4 against 10"),
        (7, "b", "7 + 4 against 10"),
    ):
        workers = [Worker("a", [prompt[:6]], queued, 1), Worker("b")]
        assert_chosen(student, prompt, workers, 4, 1, expected, why)
    workers = [Worker("a", [], 30, 1), Worker("b", [], 20, 3), Worker("c", [prompt], 100, 1)]
    assert_chosen(student, prompt, workers, 4, 1, "b",
                  "the queue counts in tokens, not in requests")  # fmt: skip
    workers = [Worker("a", [], 10**7 + 1), Worker("b", [], 10**7)]
    assert_chosen(student, prompt, workers, 4, 1, "b", "queues of any length")
    assert_random(student, chance, 120, loads=range(12), requests=[0, 1], limit=9)


def test_never_above_the_limit(student, chance):
    prompt = list(range(10))
    full = Worker("full", [prompt], 0, 4)
    busy = Worker("busy", [], 500, 3)
    assert_chosen(student, prompt, [full, busy], 4, 1, "busy", "full has 4 requests of 4")
    assert_chosen(student, prompt, [full, busy], 5, 1, "full", "one more fits")
    assert_chosen(student, prompt, [full, busy], 3, 1, None, "both are full, busy has 3 of 3")
    assert_chosen(student, prompt, [replace(full, requests=7), busy], 4, 1, "busy",
                  "the limit was lowered meanwhile")  # fmt: skip
    assert_chosen(student, prompt, [], 4, 1, None, "there is no worker")
    assert_chosen(student, prompt, [Worker("idle")], 0, 1, None, "nobody may take any")
    assert_random(student, chance, 120, loads=range(6), requests=range(4), limit=2)


def test_ties_are_shared_fairly(student, chance):
    prompt = [1, 2, 3]
    for workers, expected, why in (
        ([Worker("a", requests=2), Worker("b", requests=1)], "b", "fewer requests"),
        ([Worker("a", last=5), Worker("b", last=3)], "b", "chosen longest ago"),
        ([Worker("a", last=0), Worker("b")], "b", "never chosen"),
        ([Worker("b"), Worker("a")], "b", "neither was chosen; the first in the list"),
        ([Worker("a", last=1, requests=2), Worker("b", last=9, requests=1)], "b",
         "requests come before turns"),
        ([Worker("a", queued=1), Worker("b", last=7, requests=3)], "b", "cost comes before both"),
    ):  # fmt: skip
        assert_chosen(student, prompt, workers, 4, 1, expected, why)
    workers = [Worker("a", requests=1, last=10**6), Worker("b", requests=2, last=3)]
    assert_chosen(student, prompt, workers, 400, 1, "a", "requests come first, however long ago")
    workers = [Worker("a", requests=399), Worker("b", queued=1)]
    assert_chosen(student, prompt, workers, 400, 1, "a", "cost comes first, however many requests")
    assert_random(student, chance, 120, loads=[0, 1], requests=range(4), limit=3, ties=True)
    for _ in range(4):
        traffic_is_shared(student, chance)


def traffic_is_shared(student, chance):
    """Prompts of one length that have nothing in common: nobody gets two more than another."""
    workers = [Worker(f"w{number}") for number in range(int(chance.integers(2, 6)))]
    limit, served = int(chance.integers(2, 5)), Counter()
    rounds = len(workers) * limit
    for turn in range(rounds):
        prompt = [100 + turn, *[0] * 7]
        name = chosen(student, prompt, workers, limit, 2)
        case = f"{len(workers)} workers, limit {limit}, request {turn} like all others"
        assert name is not None, f"{case}: {served} were served, and there is room; got None"
        served[name] += 1
        shares = [served[worker.name] for worker in workers]
        assert max(shares) - min(shares) <= 1, f"{case}: the workers got {shares} of them"
        taken = next(worker for worker in workers if worker.name == name)
        taken.cached.append(prompt)
        taken.last, taken.queued, taken.requests = turn, taken.queued + 8, taken.requests + 1
    last = chosen(student, [1], workers, limit, 2)
    assert last is None, f"{len(workers)} workers, all with {limit} requests: got {last}"
