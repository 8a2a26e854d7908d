"""State in memory, in CPU memory and on disk trains alike, and a disk's bytes really move."""

import pytest

import offload
from distlab import script
from distlab.errors import UsageError
from distlab.spawning import spawn


def compared(job, argv):
    args = offload.parse_args(argv)
    with script.run(args) as run:
        offload.compare_places(run, args, job)
    return run.tables["places"]["rows"], [(check.name, check.ok) for check in run.checks]


@pytest.mark.parametrize("how", ["auto", "drop"])
def test_places_are_equal(tmp_path, how):
    argv = ["--preset", "smoke", "--folder", str(tmp_path), "--bound", how]
    for rows, checks in spawn(compared, 2, argv, timeout_s=250):
        assert all(ok for _, ok in checks), checks
        disk = dict(zip(offload.COLUMNS, rows[-1], strict=True))
        assert disk["disk, MB"] > 0
        if how == "drop":
            assert disk["CPU memory, MB"] == 0 < disk["written a step, MB"]


def test_wrong_flags_are_refused():
    with pytest.raises(UsageError, match="--steps 1 leaves nothing to measure"):
        offload.parse_args(["--steps", "1"])


def refuse(job, argv):
    with pytest.raises(UsageError) as error:
        offload.refuse_small_bound(offload.parse_args(argv), job)
    return str(error.value)


def test_a_bound_too_small_for_a_unit_says_how_much_is_needed():
    told = spawn(refuse, 1, ["--preset", "laptop", "--bound-mb", "5"])[0]
    assert told.startswith("--bound-mb 5 is too small") and "use --bound-mb " in told
