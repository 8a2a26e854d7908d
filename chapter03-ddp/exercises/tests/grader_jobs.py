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
    begin = chance.choice([1, 77, 4096 - chance.randint(2, 9)])
    faulty = chance.randrange(world_size)
    bad_step = chance.randint(0 if begin == 1 else 1, steps - 1)
    place = chance.randrange(len(calls))
    # all calls of a step may be started before the first is waited for
    at_once = chance.random() < 0.5
    right = [call for _ in range(steps) for call in calls]
    at = bad_step * len(calls) + place
    wrong = list(right)
    if cause == "rank-only collective":
        due = wrong[at]
        own = call_at(chance, "loss.py", chance.choice([990, due["stack"][0]["line"]]))
        alike = chance.random() < 0.5  # only the place tells it from the call that is due
        wrong.insert(at, {**due, "stack": own["stack"]} if alike else own)
    elif cause == "order swap":
        at = bad_step * len(calls) + chance.randrange(len(calls) - 1)
        wrong[at], wrong[at + 1] = wrong[at + 1], wrong[at]
        at_once = at_once or bad_step == 0  # else nobody has called the second one yet
    elif cause == "mismatch":
        wrong[at] = otherwise(wrong[at], chance)
    issued = (bad_step + 1) * len(calls) if at_once else at + 1
    dumps = []
    for rank in range(world_size):
        own, count, function = right, issued, "wait"
        if rank == faulty:
            own = wrong
            if cause == "straggler":
                count, function = at, computing(chance)
        if cause == "healthy":
            count, function = on_its_way(rank, world_size, issued, at_once, chance)
        # what is older than two steps may be overwritten, but not the fault
        window = chance.randint(2 * len(calls), 3 * len(calls))
        numbered = list(enumerate(own[:count], start=begin))[-window:]
        entries = [
            {"seq": seq, **called_from(chance.randint(1, 19), call)} for seq, call in numbered
        ]
        dumps.append({"rank": rank, "entries": entries, "stack": main_thread(function)})
    if cause == "healthy" and chance.random() < 0.5:
        # all the others wait, and not all of them for what this one has not called
        same, others = dumps[0]["entries"], [rank for rank in range(world_size) if rank != faulty]
        behind = chance.choice([set(others), {others[0]}, {others[-1]}])
        for dump in dumps:
            back = dump["rank"] == faulty or dump["rank"] in behind
            dump["entries"] = copy.deepcopy(same[: len(same) - back])
            dump["stack"] = main_thread(computing(chance) if dump["rank"] == faulty else "wait")
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


def on_its_way(rank, world_size, issued, at_once, chance):
    """How much a rank of a healthy job has issued, and where it is: not all but one wait."""
    count = issued - chance.randint(0, 2) if at_once else issued
    return max(0, count), "wait" if rank < world_size - 2 else computing(chance)


def computing(chance):
    return chance.choice(["backward", "forward", "wait_for_batch", "read"])


def program(chance):
    """The calls of a step: at different places, and often of one op, shape and dtype."""
    shape = [chance.randint(2, 64), 8]
    places = [(file, line) for file in ("train.py", "model.py") for line in range(20, 40)]
    return [
        call_at(chance, *place, shape if chance.random() < 0.5 else None)
        for place in chance.sample(places, chance.randint(2, 6))
    ]


def call_at(chance, file, line, shape=None):
    return {
        "op": chance.choice(OPS[: 1 if shape else None]),
        "shape": shape or [chance.randint(1, 4096)],
        "dtype": "Float" if shape else chance.choice(DTYPES),
        "stack": [frame("reduce", line, file)],
    }


def called_from(line, call):
    """The call as a rank records it: the ranks may have come to it by different ways."""
    return {**copy.deepcopy(call), "stack": [*call["stack"], frame("train", line)]}


def otherwise(call, chance):
    """The call with another shape, perhaps of as many elements, or with another dtype."""
    shape = call["shape"]
    shapes = [[*shape[:-1], shape[-1] + 1], [shape[0] + 1, *shape[1:]], [*shape, 1], [1, *shape]]
    if chance.random() < 0.6:
        return {**call, "shape": chance.choice(shapes)}
    return {**call, "dtype": "Double"}


def main_thread(function):
    return [frame(function, 40 if function == "wait" else 300), frame("train", 12)]


def frame(function, line, file="train.py"):
    return {"function": function, "file": file, "line": line}
