"""Jobs that hang: the recorded ones, varied, and new ones from a random program and a fault."""

import copy
import json
from pathlib import Path

RECORDED = Path(__file__).parent / "hanging_jobs"
CAUSES = ("healthy", "missing rank", "straggler", "rank-only collective", "order swap", "mismatch")
OPS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter")
DTYPES = ("Float", "BFloat16", "Half", "Long")


def recorded_jobs():
    """(name, job) of each job that really ran; a job's "rank" and "seq" are what is to be said."""
    for path in sorted(RECORDED.glob("*.json")):
        job = json.loads(path.read_text(encoding="utf-8"))
        job["world_size"] = 3
        first_of_step = {"rank-only collective": 6, "order swap": 6, "mismatch": 6, "straggler": 6}
        job["seq"] = first_of_step.get(job["cause"])  # step 2 begins after 1 + 2 * 2 collectives
        yield path.stem, job


def varied(job, chance):
    """The same fault on another rank of a larger job, with other lines, numbers and windows."""
    job = copy.deepcopy(job)
    dumps = job["dumps"]
    healthy = next(d for d in dumps if d["rank"] != job["rank"])
    extra = chance.randint(0, 4)
    dumps += [{**copy.deepcopy(healthy), "rank": 3 + number} for number in range(extra)]
    job["world_size"] = 3 + extra
    numbers = chance.sample(range(job["world_size"]), job["world_size"])
    later, lower, keep = chance.randint(0, 5000), chance.randint(0, 900), chance.randint(4, 6)
    for dump in dumps:
        dump["rank"] = numbers[dump["rank"]]
        # the ring has room for a few: who is further has lost more of its oldest
        dump["entries"] = dump["entries"][-keep - 2 :]
        for entry in dump["entries"]:
            entry["seq"] += later
        for stack in [dump["stack"], *(entry["stack"] for entry in dump["entries"])]:
            for frame in stack:
                frame["line"] += lower
    chance.shuffle(dumps)
    job["rank"] = None if job["rank"] is None else numbers[job["rank"]]
    job["seq"] = None if job["seq"] is None else job["seq"] + later
    return job


def new_job(cause, chance):
    """A job nobody has seen: `steps` times the same calls, and in one step a fault."""
    world_size, steps = chance.randint(3, 9), chance.randint(3, 6)
    calls = program(chance)
    faulty, bad_step = chance.randrange(world_size), chance.randint(1, steps - 1)
    place = chance.randrange(len(calls))
    at_once = (
        chance.random() < 0.5
    )  # all calls of a step are started before the first is waited for
    right = [call for _ in range(steps) for call in calls]
    at = bad_step * len(calls) + place
    wrong = list(right)
    if cause == "rank-only collective":
        wrong.insert(at, call_at(chance, line=990))
    elif cause == "order swap":
        place = chance.randrange(len(calls) - 1)
        at = bad_step * len(calls) + place
        wrong[at], wrong[at + 1] = wrong[at + 1], wrong[at]
    elif cause == "mismatch":
        wrong[at] = otherwise(wrong[at], chance)
    step_ends = (bad_step + 1) * len(calls)
    issued = step_ends if at_once else at + 1
    window, begin = 3 * len(calls), chance.choice([1, 77, 4000])
    dumps = []
    for rank in range(world_size):
        own, count = (wrong, issued) if rank == faulty else (right, issued)
        function = "wait"
        if cause == "straggler":
            function = "backward" if rank == faulty else "wait"
            count = at if rank == faulty else issued
        if cause == "healthy":
            # ranks on their way: a few calls ahead of each other, and not all but one wait
            count = issued - chance.randint(0, 2) if at_once else issued
            function = "wait" if rank < world_size - 2 else "backward"
        numbered = list(enumerate(own[:count], start=begin))[-window:]
        entries = [{"seq": seq, **copy.deepcopy(call)} for seq, call in numbered]
        stack = [frame(function, 40 if function == "wait" else 300)]
        dumps.append({"rank": rank, "entries": entries, "stack": [*stack, frame("train", 12)]})
    if cause == "missing rank":
        dumps = [dump for dump in dumps if dump["rank"] != faulty]
    chance.shuffle(dumps)
    known = cause not in ("healthy", "missing rank")
    return {
        "cause": cause,
        "dumps": dumps,
        "world_size": world_size,
        "rank": None if cause == "healthy" else faulty,
        "seq": begin + at if known else None,
    }


def program(chance):
    """The calls of a step: at different lines, and often of one shape."""
    shape = [chance.randint(2, 64), 8]
    lines = chance.sample(range(20, 200), chance.randint(2, 6))
    return [call_at(chance, line, shape if chance.random() < 0.5 else None) for line in lines]


def call_at(chance, line, shape=None):
    return {
        "op": chance.choice(OPS[: 1 if shape else None]),
        "shape": shape or [chance.randint(1, 4096)],
        "dtype": "Float" if shape else chance.choice(DTYPES),
        "stack": [frame("reduce", line), frame("train", 12)],
    }


def otherwise(call, chance):
    changed = copy.deepcopy(call)
    if chance.random() < 0.5:
        changed["shape"] = [*call["shape"][:-1], call["shape"][-1] + 1]
    else:
        changed["dtype"] = "Double"
    return changed


def frame(function, line):
    return {"function": function, "file": "train.py", "line": line}
