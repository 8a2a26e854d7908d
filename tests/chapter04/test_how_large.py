"""The search for the largest model, and what it predicts; the lesson's block runs its probes."""

from dataclasses import replace

import pytest

import how_large
from distlab.errors import UsageError

SMOKE = ["--preset", "smoke", "--device", "cpu"]


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 9, 20, 100])
@pytest.mark.parametrize("guess", [0, 1, 8, 50])
def test_the_search_finds_the_most_from_any_guess(most, guess):
    asked = []

    def fits(layers):
        asked.append(layers)
        return layers <= most

    assert how_large.largest(fits, guess) == most
    assert len(asked) == len(set(asked)) <= 14 and min(asked) >= 1


def test_more_ranks_and_each_way_to_save_memory_need_less():
    args = how_large.parse_args(SMOKE)

    def needed(name, ranks=2, layers=12):
        args.ranks = ranks
        return how_large.plan_of(args, how_large.MODES[name], layers).needed()

    replica, whole, kept = map(needed, ["DDP", "fully sharded", "kept after forward"])
    assert needed("fully sharded, on disk") < whole < kept < replica
    assert needed("DDP, recomputing") < replica
    assert needed("fully sharded", ranks=8) < whole
    assert needed("DDP", ranks=8) == replica


def test_a_whole_model_s_state_is_sixteen_bytes_for_each_parameter():
    args = how_large.parse_args(SMOKE)
    plan = how_large.plan_of(args, how_large.MODES["DDP"], 5)
    parameters = how_large.num_parameters(how_large.config_of(args, 5))
    state = plan.moments()[-1].bytes
    assert state["weights"] + state["optimizer"] + state["gradients"] == 16 * parameters
    alone = replace(plan, sharding=replace(plan.sharding, units="blocks", ranks=1))
    assert alone.peak().bytes == plan.peak().bytes, "one rank has nobody to shard with"


def test_a_memory_too_small_for_a_layer_says_how_much_is_needed():
    with pytest.raises(UsageError, match=r"--memory-mb 1 is too small .* use [\d.]+ or more"):
        how_large.parse_args([*SMOKE, "--memory-mb", "1"])
    with pytest.raises(UsageError, match="--hidden-size 100 is not a multiple of 32"):
        how_large.parse_args([*SMOKE, "--hidden-size", "100"])
