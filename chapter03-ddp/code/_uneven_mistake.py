"""The mistake of `uneven_inputs.py`: a rank leaves its loop, and the others wait for it."""

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _uneven_cures import Batch, Trainee
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab.display import write_line
from distlab.process import run_command
from distlab.run import Run
from distlab.runtime import Runtime

SCRIPT = Path(__file__).with_name("uneven_inputs.py")
TIMEOUT_S = 3.0
LIMIT_S = 50.0  # for the whole job: its start can be slow
OF_THE_OUTER_JOB = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
                    "SLURM_")  # fmt: skip


def leave_the_loop(trainee: Trainee, own: Sequence[Batch], job: Runtime) -> None:
    """Train on what this rank has. With fewer batches it goes on to the barrier after the loop."""
    trainee.model = DDP(trainee.model)
    began = time.monotonic()
    try:
        for number, batch in enumerate(own, start=1):
            where, began = f"in step {number} of its {len(own)}", time.monotonic()
            trainee.step(trainee.losses(batch.examples).mean())
        where, began = "at the barrier", time.monotonic()
        job.barrier()
    finally:
        write_line(f"rank {job.rank} ended {where} after {time.monotonic() - began:.2f} s")


def run_mistake(run: Run, preset: str) -> None:
    """Start that as a job of two ranks, with a short timeout, and tell what became of it."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(SCRIPT), "--mistake", "--preset", preset, "--timeout", str(TIMEOUT_S),
        "--backend", "gloo", "--device", "cpu",
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith(OF_THE_OUTER_JOB)}
    done = run_command(command, {**clean, "LAB_RECORD_DIR": ""}, timeout_s=LIMIT_S)
    ends = re.findall(r"^(rank (\d) ended .* after ([\d.]+) s)$", done.stdout, re.MULTILINE)
    for line, _, _ in ends:
        run.print(f"trace: without a cure, {line}")
    for line in re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE):
        run.print(f"trace: {line.partition(' This is typically')[0]}")
    waited = max((float(seconds) for _, _, seconds in ends), default=0.0)
    run.compare("without a cure, the wait until the error", TIMEOUT_S, waited, "s")
    run.check_equal("the job without a cure fails", done.status, 1)
    run.check_above("it fails only when the timeout has passed", waited, 0.99 * TIMEOUT_S, "s")
