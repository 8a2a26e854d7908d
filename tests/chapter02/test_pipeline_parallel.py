"""Pipelines equal one process, keep the schedules' promises, and refuse what cannot be cut."""

import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from distlab import predict, script
from distlab.errors import RunError, UsageError
from distlab.files import repo_root
from distlab.spawning import spawn

CODE = repo_root() / "chapter02-gpu-hardware-parallelism" / "code"
SMOKE = ["--preset", "smoke", "--device", "cpu", "--stage-ms", "1"]
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 12))  # stages, micro-batches


@pytest.fixture(scope="module")
def pipeline():
    """The script, and what it says of its schedules."""
    sys.path.insert(0, str(CODE))
    import _pipeline_report
    import pipeline_parallel

    yield pipeline_parallel, _pipeline_report
    sys.path.remove(str(CODE))


def shorthand(actions):
    return " ".join(f"{kind[0].upper()}{i}" for kind, i in actions)


def test_the_schedules_are_those_of_the_papers(pipeline):
    gpipe, one_f_one_b = (pipeline[0].SCHEDULES[name] for name in ("gpipe", "1f1b"))
    assert shorthand(gpipe(0, 2, 3)) == "F0 F1 F2 B0 B1 B2"
    assert shorthand(one_f_one_b(0, 3, 4)) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert shorthand(one_f_one_b(1, 3, 4)) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert shorthand(one_f_one_b(2, 3, 4)) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert shorthand(one_f_one_b(0, 4, 2)) == "F0 F1 B0 B1"  # fewer micro-batches than stages


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@given(sizes=SIZES)
@settings(deadline=None)
def test_every_schedule_has_the_formulas_bubble_and_memory(pipeline, name, sizes):
    stages, micro_batches = sizes
    scripted, report = pipeline
    schedules = [scripted.SCHEDULES[name](r, stages, micro_batches) for r in range(stages)]
    for rank, actions in enumerate(schedules):
        assert sorted(actions) == [
            (k, i) for k in ("backward", "forward") for i in range(micro_batches)
        ]
        alive = most = 0
        for i, (kind, micro_batch) in enumerate(actions):
            alive += 1 if kind == "forward" else -1
            most = max(most, alive)
            assert kind == "forward" or ("forward", micro_batch) in actions[:i]
        assert most == (micro_batches if name == "gpipe" else min(micro_batches, stages - rank))
    spans = report.simulate(schedules)
    assert report.idle_share(spans) == pytest.approx(
        predict.pipeline_bubble(stages, micro_batches), abs=1e-12
    )


def test_the_bubble_is_the_same_whatever_a_backward_costs(pipeline, monkeypatch):
    scripted, report = pipeline
    for backward in (1, 2, 3, 7):
        monkeypatch.setitem(report.COSTS, "backward", backward)
        for schedule in scripted.SCHEDULES.values():
            spans = report.simulate([schedule(rank, 4, 8) for rank in range(4)])
            assert max(stage[-1][2] for stage in spans) == (8 + 4 - 1) * (1 + backward)


def test_the_simulation_knows_a_deadlock(pipeline):
    scripted, report = pipeline
    too_early = [("forward", 0), ("backward", 1), ("forward", 1), ("backward", 0)]
    with pytest.raises(ValueError, match="deadlock"):
        report.simulate([too_early, scripted.one_f_one_b(1, 2, 2)])


def test_the_drawing_shows_when_a_stage_works(pipeline):
    scripted, report = pipeline
    spans = report.simulate([scripted.one_f_one_b(rank, 2, 2) for rank in range(2)])
    assert [report.draw(own) for own in spans] == [
        "F0 F1 .  .  B0--- .  B1---",
        ".  F0 B0--- F1 B1---",
    ]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_from_scratch_equals_the_library_equals_one_process(ranks):
    for scratch, library, differences in spawn(run_both, ranks, timeout_s=120):
        for (checks, _), each in ((scratch, 7), (library, 4)):
            assert [name for name, ok in checks if not ok] == []
            assert len(checks) == 2 * each + (each == 7)
        sent = {name: c for name, c in scratch[1].items() if "sent by" in name}
        assert len(sent) == 6
        assert all(c["predicted"] == c["measured"] > 0 for c in sent.values())
        assert len(differences) > 9
        assert max(differences.values()) < 1e-6


