"""K workers compute the very gradient of one machine, and where that exactness ends.

The loss of a batch is a mean over its examples. So its gradient is the mean of the workers' own
gradients, each weighted by the worker's share of the examples. Here all of it is done by hand, in
NumPy, for a small network that guesses the next character of real source code. The workers are
slices of one array, so that nothing but the arithmetic can differ.

Run:
    python chapter01-introduction/code/exact_gradient.py
    python chapter01-introduction/code/exact_gradient.py --workers 4 --figures build/figures

You should see: with 1 to 8 workers a gradient that differs from one machine's in its last digits
only; the same for uneven shards, but not without weights; batch norm, which breaks it until its
statistics are shared; float32 sums whose last bits depend on their order; and K workers that train
exactly as one machine does.
"""

from argparse import Namespace
from functools import reduce

import numpy as np

from distlab import script
from distlab.script import Run
from intro.character_network import EVERYBODY, OWN, Arrays, Examples, Text, loss_and_gradients

PRESETS = {"smoke": {"steps": 30}, "laptop": {"steps": 300}, "gpu": {"steps": 300}}
BATCH = 840  # B examples: a whole number for each of 1 to 8 workers
UNEVEN = [420, 240, 120, 60]  # the same examples on 4 workers
EXACT = 1e-12  # float64 rounds at 1e-16, and some thousand terms are summed
WRONG = 1e-6  # no rounding explains a difference above this
FLOAT32_WORKERS = [2, 4, 8, 16, 32, 64, 128]
LEARNING_RATE = 1.0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        text = Text(args.corpus, args.seed)
        parameters = text.new_parameters()
        batch = text.examples(BATCH)
        compare_equal_shards(run, parameters, batch, args.workers)
        compare_uneven_shards(run, parameters, batch)
        compare_batch_norm(run, parameters, batch, args.workers)
        compare_summation_orders(run, parameters, text)
        compare_training(run, parameters, text, args.workers, args.steps)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--workers", type=int, choices=range(2, 9), default=8, metavar="K")
    parser.add_argument("--steps", type=script.positive_int, help="training steps")
    parser.add_argument("--corpus", default="stdlib", help="stdlib, or a folder of text files")
    parser.add_argument("--seed", type=script.non_negative_int, default=0)
    return parser.parse_args(argv)


