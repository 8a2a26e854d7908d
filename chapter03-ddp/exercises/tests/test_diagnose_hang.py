"""Task 6: recorded jobs, their variations, and jobs that are made for this very grading."""

import copy
import random

import pytest
from grader_jobs import CAUSES, new_job, recorded_jobs, varied

FAULTS = [cause for cause in CAUSES if cause != "healthy"]


@pytest.fixture
def dice(chance):
    return random.Random(int(chance.integers(2**32)))


def assert_diagnosis(student, job, name):
    dumps = copy.deepcopy(job["dumps"])
    told = student.diagnose(dumps, job["world_size"])
    got = (told.cause, told.rank, told.seq)
    expected = (job["cause"], job["rank"], job["seq"])
    assert got == expected, (
        f"{name}: you say {in_words(*got)}; it is {in_words(*expected)}.{evidence(job)}"
    )
    assert dumps == job["dumps"], f"{name}: the dumps were changed"


def in_words(cause, rank, seq):
    words = f"{cause}"
    words += "" if rank is None else f", rank {rank}"
    return words + ("" if seq is None else f", collective {seq}")


def evidence(job):
    """The calls at the collective in question, or where everybody is."""
    lines = []
    for dump in sorted(job["dumps"], key=lambda dump: dump["rank"]):
        entries = dump["entries"]
        shown = [entry for entry in entries if entry["seq"] == job["seq"]] or entries[-1:]
        for entry in shown:
            place = entry["stack"][0]
            lines.append(
                f"rank {dump['rank']}, now in {dump['stack'][0]['function']}: #{entry['seq']} "
                f"{entry['op']} {entry['shape']} {entry['dtype']} at {place['file']}:"
                f"{place['line']}"
            )
    return "".join(f"\n{line}" for line in lines[:9])


def test_recorded_jobs(student):
    for name, job in recorded_jobs():
        assert_diagnosis(student, job, f"the recorded job {name}")


def test_other_ranks_and_windows(student, dice):
    for _ in range(10):
        for name, job in recorded_jobs():
            assert_diagnosis(student, varied(job, dice), f"the job {name}, varied")


def test_jobs_nobody_has_seen(student, dice):
    for _ in range(30):
        for cause in FAULTS:
            assert_diagnosis(student, new_job(cause, dice), "a new job")


def test_a_healthy_job_and_a_slow_one_are_no_hangs(student, dice):
    for _ in range(40):
        for cause in ("healthy", "straggler"):
            assert_diagnosis(student, new_job(cause, dice), f"a {cause} job")
