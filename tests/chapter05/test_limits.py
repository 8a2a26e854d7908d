"""DeepSpeed's collectives end in the job's time, and what is said of it names the script's line."""

from pathlib import Path

import torch

from distlab import runtime
from distlab.spawning import spawn
from zero import engine

LIMIT_S = 50.0


def limits(job):
    """Seconds, of the groups that DeepSpeed makes: for its engine, for a pipeline or experts."""
    deepspeed = engine.join(job)
    with engine.engine_of(torch.nn.Linear(4, 4), engine.stage_config(1, 1), job):
        groups = deepspeed.utils.groups
        made = [groups._clone_world_group(), groups._get_data_parallel_group()]
        made += [deepspeed.comm.new_group([0, 1]), torch.distributed.new_group([0, 1])]
        return [one._get_backend(job.device).options._timeout.total_seconds() for one in made]


def test_every_group_has_the_jobs_limit():
    """torch's own is 30 minutes, in which a rank that stands still holds the others."""
    assert spawn(limits, 2, timeout_s=LIMIT_S) == [[LIMIT_S] * 4] * 2


def test_a_lost_rank_is_told_at_the_scripts_line_and_not_at_deepspeeds():
    installed = Path(torch.__file__).parents[1] / "deepspeed" / "comm" / "torch.py"
    code = compile("def reduce():\n    raise RuntimeError('gloo: Timed out')", installed, "exec")
    names: dict = {}
    exec(code, names)
    job = runtime.Runtime(0, 2, 0, 2, torch.device("cpu"), "gloo")
    try:
        names["reduce"]()
    except RuntimeError as error:
        assert "lost the others at test_limits.py:" in runtime._lost_peer(error, job, 5.0)