def compare_equal_shards(run: Run, parameters: Arrays, batch: Examples, workers: int) -> None:
    expected = mean(gradients(parameters, batch))
    found = [mean(gradients(parameters, batch.shared_by(k))) for k in range(1, workers + 1)]
    rows = [[k, BATCH // k, f"{distance(g, expected):.1e}"] for k, g in enumerate(found, start=1)]
    run.table("equal_shards", ["K workers", "b examples each", "max difference"], rows)
    run.check_close("every K gives one machine's gradient", found, [expected] * workers, EXACT)


def compare_uneven_shards(run: Run, parameters: Arrays, batch: Examples) -> None:
    expected = mean(gradients(parameters, batch))
    each = [gradients(parameters, shard) for shard in batch.cut(UNEVEN)]
    own = {name: np.concatenate([one[name] for one in each]) for name in parameters}
    run.print(f"\nuneven shards of {UNEVEN} examples")
    run.metric("error_of_a_plain_mean", 100 * relative_error(mean(own), expected), "%")
    run.check_above("a plain mean is wrong", distance(mean(own), expected), WRONG)
    run.check_close("the weights b / B make it right", mean(own, UNEVEN), expected, EXACT)


def compare_batch_norm(run: Run, parameters: Arrays, batch: Examples, workers: int) -> None:
    shards = batch.shared_by(workers)
    expected = mean(gradients(parameters, batch, batch_norm=OWN))
    local = mean(gradients(parameters, shards, batch_norm=OWN))
    shared = mean(gradients(parameters, shards, batch_norm=EVERYBODY))
    run.print("\nbatch norm: an example's loss depends on the examples beside it")
    run.metric("error_with_own_statistics", 100 * relative_error(local, expected), "%")
    run.check_above("each worker's own statistics are wrong", distance(local, expected), WRONG)
    run.check_close("shared statistics make it right", shared, expected, EXACT)


def compare_summation_orders(run: Run, parameters: Arrays, text: Text) -> None:
    most = FLOAT32_WORKERS[-1]
    own = gradients(parameters, text.examples(8 * most).shared_by(most))
    vectors = np.hstack([own[name].reshape(most, -1) for name in own]).astype(np.float32)
    rows = []
    for k in FLOAT32_WORKERS:
        ring, tree = ring_sum(vectors[:k]), tree_sum(vectors[:k])
        differing = 100 * float(np.mean(ring != tree))
        rows.append([k, differing, *(rounding(total, vectors[:k]) for total in (ring, tree))])
    run.print("\nfloat32: a + (b + c) is not (a + b) + c")
    columns = ["K workers", "sums that differ, %", "error of a ring", "error of a tree"]
    run.table("summation_order", columns, rows)
    run.figure(
        "summation_order", kind="line", title="The order of a float32 sum shows in its last bits",
        x_label="K workers", y_label="error / sum of magnitudes", log_x=True,
        series=[{"label": label, "x": FLOAT32_WORKERS, "y": [row[column] for row in rows]}
                for label, column in [("ring: one after another", 2), ("tree: in pairs", 3)]],
    )  # fmt: skip
    run.check_equal("two workers have one order", ring_sum(vectors[:2]), tree_sum(vectors[:2]))
    run.check_above("more workers have several", rows[-1][1], 1, "%")
    run.check_equal("the same order gives the same bits", *(ring_sum(vectors) for _ in (1, 2)))
    run.check_below("a tree rounds less than a ring", rows[-1][3], rows[-1][2])


def compare_training(run: Run, parameters: Arrays, text: Text, workers: int, steps: int) -> None:
    losses: dict[int, list[float]] = {1: [], workers: []}
    models = dict.fromkeys(losses, parameters)
    for _ in run.progress(range(steps), "training"):
        batch = text.examples(BATCH)
        for k, model in models.items():
            own_losses, own = loss_and_gradients(model, batch.shared_by(k))
            gradient = mean(own)
            models[k] = {name: model[name] - LEARNING_RATE * gradient[name] for name in model}
            losses[k].append(float(own_losses.mean()))
    run.print("\ntraining")
    run.metric("loss_at_the_first_step", losses[1][0], "nats")
    run.metric("loss_at_the_last_step", losses[1][-1], "nats")
    run.figure(
        "training", kind="line", title="K workers train exactly as one machine does",
        x_label="step", y_label="loss (nats)",
        series=[{"label": f"K = {k}", "x": list(range(steps)), "y": y} for k, y in losses.items()],
    )  # fmt: skip
    run.check_close("K workers have one machine's losses", losses[workers], losses[1], EXACT)
    run.check_below("training lowers the loss", losses[1][-1], losses[1][0], "nats")


def gradients(parameters: Arrays, examples: Examples, **options: tuple[int, ...]) -> Arrays:
    return loss_and_gradients(parameters, examples, **options)[1]


def mean(own: Arrays, weights: list[int] | None = None) -> Arrays:
    """What an all-reduce gives to everybody: the workers' mean, [K, …] to […]."""
    return {name: np.average(values, axis=0, weights=weights) for name, values in own.items()}


def ring_sum(vectors: np.ndarray) -> np.ndarray:
    """[K, P] to [P]: chunk c goes around the ring from worker c on (Patarasuk and Yuan 2009)."""
    chunks = np.array_split(vectors, len(vectors), axis=1)
    return np.concatenate([reduce(np.add, np.roll(c, -i, axis=0)) for i, c in enumerate(chunks)])


def tree_sum(vectors: np.ndarray) -> np.ndarray:
    """[K, P] to [P]: in pairs, then in pairs of pairs; K is a power of two."""
    while len(vectors) > 1:
        vectors = vectors[0::2] + vectors[1::2]
    return vectors[0]


def rounding(total: np.ndarray, vectors: np.ndarray) -> float:
    """The mean error of a float32 sum, in sums of magnitudes (Higham 2002, section 4.2)."""
    exact, magnitude = (v.sum(axis=0, dtype=np.float64) for v in (vectors, np.abs(vectors)))
    used = magnitude > 0  # no worker has seen every character
    return float(np.mean(np.abs(total - exact)[used] / magnitude[used]))


def distance(a: Arrays, b: Arrays) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in b)


def relative_error(actual: Arrays, expected: Arrays) -> float:
    """The length of the difference, in lengths of what was expected."""
    wrong = sum(((actual[name] - expected[name]) ** 2).sum() for name in expected)
    return float(np.sqrt(wrong / sum((values**2).sum() for values in expected.values())))


if __name__ == "__main__":
    script.exit(main)
