"""The prediction of a step over a slow link, where its best mode changes, and equal modes."""

from dataclasses import replace

import pytest

import hybrid_links
from distlab import predict, script
from distlab.errors import UsageError
from distlab.spawning import spawn

MB = 1e6


def measured(job, argv):
    args = hybrid_links.parse_args(["--preset", "smoke", "--layers", "1", *argv])
    as_two_nodes = replace(job, local_world_size=2)
    with script.run(args) as run:
        hybrid_links.measure_link(run, args, as_two_nodes)
    return run.extras["parts"], run.tables["modes"]["rows"], [check.ok for check in run.checks]


def test_all_modes_train_alike_and_each_has_its_bytes():
    parts, rows, checks = spawn(measured, 4, ["--link-rate", "1gbit"], timeout_s=250)[0]
    assert checks == [True]
    assert [row[1] for row in rows] == list(hybrid_links.MODES)
    ddp, hybrid, full = (parts[mode]["sent"] for mode in hybrid_links.MODES)
    assert ddp == 1.5 * hybrid < full < 3 * hybrid
    assert all(row[4] == 1e3 * hybrid_links.predicted(parts[row[1]], 1e9) for row in rows)


def part(inside, sent, calls=1):
    return {"inside": inside, "latency": 0.0, "calls": calls, "sent": sent}


def test_the_best_mode_changes_where_both_take_as_long():
    parts = {
        "ddp": part(0.010, 15 * MB),
        "hybrid": part(0.060, 10 * MB),
        "full": part(0.1, 30 * MB),
    }
    change = hybrid_links.best_changes(parts)
    assert change is not None
    for rate, best in ((change / 2, "hybrid"), (change * 2, "ddp")):
        assert min(parts, key=lambda mode: hybrid_links.predicted(parts[mode], rate)) == best
    # 5 MB less for 50 ms more; a shaper's bucket of some 128 KiB moves it a little
    assert predict.tcp_goodput(change) == pytest.approx(5 * MB / 0.050, rel=0.05)
    parts["hybrid"] = part(0.010, 10 * MB)
    assert hybrid_links.best_changes(parts) is None


def test_a_pause_hides_a_bucket_and_no_more_than_the_pause():
    free = predict.tcp_goodput(1e8)
    slow = hybrid_links.predicted(part(0.0, 10 * MB), 1e8)
    assert slow == pytest.approx(10 * MB / free)
    assert hybrid_links.predicted(part(1.0, 10 * MB), 1e8) == pytest.approx(
        1.0 + (10 * MB - 128 * 2**10) / free
    )


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match="--repeats 2 gives no median"):
        hybrid_links.parse_args(["--repeats", "2"])
    with pytest.raises(UsageError, match="fast is wrong"):
        hybrid_links.parse_args(["--rates", "fast"])
