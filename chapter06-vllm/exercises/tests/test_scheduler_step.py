"""Task 2: steps by hand, random ones against the rules in turn, and loads served to their end."""

from dataclasses import dataclass, replace

SIZE = 4  # tokens of a block, in the steps by hand


@dataclass
class Request:
    name: str
    arrival: int
    tokens: int
    computed: int = 0
    blocks: int = 0


def decoding(name, arrival, tokens):
    """One that has all but its newest token in the cache."""
    return Request(name, arrival, tokens, tokens - 1, -(-(tokens - 1) // SIZE))


def planned(student, waiting, running, free_blocks, token_budget, size=SIZE):
    handed = [[replace(request) for request in group] for group in (waiting, running)]
    step = student.schedule(*handed, free_blocks, size, token_budget)
    assert handed == [list(waiting), list(running)], (
        "the requests, or the lists of them, were changed; only plan"
    )
    return [(name, count) for name, count in step.chunks], list(step.preempted)


def assert_step(student, waiting, running, free_blocks, budget, chunks, preempted, why, size=SIZE):
    got, out = planned(student, waiting, running, free_blocks, budget, size)
    case = (
        f"waiting {told(waiting)}; running {told(running)}; {free_blocks} free blocks of {size}, "
        f"{budget} tokens: {why}: "
    )
    assert out == preempted, f"{case}expected {preempted} to be preempted, got {out}"
    assert got == chunks, f"{case}expected the chunks {chunks}, got {got}"


def told(requests):
    words = [
        f"{r.name} (arrival {r.arrival}, {r.computed} of {r.tokens} computed, {r.blocks} blocks)"
        for r in requests
    ]
    return ", ".join(words) or "nobody"


def requests(chance, count, size, prefix, running):
    """Requests in any order; a running one may decode, or be in the middle of its prompt."""
    found = []
    for number, arrival in enumerate(chance.permutation(3 * count)[:count].tolist()):
        tokens = int(chance.integers(1, 6 * size + 2))
        computed = blocks = 0
        if running:
            tokens += 1
            computed = tokens - 1 if chance.random() < 0.6 else int(chance.integers(1, tokens))
            blocks = -(-computed // size) + int(chance.random() < 0.2)  # one to spare
        found.append(Request(f"{prefix}{number}", 2 * arrival + running, tokens, computed, blocks))
    return found


def assert_random_steps(student, chance, count, running, waiting, blocks=0.0, tokens=0.3):
    """`running` and `waiting` are at most so many; blocks, or tokens, are plenty so often."""
    for _ in range(count):
        size = int(chance.choice([1, 2, 4, 5, 16]))
        runs = requests(chance, int(chance.integers(running + 1)), size, "r", True)
        waits = requests(chance, int(chance.integers(waiting + 1)), size, "w", False)
        free, budget = int(chance.integers(0, 9)), int(chance.integers(1, 6 * size + 4))
        free += 1000 * bool(chance.random() < blocks)
        budget += 1000 * bool(chance.random() < tokens)
        chunks, preempted = by_the_rules(waits, runs, free, size, budget)
        assert_step(student, waits, runs, free, budget, chunks, preempted, "by the rules", size)


def by_the_rules(waiting, running, free_blocks, size, budget):
    """The plan, every time looked at from its beginning: who is preempted was never there.

    The first set of victims, the latest first, with which all that is left finds room in its turn.
    """
    order = sorted(running, key=lambda request: request.arrival)
    for victims in range(len(order) + 1):
        staying, gone = order[: len(order) - victims], order[len(order) - victims :][::-1]
        room = free_blocks + sum(request.blocks for request in gone)
        chunks, complete = in_turn(staying, room, size, budget)
        if complete:
            break
    preempted = [request.name for request in gone]
    if not preempted:
        everyone = [*order, *sorted(waiting, key=lambda request: request.arrival)]
        chunks, _ = in_turn(everyone, free_blocks, size, budget)
    return chunks, preempted


def in_turn(order, free_blocks, size, budget):
    """(chunks, whether all have their tokens, or none are left of the budget)."""
    chunks = []
    for request in order:
        count = min(request.tokens - request.computed, budget)
        if count == 0:
            return chunks, True
        free_blocks -= max(0, -(-(request.computed + count) // size) - request.blocks)
        if free_blocks < 0:
            return chunks, False
        budget -= count
        chunks.append((request.name, count))
    return chunks, True


def test_running_requests_go_first(student, chance):
    old, new = decoding("old", 1, 10), decoding("new", 2, 3)
    prompt = Request("prompt", 0, 6)
    assert_step(student, [], [], 9, 16, [], [], "there is nothing to do")
    assert_step(student, [], [new, old], 9, 16, [("old", 1), ("new", 1)], [],
                "the running ones go by arrival")  # fmt: skip
    assert_step(student, [prompt], [old, new], 9, 16, [("old", 1), ("new", 1), ("prompt", 6)], [],
                "one that waits comes after those that run, whenever it arrived")  # fmt: skip
    assert_step(student, [prompt, Request("before", -1, 4)], [], 9, 16,
                [("before", 4), ("prompt", 6)], [], "waiting ones go by arrival")  # fmt: skip
    assert_step(student, [prompt, Request("later", 5, 2)], [old], 1, 16, [("old", 1)], [],
                "prompt needs two blocks, and nobody overtakes it")  # fmt: skip
    assert_random_steps(student, chance, 60, running=4, waiting=4, blocks=1.0, tokens=1.0)
    assert_random_steps(student, chance, 60, running=0, waiting=5, tokens=1.0)


def test_prompts_are_cut_at_the_token_budget(student, chance):
    prompt, short = Request("prompt", 1, 30), Request("short", 2, 3)
    running = decoding("running", 0, 3)
    assert_step(student, [prompt, short], [running], 20, 16, [("running", 1), ("prompt", 15)], [],
                "a prompt gets what is left of the budget")  # fmt: skip
    half = Request("half", 1, 30, 16, 4)
    assert_step(student, [short], [running, half], 20, 16,
                [("running", 1), ("half", 14), ("short", 1)], [],
                "the rest of a prompt, and a part of the next")  # fmt: skip
    assert_step(student, [prompt], [running], 2, 9, [("running", 1), ("prompt", 8)], [],
                "a chunk of 8 tokens needs two blocks, not those of the whole prompt")  # fmt: skip
    many = [decoding(f"r{i}", i, 3) for i in range(5)]
    assert_step(student, [short], many, 20, 3, [("r0", 1), ("r1", 1), ("r2", 1)], [],
                "no budget is left for the others")  # fmt: skip
    full = decoding("full", 9, 5)
    assert_step(student, [], [*many[:3], full], 0, 3, [("r0", 1), ("r1", 1), ("r2", 1)], [],
                "who gets no token needs no block: nobody is preempted for it")  # fmt: skip
    assert_random_steps(student, chance, 100, running=3, waiting=3, blocks=1.0)


def test_the_latest_makes_room(student, chance):
    a, b, c = (decoding(name, i, 5) for i, name in enumerate("abc"))  # each needs a second block
    assert_step(student, [], [a, b, c], 1, 16, [("a", 1), ("b", 1)], ["c"],
                "one block is free, and c has the other")  # fmt: skip
    assert_step(student, [], [c, b, a], 0, 16, [("a", 1)], ["c", "b"],
                "c's block goes to a, and b, then the latest, finds none and makes room itself",
                )  # fmt: skip
    fits = decoding("fits", 7, 3)
    assert_step(student, [], [a, fits], 0, 16, [("a", 1)], ["fits"],
                "the latest goes, although it needs no block itself")  # fmt: skip
    assert_step(student, [], [a], 0, 16, [], ["a"], "the only one has nobody else to preempt")
    assert_step(student, [Request("w", 9, 2)], [a, b], 0, 16, [("a", 1)], ["b"],
                "where somebody was preempted nobody is admitted")  # fmt: skip
    big = Request("big", 2, 20, 12, 3)
    assert_step(student, [Request("w", 9, 2)], [a, b, big], 0, 16, [("a", 1), ("b", 1)], ["big"],
                "three blocks came back, one is left over: yet nobody is admitted")  # fmt: skip
    assert_random_steps(student, chance, 200, running=6, waiting=2)


def test_random_loads_are_served_to_the_end(student, chance):
    for _ in range(10):
        size = int(chance.choice([1, 3, 4, 8]))
        longest = 28
        blocks = int(chance.integers(-(-longest // size), 3 * -(-longest // size)))
        budget = int(chance.integers(1, 20))
        prompts = chance.integers(1, 13, 8).tolist()
        wanted = {f"r{i}": p + int(chance.integers(1, 17)) for i, p in enumerate(prompts)}
        waiting = [Request(f"r{i}", i, p) for i, p in enumerate(prompts)]
        running, steps = [], 0
        while waiting or running:
            case = f"step {steps}, {blocks} blocks of {size}, budget {budget}"
            steps += 1
            assert steps < 3000, f"{case}: {told(waiting + running)} were never served"
            free = blocks - sum(request.blocks for request in running)
            chunks, preempted = by_the_rules(waiting, running, free, size, budget)
            assert_step(student, waiting, running, free, budget, chunks, preempted, case, size)
            waiting, running = carried_out(chunks, preempted, waiting, running, wanted, size)
            chance.shuffle(running)


def carried_out(chunks, preempted, waiting, running, wanted, size):
    """The requests after the step: those preempted begin again, those that are done leave."""
    everyone = {request.name: request for request in [*waiting, *running]}
    for name in preempted:
        everyone[name].computed = everyone[name].blocks = 0
    for name, count in chunks:
        request = everyone[name]
        request.computed += count
        request.blocks = max(request.blocks, -(-request.computed // size))
    for request in everyone.values():
        request.tokens += request.computed == request.tokens  # a new token was sampled
    alive = [r for r in everyone.values() if r.tokens <= wanted[r.name]]
    return [r for r in alive if not r.computed], [r for r in alive if r.computed]
