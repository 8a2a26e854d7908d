"""Task 1: small models by hand, random ones against the sums that a plan must keep to."""

from dataclasses import dataclass

import numpy as np

PLENTY = 10**9


@dataclass(frozen=True)
class Parameter:
    name: str
    storage: int
    nbytes: int
    requires_grad: bool = True


def model(*sizes):
    return [Parameter(f"p{i}", i, size) for i, size in enumerate(sizes)]


def random_sizes(chance):
    """Few different sizes: a bucket that is exactly full is no rare case."""
    unit = int(chance.choice([1, 4, 10, 1024]))
    return [unit * int(size) for size in chance.integers(1, 8, chance.integers(1, 30))]


def random_model(chance):
    """With weights that are tied, and others that are frozen; names and storages tell no order."""
    sizes = random_sizes(chance)
    storages = chance.permutation(1000)[: len(sizes)].tolist()
    names = [f"layer{number}" for number in chance.permutation(3 * len(sizes)).tolist()]
    frozen = chance.random(len(sizes)) < chance.choice([0.0, 0.3, 1.0], p=[0.4, 0.5, 0.1])
    uses = list(range(len(sizes)))
    for tied in chance.integers(len(sizes), size=chance.integers(0, 4)).tolist():
        uses.insert(int(chance.integers(len(uses) + 1)), tied)
    return [
        Parameter(name, storages[use], sizes[use], not frozen[use])
        for name, use in zip(names, uses, strict=False)
    ]


def random_caps(parameters, chance):
    """(cap, cap of the first bucket): sums of some of the sizes, or a byte more or less."""
    sizes = [parameter.nbytes for parameter in parameters]
    some = [sum(chance.permutation(sizes)[: chance.integers(1, 5)].tolist()) for _ in range(2)]
    return [max(1, one + int(chance.integers(-1, 2))) for one in some]


def planned(student, parameters, bucket_bytes, first_bucket_bytes):
    handed = list(parameters)
    plan = student.plan_buckets(handed, bucket_bytes, first_bucket_bytes)
    assert handed == list(parameters), "the list of parameters was changed"
    return [list(bucket) for bucket in plan]


def told(parameters):
    return ", ".join(
        f"{p.name} {p.nbytes}{'' if p.requires_grad else ' (frozen)'}" for p in parameters
    )


def test_every_gradient_once_in_the_order_of_backward(student, chance):
    for _ in range(30):
        parameters = model(*random_sizes(chance))
        buckets = planned(student, parameters, *random_caps(parameters, chance))
        names = [name for bucket in buckets for name in bucket]
        expected = [parameter.name for parameter in reversed(parameters)]
        assert names == expected, (
            f"{len(expected)} parameters: the buckets hold {names}, and the backward pass gives "
            f"the gradients in the order {expected}"
        )
    assert_plan(student, [], 10, 10, [])


def test_no_bucket_over_its_cap_and_none_too_early_closed(student, chance):
    for _ in range(30):
        parameters = model(*random_sizes(chance))
        size = {parameter.name: parameter.nbytes for parameter in parameters}
        cap = random_caps(parameters, chance)[0]
        buckets = planned(student, parameters, cap, cap)
        case = f"bytes {told(parameters)}; cap {cap} of each bucket: bucket"
        for number, bucket in enumerate(buckets):
            assert bucket, f"{case} {number} of {len(buckets)} is empty"
            total = sum(size[name] for name in bucket)
            assert total <= cap or len(bucket) == 1, (
                f"{case} {number} holds {total} bytes, its cap is {cap}: {bucket}"
            )
            if number:
                before = sum(size[name] for name in buckets[number - 1])
                assert before + size[bucket[0]] > cap, (
                    f"{case} {number - 1} was closed at {before} of {cap} bytes, and the next "
                    f"gradient of {size[bucket[0]]} would have fitted"
                )
        assert sum(map(len, buckets)) == len(parameters), f"{case}s hold {buckets}"
    assert_plan(student, model(30, 30, 40, 20, 40), 60, 60, [["p4", "p3"], ["p2"], ["p1", "p0"]])
    assert_plan(student, model(10, 500, 10), 60, 60, [["p2"], ["p1"], ["p0"]])
    assert_plan(student, model(500), 60, 60, [["p0"]])


def test_the_first_bucket_has_a_cap_of_its_own(student, chance):
    sizes = model(20, 20, 20, 20, 20, 20)
    assert_plan(student, sizes, 60, 20, [["p5"], ["p4", "p3", "p2"], ["p1", "p0"]])
    assert_plan(student, sizes, 60, 45, [["p5", "p4"], ["p3", "p2", "p1"], ["p0"]])
    # larger than the first cap, so alone; and the cap is the first bucket's only
    assert_plan(student, sizes, 40, 10, [["p5"], ["p4", "p3"], ["p2", "p1"], ["p0"]])
    for _ in range(30):
        parameters = model(*random_sizes(chance))
        caps = random_caps(parameters, chance)
        assert_plan(student, parameters, *caps, plan_by_sums(parameters, *caps))


def test_tied_weights_once_and_frozen_ones_not_at_all(student, chance):
    embedding, head = Parameter("embedding", 7, 50), Parameter("head", 7, 50)
    layers = model(10, 10, 10)
    plan = planned(student, [embedding, *layers, head], PLENTY, PLENTY)
    names = [name for bucket in plan for name in bucket]
    assert names.count("embedding") + names.count("head") == 1, (
        f"head is the embedding, one weight with one gradient; the buckets hold {names}"
    )
    assert names == ["p2", "p1", "p0", "embedding"], (
        f"the gradient of the tied embedding is whole only at the end of the backward pass, under "
        f"its first name: expected p2, p1, p0, embedding, got {names}"
    )
    frozen = [Parameter("frozen", 8, 1000, requires_grad=False), *layers]
    assert_plan(student, frozen, 20, 20, [["p2", "p1"], ["p0"]])
    assert_plan(student, frozen[:1], 20, 20, [])
    for _ in range(60):
        parameters = random_model(chance)
        caps = random_caps(parameters, chance)
        assert_plan(student, parameters, *caps, plan_by_sums(parameters, *caps))


def plan_by_sums(parameters, bucket_bytes, first_bucket_bytes):
    """The plan from the running sums of the gradients' bytes."""
    storages = [p.storage for p in parameters]
    gradients = [
        p for i, p in enumerate(parameters) if p.requires_grad and p.storage not in storages[:i]
    ][::-1]
    sums = np.cumsum([0, *(p.nbytes for p in gradients)])
    plan, begin = [], 0
    while begin < len(gradients):
        cap = bucket_bytes if plan else first_bucket_bytes
        end = max(begin + 1, int(np.searchsorted(sums, sums[begin] + cap, side="right")) - 1)
        plan.append([p.name for p in gradients[begin:end]])
        begin = end
    return plan


def assert_plan(student, parameters, bucket_bytes, first_bucket_bytes, expected):
    got = planned(student, parameters, bucket_bytes, first_bucket_bytes)
    tied = [p.name for p in parameters if [q.storage for q in parameters].count(p.storage) > 1]
    assert got == expected, (
        f"bytes {told(parameters)}; {f'tied {tied}; ' if tied else ''}cap {bucket_bytes}, of the "
        f"first bucket {first_bucket_bytes}: expected {expected}, got {got}"
    )
