"""Task 6: choices by hand, random ones layer by layer, with all that may still win."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    whole: int
    inputs: int
    microseconds: int


def layers_of(*sizes):
    return [Layer(*size) for size in sizes]


def equal(count, whole=10, inputs=2, microseconds=5):
    return [Layer(whole, inputs, microseconds)] * count


def random_layers(chance, most):
    """Some alike, as a model's are, or of few sizes, so that ties come; or all different."""
    count, kinds = int(chance.integers(1, most + 1)), int(chance.choice([1, 2, 3, 12]))
    largest = int(chance.choice([3, 20, 10**9]))
    made = []
    for _ in range(kinds):
        whole = int(chance.integers(0, largest + 1))
        inputs = int(chance.choice([0, whole, chance.integers(0, whole + 1)], p=[0.2, 0.1, 0.7]))
        made.append(Layer(whole, inputs, int(chance.integers(1, min(largest, 5000) + 1))))
    return [made[number] for number in chance.integers(0, kinds, count).tolist()]


def told(layers):
    sizes = ", ".join(f"{one.whole}/{one.inputs}/{one.microseconds}" for one in layers)
    return f"layers of whole/inputs/microseconds {sizes or 'none'}"


def by_definition(layers, again):
    """For each layer in backward: it, and what is kept of those before it."""
    kept = [one.inputs if number in again else one.whole for number, one in enumerate(layers)]
    return max((one.whole + sum(kept[:number]) for number, one in enumerate(layers)), default=0)


def assert_peak(student, layers, again, expected, why=""):
    handed = list(layers), set(again)
    got = student.peak_bytes(*handed)
    assert handed == (list(layers), set(again)), "peak_bytes changed its arguments"
    assert got == expected, (
        f"{told(layers)}; {sorted(again)} compute again: expected a peak of {expected}, got {got}"
        f"{': ' if why else ''}{why}"
    )
    assert type(got) is int, f"bytes are an int, not {type(got).__name__}"


def test_the_peak_of_a_choice(student, chance):
    three = layers_of((10, 2, 5), (20, 4, 5), (6, 1, 5))
    for again, expected, why in (
        ((), 36, "all are kept"),
        ((0,), 28, "2 of the first"),
        ((1,), 30, "in the second layer's backward it is whole: 10 + 20"),
        ((2,), 36, "the last layer's backward comes at once"),
        ((0, 1), 22, "2 + 20"),
        ((0, 1, 2), 22, "2 + 20"),
        ((1, 2), 30, "10 + 20"),
    ):
        assert_peak(student, three, set(again), expected, why)
    assert_peak(student, [], set(), 0, "no layers")
    assert_peak(student, equal(1), {0}, 10, "one layer is whole in its backward")
    assert_peak(
        student, layers_of((50, 1, 5), (3, 1, 5)), {0}, 50, "the first layer is the largest"
    )
    for _ in range(60):
        layers = random_layers(chance, 12)
        again = {number for number in range(len(layers)) if chance.random() < 0.5}
        assert_peak(student, layers, again, by_definition(layers, again))


def best(layers, budget):
    """(microseconds, peak, flags) of the best choice, or None: of all beginnings that keep the same
    bytes with the same peak only one can still win."""
    begun = {(0, 0): (0, ())}
    for layer in layers:
        longer = {}
        for (kept, peak), (time, flags) in begun.items():
            now = max(peak, kept + layer.whole)
            for flag in (False, True):
                key = kept + (layer.inputs if flag else layer.whole), now
                value = time + flag * layer.microseconds, (*flags, flag)
                if now <= budget and (key not in longer or value < longer[key]):
                    longer[key] = value
        begun = longer
    if not begun:
        return None
    return min((time, peak, flags) for (_, peak), (time, flags) in begun.items())


def chosen(student, layers, budget):
    handed = list(layers)
    again = student.choose_recomputation(handed, budget)
    assert handed == list(layers), "choose changed the list of layers"
    case = f"{told(layers)}; budget {budget}"
    assert isinstance(again, list) and all(type(number) is int for number in again), (
        f"{case}: expected a list of ints, got {again!r}"
    )
    assert set(again) <= set(range(len(layers))), f"{case}: {again} are not all layers"
    return again


