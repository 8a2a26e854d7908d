"""Task 5: every plan of a short prompt, and of long ones the best, found in another way."""

from dataclasses import dataclass, replace
from itertools import product


@dataclass
class Tier:
    name: str
    latency: int
    block_time: int


@dataclass
class Case:
    tokens: int
    block_size: int
    tiers: list
    linear: int
    quadratic: int
    held: list

    def __str__(self):
        held = str(self.held)
        return (
            f"{self.tokens} tokens in blocks of {self.block_size}, linear {self.linear}, quadratic "
            f"{self.quadratic}, {self.tiers}, held {held if len(held) < 300 else held[:300] + '…'}"
        )

    @property
    def fetchable(self):
        """Whole blocks without the last token."""
        return (self.tokens - 1) // self.block_size

    def arguments(self):
        tiers = [replace(tier) for tier in self.tiers]
        return self.tokens, self.block_size, tiers, self.linear, self.quadratic

    def time(self, plan):
        """Of its fetches one by one, then of its tokens one by one."""
        tiers = {tier.name: tier for tier in self.tiers}
        fetched = sum(tiers[name].latency for name in set(plan))
        for name in plan:
            fetched += tiers[name].block_time
        begin = len(plan) * self.block_size
        return fetched + sum(self.computed(p) for p in range(begin, self.tokens))

    def computed(self, place):
        return self.linear + self.quadratic * (place + 1)


def assert_best(student, case, best, why=""):
    """`best`: (time, blocks) of the fastest plan that fetches the fewest."""
    held, arguments = [list(names) for names in case.held], case.arguments()
    plan = list(student.fetch_plan(held, *arguments))
    assert (held, arguments) == (list(case.held), case.arguments()), (
        f"{case}: the arguments were changed"
    )
    told = f"{len(plan)} blocks" if len(plan) > 12 else plan
    assert len(plan) <= case.fetchable, (
        f"{case}: got {told}, but the last token is computed, so {case.fetchable} blocks at most "
        "can be fetched"
    )
    for block, name in enumerate(plan):
        assert name in case.held[block], (
            f"{case}: block {block} is fetched from {name!r}, which does not hold it"
        )
    got = case.time(plan)
    extra = f" ({why})" if why else ""
    assert got == best[0], (
        f"{case}: expected a plan of {best[0]} ns with {best[1]} blocks, got {told}, which takes "
        f"{got} ns{extra}"
    )
    assert len(plan) == best[1], (
        f"{case}: expected {best[1]} blocks, got {told}, which takes as long, {got} ns{extra}"
    )


def every_plan(case):
    """The best of all plans that there are."""
    best = (case.time([]), 0)
    for length in range(1, case.fetchable + 1):
        for plan in product(*case.held[:length]):
            best = min(best, (case.time(plan), length))
    return best


def block_by_block(case):
    """The best of a long prompt's plans: of each set of tiers used so far the least time."""
    bits = {tier.name: 1 << number for number, tier in enumerate(case.tiers)}
    tiers = {tier.name: tier for tier in case.tiers}
    left = sum(map(case.computed, range(case.tokens)))
    best, least = (left, 0), {0: 0}
    for block in range(case.fetchable):
        after = {}
        for used, time in least.items():
            for name in case.held[block]:
                now = time + tiers[name].block_time
                now += 0 if used & bits[name] else tiers[name].latency
                mask = used | bits[name]
                after[mask] = min(now, after.get(mask, now))
        if not after:
            break
        least = after
        begin = block * case.block_size
        left -= sum(map(case.computed, range(begin, begin + case.block_size)))
        best = min(best, (min(least.values()) + left, block + 1))
    return best


