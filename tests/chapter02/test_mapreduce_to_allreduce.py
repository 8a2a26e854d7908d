"""The shuffle loses nothing, for words and for gradients, and the checks notice when it does."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mapreduce_to_allreduce as mapreduce
from distlab import script
from distlab.spawning import spawn

FORMS = ["every occurrence", "combined"]
KEYED = ["every example", "combined"]
SMOKE = ["--preset", "smoke", "--device", "cpu"]


@pytest.mark.parametrize(
    "world_size", [3, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 4))]
)
def test_words_and_gradient_equal_one_process(world_size):
    for checks, _ in spawn(run_script, world_size, SMOKE, timeout_s=120):
        assert [name for name, ok in checks if not ok] == []
        assert len(checks) == 12


def test_a_combiner_saves_bytes_and_an_all_reduce_is_two_shuffles_without_keys():
    _, (words, rows) = spawn(run_script, 2, SMOKE, timeout_s=120)[0]
    occurrences, combined = (words[f"bytes sent, {form}"]["measured"] for form in FORMS)
    assert combined < occurrences / 2
    sent = {row[0]: row[1] for row in rows}
    sizes = 2 * 8  # of the partitions: one number to each other rank
    assert sent["without keys"] - sizes + sent["all-gather"] == sent["ring all-reduce"]
    assert sent["combined"] - sizes == 2 * (sent["without keys"] - sizes)
    assert sent["every example"] - sizes == 5 * (sent["combined"] - sizes)  # 10 examples, 2 ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, noticed",
    [
        ("own_hash", {"every word has one reducer", "counts equal one process's"}),
        ("lost_record", {f"{form}: this rank's chunk equals one process's" for form in KEYED}),
    ],
)
def test_what_loses_a_record_is_noticed(change, noticed):
    ranks = spawn(run_script, 2, SMOKE, change, timeout_s=120)
    assert {name for checks, _ in ranks for name, ok in checks if not ok} == noticed


def run_script(job, argv, change=None):
    """The script's own run on this rank: its checks, its comparisons, and its table of bytes."""
    if change is not None:
        CHANGES[change](job)
    args = mapreduce.parse_args(argv)
    with script.run(args) as run:
        mapreduce.show(run, args, job)
    checks = [(check.name, check.ok) for check in run.checks]
    return checks, (run.comparisons, run.tables["bytes"]["rows"])


def own_hash(job):
    """Each rank hashes in its own way, as Python's hash() does."""
    honest = mapreduce.crc32
    mapreduce.crc32 = lambda word: honest(word) + job.rank


def lost_record(job):
    """The last record that arrives is not added up."""
    honest = mapreduce.reduce_records

    def forgetful(arrived, begin, size):
        *others, last = arrived
        return honest([*others, last[: -mapreduce.RECORD.itemsize]], begin, size)

    mapreduce.reduce_records = forgetful


CHANGES = {"own_hash": own_hash, "lost_record": lost_record}


def test_a_corpus_of_two_words_leaves_reducers_without_any(tmp_path):
    (tmp_path / "a.txt").write_text("ångström ångström 7 x1\n")
    (tmp_path / "b.txt").write_text("x1 ångström\n")
    flags = [*SMOKE, "--corpus", str(tmp_path)]
    assert spawn(count_only, 4, flags, timeout_s=120) == [{"ångström": 3, "x1": 2}] * 4


def count_only(job, argv):
    args = mapreduce.parse_args(argv)
    found = {}
    honest = mapreduce.report_words
    mapreduce.report_words = lambda *told: (found.update(told[3]), honest(*told))
    with script.run(args) as run:
        mapreduce.count_words(run, args, job)
    assert run.status == 0
    return found


def test_words_survive_their_way_to_the_reducer():
    pairs = list(mapreduce.map_words(["def f(x_1, été):\n    return 42 + x_1", "", "été"]))
    words = [word for word, _ in pairs]
    assert words == ["def", "f", "x_1", "été", "return", "x_1", "été"]
    partitions = mapreduce.partition_by_hash(pairs, 3)
    assert [list(mapreduce.decode(mapreduce.encode(part))) for part in partitions] == partitions
    assert sum(map(mapreduce.reduce_words, partitions), Counter()) == Counter(words)


def test_records_are_summed_by_index():
    gradients = [torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([10.0, 20, 30, 40, 50])]
    first, second, third = mapreduce.by_index(gradients, 3)
    assert first.tolist() == [(0, 1.0), (1, 2.0), (0, 10.0), (1, 20.0)]
    assert third.tolist() == [(4, 5.0), (4, 50.0)]
    sent = [second[::-1].copy().view(np.uint8), second.view(np.uint8)]  # in any order
    assert mapreduce.reduce_records(sent, begin=2, size=2).tolist() == [66.0, 88.0]


def test_fewer_examples_than_ranks_are_refused():
    args = mapreduce.parse_args([*SMOKE, "--batch-size", "3"])
    job = SimpleNamespace(world_size=4)
    with pytest.raises(script.UsageError, match="--batch-size 3 leaves .*; use 4 or more"):
        mapreduce.show(None, args, job)
