"""Task 1: small models by hand, random ones by their rules."""

import random
from dataclasses import dataclass

PLENTY = 10**9


@dataclass(frozen=True)
class Parameter:
    name: str
    storage: int
    nbytes: int
    requires_grad: bool = True


def model(*sizes):
    return [Parameter(f"p{i}", i, size) for i, size in enumerate(sizes)]


def random_model(seed):
    generator = random.Random(seed)
    return model(*(generator.randint(1, 60) for _ in range(generator.randint(1, 30))))


def planned(student, parameters, bucket_bytes, first_bucket_bytes):
    plan = student.plan_buckets(list(parameters), bucket_bytes, first_bucket_bytes)
    return [list(bucket) for bucket in plan]


def test_every_gradient_once_in_the_order_of_backward(student):
    for seed in range(20):
        parameters = random_model(seed)
        buckets = planned(student, parameters, 64, 64)
        names = [name for bucket in buckets for name in bucket]
        expected = [parameter.name for parameter in reversed(parameters)]
        assert names == expected, (
            f"{len(expected)} parameters: the buckets hold {names}, and the backward pass gives "
            f"the gradients in the order {expected}"
        )


def test_no_bucket_over_its_cap_and_none_too_early_closed(student):
    for seed in range(20):
        parameters = random_model(seed)
        size = {parameter.name: parameter.nbytes for parameter in parameters}
        buckets = planned(student, parameters, 64, 64)
        for number, bucket in enumerate(buckets):
            assert bucket, f"bucket {number} of {len(buckets)} is empty"
            total = sum(size[name] for name in bucket)
            assert total <= 64 or len(bucket) == 1, (
                f"bucket {number} holds {total} bytes, its cap is 64: {bucket}"
            )
            if number:
                before = sum(size[name] for name in buckets[number - 1])
                assert before + size[bucket[0]] > 64, (
                    f"bucket {number - 1} was closed at {before} of 64 bytes, and the next "
                    f"gradient of {size[bucket[0]]} would have fitted"
                )
    assert_plan(student, model(30, 30, 40, 20, 40), 60, 60, [["p4", "p3"], ["p2"], ["p1", "p0"]])
    assert_plan(student, model(10, 500, 10), 60, 60, [["p2"], ["p1"], ["p0"]])
    assert_plan(student, model(500), 60, 60, [["p0"]])


def test_the_first_bucket_has_a_cap_of_its_own(student):
    sizes = model(20, 20, 20, 20, 20, 20)
    assert_plan(student, sizes, 60, 20, [["p5"], ["p4", "p3", "p2"], ["p1", "p0"]])
    assert_plan(student, sizes, 60, 45, [["p5", "p4"], ["p3", "p2", "p1"], ["p0"]])
    # larger than the first cap, so alone; and the cap is the first bucket's only
    assert_plan(student, sizes, 40, 10, [["p5"], ["p4", "p3"], ["p2", "p1"], ["p0"]])


def test_tied_weights_once_and_frozen_ones_not_at_all(student):
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


def assert_plan(student, parameters, bucket_bytes, first_bucket_bytes, expected):
    got = planned(student, parameters, bucket_bytes, first_bucket_bytes)
    sizes = ", ".join(
        f"{p.name} {p.nbytes}{'' if p.requires_grad else ' (frozen)'}" for p in parameters
    )
    assert got == expected, (
        f"bytes {sizes}; cap {bucket_bytes}, of the first bucket {first_bucket_bytes}: "
        f"expected {expected}, got {got}"
    )
