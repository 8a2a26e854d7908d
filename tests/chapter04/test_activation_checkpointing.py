"""What is computed again is the same, bit for bit, alone and sharded; and saves what it should."""

import pytest

import activation_checkpointing
from distlab import script
from distlab.errors import UsageError
from distlab.spawning import spawn


def compared(job, argv):
    args = activation_checkpointing.parse_args(argv)
    with script.run(args) as run:
        activation_checkpointing.compare_policies(run, args, job)
    return run.tables["policies"]["rows"], [(check.name, check.ok) for check in run.checks]


@pytest.mark.parametrize("ranks", [1, 2])
def test_policies_are_equal_and_save_what_they_should(ranks):
    for rows, checks in spawn(
        compared, ranks, ["--preset", "smoke", "--layers", "3"], timeout_s=250
    ):
        assert all(ok for _, ok in checks), checks
        kept = {row[0]: row[2] for row in rows}
        assert kept["full"] < kept["products"] < kept["none"]
        assert kept["full"] < kept["half"] < kept["none"]


def test_two_repeats_are_refused():
    with pytest.raises(UsageError, match="--repeats 2 gives no median; use 3 or more"):
        activation_checkpointing.parse_args(["--repeats", "2"])
