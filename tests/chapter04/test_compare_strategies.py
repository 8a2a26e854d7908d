"""Every strategy trains alike and holds what its formula says; the advice follows the numbers."""

import pytest

import compare_strategies
from distlab import script
from distlab.errors import UsageError
from distlab.spawning import spawn
from fsdp.strategies import STRATEGIES, Sizes


def measured(job):
    args = compare_strategies.parse_args(["--preset", "smoke", "--steps", "2"])
    with script.run(args) as run:
        compare_strategies.measure_here(run, args, job)
    return run.extras["strategies"], run.tables["strategies"], [check.ok for check in run.checks]


def test_every_strategy_trains_alike_and_holds_its_share():
    found, table, checks = spawn(measured, 4, timeout_s=250)[0]
    assert list(found) == [row[0] for row in table["rows"]] == list(STRATEGIES)
    assert checks == [True, True]
    state = {name: own["state"] / found["ddp"]["state"] for name, own in found.items()}
    assert state == pytest.approx(
        {"ddp": 1, "zero-1": 10 / 16, "full": 1 / 4, "grad": 1 / 4, "hybrid": 1 / 2}, rel=0.02
    )
    assert all(own["peak"] > own["state"] for own in found.values())


def test_the_formulas_of_what_is_sent():
    sizes = Sizes(whole=100.0, root=20.0, ranks=4, replicas=2, reduction=2)
    sent = {name: strategy.sent(sizes) for name, strategy in STRATEGIES.items()}
    assert sent == {"ddp": 150, "zero-1": 225, "full": 285, "grad": 225, "hybrid": 190 + 50}


def test_the_advice_names_the_fastest_and_what_needs_less():
    found = {
        name: {"peak": peak, "sent predicted": sent}
        for name, peak, sent in (("ddp", 50e6, 150), ("grad", 40e6, 225), ("full", 30e6, 285))
    }
    told = compare_strategies.recommended(found, {"ddp": 0.1, "grad": 0.3, "full": 0.2})
    assert told == (
        "ddp is the fastest (100 ms) and sends least; "
        "full has a peak of 30.0 MB instead of 50.0, in 2.00 x the time"
    )
    told = compare_strategies.recommended(found, {"ddp": 0.2, "grad": 0.3, "full": 0.1})
    assert told == "full is the fastest (100 ms) though ddp sends less"


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match="--replicas 3 does not divide 4 ranks; use 1, 2, 4"):
        compare_strategies.parse_args(["--replicas", "3"])
    with pytest.raises(UsageError, match="--links slow is wrong"):
        compare_strategies.parse_args(["--links", "slow"])