@pytest.mark.slow
def test_stages_that_do_not_divide_the_layers_and_few_micro_batches_agree_too():
    odd = [*SMOKE, "--layers", "5", "--batch-size", "6", "--micro-batches", "2", "--seq-len", "7"]
    checks, _ = spawn(run_script, 3, "pipeline_parallel", odd, timeout_s=120)[0]
    assert [name for name, ok in checks if not ok] == []


def test_a_tied_embedding_that_is_not_summed_is_noticed():
    checks, _ = spawn(run_script, 2, "pipeline_parallel", SMOKE, forget_the_sum, timeout_s=120)[0]
    assert "gpipe: each gradient is one process's" in [name for name, ok in checks if not ok]


@pytest.mark.slow
def test_blocking_sends_deadlock_in_1f1b_within_the_timeout():
    argv = [*SMOKE, "--schedule", "1f1b", "--timeout", "3"]
    with pytest.raises(RunError, match="Timed out waiting 3000ms for send"):
        spawn(run_script, 2, "pipeline_parallel", argv, send_and_wait, timeout_s=60)


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (1, [], "a pipeline has 2 stages or more; use torchrun --nproc_per_node=2"),
        (2, ["--micro-batches", "0"], "--micro-batches 0 is too few; use 1 or more"),
        (2, ["--micro-batches", "3"], "--micro-batches 3 does not divide --batch-size 8"),
        (3, ["--layers", "2"], "--layers 2 is too few for 3 stages; use --layers 3 or more"),
    ],
)
def test_what_cannot_be_cut_is_refused(pipeline, ranks, flags, message):
    scripted, _ = pipeline
    args = scripted.parse_args([*SMOKE, *flags])
    with pytest.raises(UsageError, match=message):
        scripted.check_cuts(args, ranks, args.layers)


def run_script(job, module, argv, change=lambda: None):
    """The script's own run on this rank: its checks, and its comparisons."""
    sys.path.insert(0, str(CODE))
    scripted = __import__(module)
    change()
    args = scripted.parse_args(argv)
    with script.run(args) as run:
        scripted.compare_with_one_process(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.comparisons


def forget_the_sum():
    import _pipeline_links

    _pipeline_links.Links.sum_of_both_ends = lambda self, gradient: None


def send_and_wait():
    import _pipeline_links

    def send_now(self, tensor, to):
        dist.send(tensor.contiguous(), group=self.group, group_dst=to)

    _pipeline_links.Direction.send_later = send_now


def run_both(job):
    scratch = run_script(job, "pipeline_parallel", SMOKE)
    return scratch, run_script(job, "torch_pipeline_parallel", SMOKE[:-2]), differences(job)


def differences(job):
    """The largest difference of each gradient of this rank's stage, in its largest elements."""
    sys.path.insert(0, str(CODE))
    import pipeline_parallel as scratch
    import torch_pipeline_parallel as library

    args = scratch.parse_args(SMOKE)
    with script.run(args) as run:
        problem = scratch.one_process(run, args, job)
    own, theirs = (scratch.Stage(problem.model, job.rank, job.world_size) for _ in range(2))
    links = scratch.Links(job, 30.0)
    actions = scratch.one_f_one_b(job.rank, job.world_size, 4)
    slots = scratch.Slots(job, 0.0)
    loss = scratch.Pipeline(own, links).step(actions, slots, problem.input_ids, problem.targets)
    library_loss = library.step(library.Schedule1F1B, theirs, job, problem, 4)
    if theirs.holds_tied_embedding:
        links.sum_of_both_ends(theirs.model.embed_tokens.weight.grad)
    pairs = zip(own.named_parameters(), theirs.parameters(), strict=True)
    relative = {name: library.distance(a.grad, b.grad).item() for (name, a), b in pairs}
    return relative | {"loss": torch.abs(loss - library_loss).item()}