def random_case(chance, tiers, blocks):
    """About as costly to fetch as to compute, or half; of a block several tiers, or always one."""
    size = int(chance.choice([1, 2, 4, 16]))
    tokens = int(chance.integers(1, blocks * size + 2))
    linear, quadratic = int(chance.integers(0, 20)), int(chance.integers(0, 4))
    most = int(chance.integers(1, 3)) * size * (linear + quadratic * tokens // 2)
    chosen = []
    for number in range(tiers):
        latency, block_time = chance.integers(0, most + 2, 2).tolist()
        if chosen and chance.random() < 0.2:
            latency, block_time = chosen[-1].latency, chosen[-1].block_time
        chosen.append(Tier(f"t{number}", latency, block_time))
    chance.shuffle(chosen)
    share = float(chance.choice([0, 0.5, 0.8, 1.0]))
    names = [tier.name for tier in chosen]
    held = [
        [name for name in chance.permutation(names).tolist() if chance.random() < share]
        or names[: share == 0]
        for _ in range(tokens // size)
    ]
    return Case(tokens, size, chosen, linear, quadratic, held)


def assert_time(student, case, plan, expected, why=""):
    handed, arguments = list(plan), case.arguments()
    got = student.plan_time(handed, *arguments)
    assert (handed, arguments) == (list(plan), case.arguments()), (
        f"{case}: plan_time changed its arguments"
    )
    assert got == expected and type(got) is int, (
        f"{case}: expected {expected} ns for the plan {list(plan)}, got {got!r}"
        f"{': ' if why else ''}{why}"
    )


def test_the_time_of_a_plan(student, chance):
    tiers = [Tier("host", 10, 3), Tier("disk", 100, 7)]
    for tokens, linear, quadratic, plan, expected, why in (
        (4, 5, 0, [], 20, "4 tokens of 5"),
        (4, 0, 1, [], 10, "1 + 2 + 3 + 4 pairs"),
        (4, 5, 2, ["host"], 13 + 10 + 14, "a block of 2, and the tokens 2 and 3"),
        (9, 1, 0, ["host", "host"], 16 + 5, "the latency once"),
        (9, 1, 0, ["host", "disk", "host"], 16 + 107 + 3, "each tier's latency"),
        (9, 0, 1, ["disk"] * 4, 128 + 9, "the last token sees all 9"),
    ):
        assert_time(student, Case(tokens, 2, tiers, linear, quadratic, []), plan, expected, why)
    for _ in range(100):
        case = random_case(chance, int(chance.integers(1, 5)), 12)
        length = int(chance.integers(0, case.fetchable + 1))
        plan = chance.choice([tier.name for tier in case.tiers], length).tolist()
        assert_time(student, case, plan, case.time(plan))
    huge = Case(10**9, 10**8, [Tier("far", 10**12, 10**15)], 10**6, 10**3 + 1, [])
    n, start = 10**9, 3 * 10**8
    pairs = n * (n + 1) // 2 - start * (start + 1) // 2
    expected = 10**12 + 3 * 10**15 + 10**6 * (n - start) + (10**3 + 1) * pairs
    assert_time(student, huge, ["far"] * 3, expected, "whole numbers, however large")


def test_one_tier(student, chance):
    def case(tokens, latency, block_time, linear, quadratic, held):
        return Case(tokens, 4, [Tier("host", latency, block_time)], linear, quadratic, held)

    here, none = ["host"], []
    for one, best, why in (
        (case(13, 0, 1, 1, 0, [here] * 3), (4, 3), "each block saves 3"),
        (case(12, 0, 1, 1, 0, [here] * 3), (6, 2), "the last token is computed, and its block"),
        (case(13, 0, 5, 1, 0, [here] * 3), (13, 0), "computing is faster"),
        (case(13, 0, 4, 1, 0, [here] * 3), (13, 0), "it takes as long: nothing is fetched"),
        (case(13, 8, 1, 1, 0, [here] * 3), (12, 3), "3 blocks save 9, the latency is 8"),
        (case(13, 9, 1, 1, 0, [here] * 3), (13, 0), "3 blocks save 9, the latency is 9"),
        (case(17, 0, 1, 1, 0, [here, here, none, here]), (11, 2), "block 2 is gone"),
        (case(17, 0, 1, 1, 0, [none, here, here, here]), (17, 0), "block 0 is gone"),
        (case(13, 0, 20, 0, 1, [here] * 3), (73, 3), "the first block takes 10 to compute, the "
         "second 26, the third 42"),
        (case(5, 0, 20, 0, 1, [here]), (15, 0), "10 to compute, 20 to fetch"),
        (case(3, 0, 0, 1, 0, []), (3, 0), "no whole block"),
        (case(1, 0, 0, 1, 0, []), (1, 0), "one token"),
    ):  # fmt: skip
        assert_best(student, one, best, why)
    nowhere = Case(9, 4, [], 1, 0, [[], []])
    assert_best(student, nowhere, (9, 0), "there is no tier")
    for _ in range(120):
        one = random_case(chance, 1, 12)
        assert_best(student, one, every_plan(one))


def test_several_tiers(student, chance):
    host, disk, net = Tier("host", 10, 1), Tier("disk", 0, 5), Tier("net", 40, 1)
    both = ["disk", "host"]
    for tiers, tokens, held, best, why in (
        ([host, disk], 9, [both] * 2, (12, 2), "of 8 a block disk saves 3, host 7 and costs 10"),
        ([host, disk], 41, [both] * 10, (22, 10), "10 blocks pay host's latency"),
        ([disk, net], 41, [["disk"]] * 5 + [["net"]] * 5, (67, 5), "5 blocks do not pay net's"),
        ([disk, net], 81, [["disk"]] * 10 + [["net"]] * 10, (102, 20), "10 do, once disk has led"),
        ([host, disk, net], 41, [["disk"], ["host"]] * 5, (42, 10), "in turns, one latency"),
        (
            [net, disk],
            41,
            [["net"], *[["disk"]] * 9],
            (82, 0),
            "the first block costs 41, for 9 of 3",
        ),
    ):
        assert_best(student, Case(tokens, 4, tiers, 2, 0, held), best, why)
    four = [Tier(name, 10, 1) for name in "abcd"]
    one, other = Tier("h", 5, 2), Tier("d", 3, 1)
    twins = [Tier("h", 3, 1), Tier("t", 3, 1)]
    for case, best, why in (
        (Case(81, 4, four, 2, 0, [[name] for name in "a" * 5 + "b" * 5 + "c" * 5 + "d" * 5]),
         (62, 20), "all four are opened"),
        (Case(17, 4, [one, other], 1, 0, [["h", "d"]] * 2 + [["h"]] * 2), (14, 2),
         "h alone takes as long, with 4 blocks"),
        (Case(33, 4, twins, 1, 0, [["h"], ["t"]] * 4), (15, 8), "equally fast, and two tiers"),
        (Case(9, 4, twins, 1, 0, [["h"], ["t"]]), (9, 0), "equally fast, and two latencies"),
        (Case(5, 4, [Tier("h", 0, 4 * 10**16 - 1)], 10**16, 0, [["h"]]), (5 * 10**16 - 1, 1),
         "1 ns is saved"),
    ):  # fmt: skip
        assert_best(student, case, best, why)
    for number in range(150):
        one = random_case(chance, 2 + number % 3, 5)
        assert_best(student, one, every_plan(one))
    for number in range(40):
        one = random_case(chance, 2 + number % 3, 24)
        assert_best(student, one, block_by_block(one))


def test_long_prompts(student, chance):
    for number in range(4):
        one = random_case(chance, number + 1, 60)
        assert_best(student, one, block_by_block(one))
    for number in range(4):
        size, blocks = int(chance.choice([1, 4, 16])), int(chance.integers(300, 500))
        tokens = size * blocks + 1
        per_block = size * (10 + tokens // 2)
        tiers = [
            Tier(f"t{tier}", int(per_block * chance.uniform(1, 40)),
                 int(per_block * chance.uniform(0.3, 1.3)))
            for tier in range(1 + number)
        ]  # fmt: skip
        names = [tier.name for tier in tiers]
        first = int(chance.integers(blocks // 2))
        held = [names[: 1 + (block > first) * len(names)] for block in range(blocks)]
        one = Case(tokens, size, tiers, 10, 1, held)
        assert_best(student, one, block_by_block(one))
    blocks = 2000
    host = Tier("h", 10**9, 3 * 10**5)
    one = Case(16 * blocks, 16, [host], 10**5, 1000, [["h"]] * blocks)
    assert_best(student, one, (2_113_180_000, blocks - 1), "whole numbers, however large")
    tiers = [Tier(f"t{tier}", 10**6 * tier, 50_000 - 10_000 * tier) for tier in range(4)]
    one = Case(16 * blocks, 16, tiers, 900, 1, [[tier.name for tier in tiers]] * blocks)
    assert_best(student, one, block_by_block(one))
