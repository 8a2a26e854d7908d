"""Task 2: steps by hand, then whole loads whose invariants are looked at after every step."""

import random
from dataclasses import dataclass, replace

SIZE = 4  # tokens of a block


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


def planned(student, waiting, running, free_blocks, token_budget):
    handed = [[replace(request) for request in group] for group in (waiting, running)]
    step = student.schedule(*handed, free_blocks, SIZE, token_budget)
    assert handed == [list(waiting), list(running)], "the requests were changed; only plan"
    return [(name, count) for name, count in step.chunks], list(step.preempted)


def assert_step(student, waiting, running, free_blocks, budget, chunks, preempted, why):
    got, out = planned(student, waiting, running, free_blocks, budget)
    case = (
        f"waiting {told(waiting)}; running {told(running)}; {free_blocks} free blocks of {SIZE}, "
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


def test_running_requests_go_first(student):
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


def test_prompts_are_cut_at_the_token_budget(student):
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


def test_the_latest_makes_room(student):
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


def test_random_loads_are_served_to_the_end(student):
    for seed in range(15):
        chance = random.Random(seed)
        blocks, budget = chance.randint(8, 16), chance.randint(4, 20)
        prompts = [chance.randint(1, 12) for _ in range(10)]
        wanted = {f"r{i}": p + chance.randint(1, 16) for i, p in enumerate(prompts)}
        waiting = [Request(f"r{i}", i, p) for i, p in enumerate(prompts)]
        running, steps = [], 0
        while waiting or running:
            case = f"seed {seed}, step {steps}, {blocks} blocks of {SIZE}, budget {budget}"
            steps += 1
            assert steps < 3000, f"{case}: {told(waiting + running)} were never served"
            free = blocks - sum(request.blocks for request in running)
            chunks, preempted = planned(student, waiting, running, free, budget)
            waiting, running = carried_out(
                chunks, preempted, waiting, running, blocks, budget, wanted, case
            )


def carried_out(chunks, preempted, waiting, running, blocks, budget, wanted, case):
    """The requests after the step: those preempted begin again, those that are done leave."""
    everyone = {request.name: request for request in [*waiting, *running]}
    names = [name for name, _ in chunks]
    assert chunks, f"{case}: nothing was planned for {told(waiting)}; running {told(running)}"
    assert len(set(names)) == len(names), f"{case}: a request is planned twice: {names}"
    assert set(names) <= set(everyone), f"{case}: {set(names) - set(everyone)} is not known"
    both = set(names) & set(preempted)
    assert not both, f"{case}: {both} was preempted, and has a part in the step"
    total = sum(count for _, count in chunks)
    assert total <= budget, f"{case}: the step has {total} tokens"
    for name in preempted:
        everyone[name].computed = everyone[name].blocks = 0
    for name, count in chunks:
        request = everyone[name]
        open_tokens = request.tokens - request.computed
        assert 1 <= count <= open_tokens, (
            f"{case}: {name} asks for {open_tokens} tokens and is to compute {count}"
        )
        request.computed += count
        request.blocks = max(request.blocks, -(-request.computed // SIZE))
    held = sum(request.blocks for request in everyone.values())
    assert held <= blocks, f"{case}: the chunks {chunks} need {held} blocks in all"
    for request in everyone.values():
        request.tokens += request.computed == request.tokens  # a new token was sampled
    alive = [r for r in everyone.values() if r.tokens <= wanted[r.name]]
    return [r for r in alive if not r.computed], [r for r in alive if r.computed]
