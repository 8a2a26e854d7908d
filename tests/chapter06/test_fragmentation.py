"""The allocators by hand and at random, the predictions by hand, and wrong flags."""

import json
from argparse import Namespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fragmentation
from distlab import script


def jobs(*finals):
    return [fragmentation.Job(1, final) for final in finals]


def test_best_fit_takes_the_smallest_hole_and_joins_neighbours():
    arena = fragmentation.make_allocator("best fit", 0, 20, 20)
    a, b, c, d, e = jobs(6, 2, 3, 2, 3)
    assert all(arena.admit(job, 0) for job in (a, b, c, d))  # 0-6, 6-8, 8-11, 11-13, hole 13-20
    arena.release(a)
    arena.release(c)
    assert arena.holes == [(0, 6), (8, 3), (13, 7)]
    assert arena.admit(e, 0) and arena.pieces[id(e)] == (8, 3)
    assert not arena.admit(jobs(8)[0], 0)  # 13 are free, but not in one piece
    arena.release(b)
    arena.release(e)
    assert arena.holes == [(0, 11), (13, 7)]


def test_buddies_split_and_become_one():
    arena = fragmentation.make_allocator("buddy", 0, 16, 16)
    a, b, c = jobs(3, 5, 4)
    assert all(arena.admit(job, 0) for job in (a, b, c))
    assert [arena.pieces[id(job)] for job in (a, b, c)] == [(0, 4), (8, 8), (4, 4)]
    assert arena.free == 0 and arena.held(b) == 8
    for job in (b, a):
        arena.release(job)
    assert arena.holes == {(8, 8), (0, 4)}
    arena.release(c)
    assert arena.holes == {(0, 16)}


def test_a_capacity_that_is_no_power_of_two_is_several():
    arena = fragmentation.make_allocator("buddy", 0, 20, 20)
    assert arena.holes == {(0, 16), (16, 4)}
    assert arena.admit(jobs(4)[0], 0) and arena.holes == {(0, 16)}


def test_reservation_takes_the_longest_for_everyone():
    arena = fragmentation.make_allocator("reserve max", 0, 20, 8)
    assert [arena.admit(job, 0) for job in jobs(1, 2, 3)] == [True, True, False]


def test_a_page_comes_when_the_last_one_is_full():
    arena = fragmentation.make_allocator("paged", 4, 12, 12)
    [job] = jobs(12)
    assert arena.admit(job, 0) and arena.held(job) == 4
    for length in range(1, 12):
        assert arena.grow(job)
        job.length = length + 1
        assert arena.held(job) == 4 * -(-job.length // 4)
    assert not arena.grow(job) and arena.held(job) == 12
    arena.release(job)
    assert arena.free == 12


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["buddy", "best fit", "reserve max"]),
    capacity=st.integers(16, 70),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 16)), max_size=60),
)
def test_pieces_never_overlap_and_nothing_is_lost(name, capacity, steps):
    arena, held = fragmentation.make_allocator(name, 0, capacity, 16), []
    untouched = sorted(arena.holes)
    for is_new, number in steps:
        if is_new and arena.admit(job := fragmentation.Job(1, number), 0):
            held.append(job)
        elif held and not is_new:
            arena.release(held.pop(number % len(held)))
        parts = sorted([*arena.holes, *arena.pieces.values()])
        ends = [start + size for start, size in parts]
        assert [start for start, _ in parts] == [0, *ends[:-1]] and ends[-1] == capacity
        assert all(arena.held(job) >= job.final for job in held)
    for job in held:
        arena.release(job)
    assert sorted(arena.holes) == untouched


def test_predictions_by_hand():
    lengths = np.array([[10, 2], [1, 6]])  # in its cache: 10, 11; and 1 to 6
    args = Namespace(capacity=1000, max_len=64)
    predict = fragmentation.predict_sequences
    live = (10 + 11 + 1 + 2 + 3 + 4 + 5 + 6) / 8
    assert predict(args, lengths, "paged, 1", 1) == pytest.approx(1000 / (live + 1))
    assert predict(args, lengths, "paged, 16", 16) == pytest.approx(1000 / (live + 7.5 + 16))
    assert predict(args, lengths, "reserve max", 0) == 15
    assert predict(args, lengths, "best fit", 0) == pytest.approx(1000 / ((2 * 12 + 6 * 7) / 8))
    assert predict(args, lengths, "buddy", 0) == pytest.approx(1000 / ((2 * 16 + 6 * 8) / 8))


def test_the_latest_gives_way_and_comes_back():
    usage = fragmentation.Usage()
    arena = fragmentation.make_allocator("paged", 1, 12, 12)
    fragmentation.replay(np.array(6 * [[2, 6]]), arena, usage)
    assert usage.recomputed > 0 and arena.free == 12


def test_drawn_lengths_fit():
    flags = ["--preset", "smoke", "--max-len", "64", "--sigma", "2", "--requests", "2000"]
    lengths = fragmentation.draw_requests(fragmentation.parse_args(flags), seed=1)
    assert lengths.min() >= 1 and lengths.sum(axis=1).max() == 64
    mild = fragmentation.parse_args(["--preset", "smoke", "--sigma", "0.3", "--requests", "4000"])
    means = fragmentation.draw_requests(mild, seed=1).mean(axis=0)
    np.testing.assert_allclose(means, [20, 40], rtol=0.03)  # 4,000 draws: known to 0.5 %


def test_a_smoke_run(tmp_path):
    path = tmp_path / "run.json"
    assert fragmentation.main(["--preset", "smoke", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    for row in record["tables"]["use"]["rows"]:
        assert sum(row[1:5]) == pytest.approx(100) and min(row[1:5]) >= -1e-9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-len", "1"], "--max-len 1 has no room"),
        (["--capacity", "200"], "--max-len 256 is more than --capacity 200"),
        (["--block-sizes", "512"], "--block-sizes 512 leaves fewer than 4 blocks"),
        (["--requests", "3"], "--requests 3 keeps no queue waiting"),
        (["--requests", "8", "--capacity", "65536"], "--requests 8 leave no queue behind"),
        (["--sigma", "-1"], "'-1' is not a number above 0"),
    ],
)
def test_wrong_flags(capsys, flags, words):
    try:
        status = script.status_of(lambda: fragmentation.main(["--preset", "smoke", *flags]))
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and printed.err.count("\n") == 1 and words in printed.err
