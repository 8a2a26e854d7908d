"""Makes the folder hanging_jobs/: really runs six jobs on gloo, and writes what each rank can tell.

    .venv/core/bin/python chapter03-ddp/exercises/tests/record_hanging_jobs.py

Every rank trains, with one fault in some jobs. Wherever a rank may have to wait, it first writes
torch's flight recorder and its stack; the last ones count. (Later it may be too late: where sizes
differ, gloo ends the process instead of letting it wait.) The recorder's "state" is left out: gloo
never says more than "scheduled", even of what has long been done (torch 2.13).
"""

import json
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

FOLDER = Path(__file__).parent / "hanging_jobs"
CAUSES = ("healthy", "rank-only collective", "order swap", "mismatch", "straggler", "missing rank")
WORLD_SIZE, STEPS, FAULTY_STEP = 3, 4, 2
QUIET_S, LIMIT_S = 6.0, 120.0  # a job that writes nothing for so long has come to its end
SCRIPT = "train.py"  # what this file is called in the recordings


def main():
    FOLDER.mkdir(exist_ok=True)
    for number, cause in enumerate(CAUSES):
        faulty = (number + 1) % WORLD_SIZE
        job = {"cause": cause, "rank": None if cause == "healthy" else faulty}
        job["dumps"] = run_job(cause, faulty)
        name = cause.replace(" ", "_").replace("-", "_")
        (FOLDER / f"{name}.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")


def run_job(cause, faulty):
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, cause, rank == faulty, folder) for rank in range(WORLD_SIZE)]
        spawning = multiprocessing.get_context("spawn")
        ranks = [spawning.Process(target=run_rank, args=a, daemon=True) for a in arguments]
        for rank in ranks:
            rank.start()
        wait_until_quiet(Path(folder), WORLD_SIZE - (cause == "missing rank"))
        for rank in ranks:
            rank.kill()
            rank.join()
        return [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(Path(folder).glob("*.json"))
        ]


def wait_until_quiet(folder, expected):
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        written = [path.stat().st_mtime for path in folder.glob("*.json")]
        if len(written) == expected and time.time() - max(written) > QUIET_S:
            return
        time.sleep(0.1)
    raise TimeoutError(f"the job did not come to its end in {LIMIT_S} s")


def run_rank(rank, cause, faulty, folder):
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
    store = dist.FileStore(f"{folder}/store", WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    with suppress(RuntimeError):  # a peer is gone
        train(Teller(rank, Path(folder)), cause, faulty)
    time.sleep(LIMIT_S)  # lest its end be the others' error


def train(teller, cause, faulty):
    weights, statistics = torch.ones(64, 8), torch.ones(8)
    teller.wait(dist.broadcast(weights, 0, async_op=True))
    for step in range(STEPS):
        fault = cause if faulty and step == FAULTY_STEP else ""
        if step == FAULTY_STEP and not faulty:
            time.sleep(1.0)  # the faulty rank comes first, and has written when the others come
        compute(fault, teller)
        loss, gradient = torch.ones(1), torch.ones(64, 7 if fault == "mismatch" else 8)
        if fault == "missing rank":
            teller.die()
        if fault == "rank-only collective":
            teller.wait(dist.all_reduce(loss, async_op=True))  # "only this rank prints the loss"
        if fault == "order swap":
            works = [reduce_statistics(statistics), reduce_gradient(gradient)]
        else:
            works = [reduce_gradient(gradient), reduce_statistics(statistics)]
        for work in works:
            teller.wait(work)
    compute("evaluation", teller)


def compute(fault, teller):
    if fault in ("straggler", "evaluation"):
        teller.tell()
        time.sleep(LIMIT_S)
    time.sleep(0.02)


def reduce_gradient(gradient):
    return dist.all_reduce(gradient, async_op=True)


def reduce_statistics(statistics):
    return dist.all_reduce(statistics, async_op=True)


class Teller:
    """Writes what a rank can tell of itself."""

    def __init__(self, rank, folder):
        self.rank, self.path = rank, folder / f"rank{rank}.json"

    def wait(self, work):
        self.tell()
        work.wait()

    def die(self):
        self.path.unlink()
        os._exit(1)

    def tell(self):
        recorded = pickle.loads(torch._C._distributed_c10d._dump_fr_trace())
        entries = [
            {
                "seq": entry["collective_seq_id"],
                "op": entry["profiling_name"].rpartition(":")[2],
                "shape": entry["input_sizes"][0],
                "dtype": entry["input_dtypes"][0],
                "stack": own_frames((f["name"], f["filename"], f["line"]) for f in entry["frames"]),
            }
            for entry in recorded["entries"]
        ]
        innermost_first = reversed(traceback.extract_stack())
        stack = own_frames((f.name, f.filename, f.lineno) for f in innermost_first)
        part = self.path.with_suffix(".part")
        part.write_text(
            json.dumps({"rank": self.rank, "entries": entries, "stack": stack}), encoding="utf-8"
        )
        part.rename(self.path)


def own_frames(frames):
    """Innermost first: the training's frames, without torch's and the teller's."""
    return [
        {"function": name, "file": SCRIPT, "line": line}
        for name, file, line in frames
        if Path(file).name == Path(__file__).name and name not in ("run_rank", "<module>", "tell")
    ]


if __name__ == "__main__":
    main()
