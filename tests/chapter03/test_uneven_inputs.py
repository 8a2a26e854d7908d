"""The cures for uneven inputs with three ranks, and that a wrong weight is noticed."""

import pytest

import uneven_inputs
from distlab import script
from distlab.errors import UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu"]


def test_with_three_ranks_only_the_weights_equal_one_process():
    checks, comparisons = spawn(run_cures, 3, [*SMOKE, "--batch-size", "12"], timeout_s=120)[0]
    assert [name for name, ok in checks if not ok] == []
    assert len(checks) == 3
    for predicted, measured in comparisons:
        assert measured == pytest.approx(predicted, rel=1e-4)
    assert [predicted for predicted, _ in comparisons] == [1 / 3, 1]


def test_weights_that_forget_that_ddp_divides_are_noticed():
    checks, _ = spawn(run_cures, 2, SMOKE, unscaled, timeout_s=120)[0]
    assert [name for name, ok in checks if not ok] == [
        "weights: off one process by",
        "DistributedSampler, weights: off one process by",
    ]


def run_cures(job, argv, change=lambda module: None):
    change(uneven_inputs)
    args = uneven_inputs.parse_args(argv)
    with script.run(args) as run:
        uneven_inputs.compare_cures(run, args, job)
    comparisons = [(c["predicted"], c["measured"]) for c in run.comparisons.values()]
    return [(check.name, check.ok) for check in run.checks], comparisons


def unscaled(module):
    """Make the weighted losses' sum lack the factor K."""
    right = module.weighted

    def wrong(trainee, own, job):
        step = trainee.step
        trainee.step = lambda loss: step(loss / job.world_size)
        right(trainee, own, job)

    module.weighted = wrong


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (1, [], "--batch-size 8 on 1 rank"),
        (2, ["--batch-size", "7"], "--batch-size 7 on 2 rank"),
        (4, ["--batch-size", "8", "--batches", "2"], "--batches 2 leaves none for rank 3"),
    ],
)
def test_flags_that_give_no_uneven_ranks_are_one_line(ranks, flags, words):
    job = type("Job", (), {"world_size": ranks, "device": "cpu"})
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        uneven_inputs.batches_of_ranks(uneven_inputs.parse_args([*SMOKE, *flags]), job)