def assert_choice(student, layers, budget, expected, why):
    got = chosen(student, layers, budget)
    assert got == expected, (
        f"{told(layers)}; budget {budget}: expected {expected} to compute again, got {got}: {why}"
    )


def test_choices_by_hand(student):
    for layers, budget, expected, why in (
        (equal(4), 40, [], "all fits"),
        (equal(4), 16, [0, 1, 2], "the last layer's backward comes at once: that frees nothing"),
        (layers_of((10, 2, 5), (10, 2, 4), (10, 2, 1)), 29, [1], "the cheapest frees nothing"),
        (layers_of((10, 2, 5), (30, 2, 1), (10, 2, 1)), 32, [0, 1], "the second's own peak"),
        (layers_of((10, 0, 9), (6, 0, 4), (6, 0, 4), (20, 0, 9)), 32, [1, 2], "two, in 8 µs"),
        (layers_of((10, 0, 7), (6, 0, 4), (6, 0, 4), (20, 0, 9)), 32, [0], "one, in 7 µs"),
        (layers_of((9, 0, 2), (8, 8, 1), (8, 2, 9), (4, 1, 1)), 23, [0], "the second keeps all"),
        (layers_of((10, 9, 1), (10, 0, 3), (10, 9, 1), (9, 9, 1)), 37, [0, 2], "2 µs, in two"),
        ([], 0, [], "no layers"),
        (equal(1), 10, [], "one layer that fits"),
        (equal(5), 10**12, [], "more than is needed"),
    ):
        assert_choice(student, layers, budget, expected, why)


def test_the_least_time_that_fits(student, chance):
    for _ in range(40):
        layers = random_layers(chance, 9)
        budget = random_budget(chance, layers)
        time, _, flags = best(layers, budget)
        again = chosen(student, layers, budget)
        case = f"{told(layers)}; budget {budget}: {again} compute again"
        peak = by_definition(layers, again)
        assert peak <= budget, f"{case}, and the peak is {peak}"
        took = sum(layers[number].microseconds for number in again)
        better = [number for number, flag in enumerate(flags) if flag]
        assert took == time, f"{case} in {took} microseconds; {better} would in {time}"


def random_budget(chance, layers):
    """What some choice just needs, or a byte more."""
    some = {number for number in range(len(layers)) if chance.random() < 0.6}
    return by_definition(layers, some) + int(chance.integers(0, 2))


def test_ties_and_what_cannot_be(student, chance):
    for layers, budget, expected, why in (
        (equal(4), 39, [2], "each of the first three: the later ones keep the first layers"),
        (layers_of((9, 1, 5), (8, 1, 5), (7, 1, 5)), 23, [0], "the first frees the most"),
        (layers_of((8, 1, 5), (9, 1, 5), (20, 1, 5)), 36, [1], "the second frees the most"),
        (layers_of((4, 0, 2), (4, 0, 2), (8, 0, 4), (20, 0, 9)), 28, [2], "[0, 1] keeps no first"),
    ):
        assert_choice(student, layers, budget, expected, why)
    for _ in range(40):
        layers = random_layers(chance, 9)
        budget = random_budget(chance, layers)
        expected = [number for number, flag in enumerate(best(layers, budget)[2]) if flag]
        why = "of several choices that take as long, that of the lowest peak, which keeps the first"
        assert_choice(student, layers, budget, expected, why)
    assert_choice(student, equal(12), 10 + 22, list(range(11)), "all but the last of twelve")
    for _ in range(20):
        layers = random_layers(chance, 8)
        least = by_definition(layers, set(range(len(layers))))
        impossible(student, layers, least - 1)
        time, _, flags = best(layers, least)
        again = [number for number, flag in enumerate(flags) if flag]
        assert_choice(student, layers, least, again, "the smallest budget that can be")
    impossible(student, equal(1), 9)
    impossible(student, equal(3), 13)
    impossible(student, [], -1)


def impossible(student, layers, budget):
    try:
        got = student.choose_recomputation(list(layers), budget)
    except ValueError:
        return
    raise AssertionError(
        f"{told(layers)}; budget {budget}: nothing fits; expected a ValueError, got {got}"
    )
