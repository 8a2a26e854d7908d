"""Pipelines equal one process, keep the schedules' promises, and refuse what cannot be cut."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline_parallel
import torch_pipeline_parallel as library
from distlab import predict, script
from distlab.errors import RunError, UsageError
from distlab.model import config_from_args
from distlab.spawning import spawn
from parallel_runs import most_rounding
from parallelism.pipeline import (
    SCHEDULES,
    Direction,
    Links,
    Pipeline,
    Slots,
    Stage,
    check_cuts,
    one_f_one_b,
)
from parallelism.problem import one_process

SMOKE = ["--preset", "smoke", "--device", "cpu", "--stage-ms", "1"]
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 12))  # stages, micro-batches


def shorthand(actions):
    return " ".join(f"{kind[0].upper()}{i}" for kind, i in actions)


def test_the_schedules_are_those_of_the_papers():
    gpipe = SCHEDULES["gpipe"]
    assert shorthand(gpipe(0, 2, 3)) == "F0 F1 F2 B0 B1 B2"
    assert shorthand(one_f_one_b(0, 3, 4)) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert shorthand(one_f_one_b(1, 3, 4)) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert shorthand(one_f_one_b(2, 3, 4)) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert shorthand(one_f_one_b(0, 4, 2)) == "F0 F1 B0 B1"  # fewer micro-batches than stages


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@given(sizes=SIZES)
@settings(deadline=None)
def test_every_schedule_has_the_formulas_bubble_and_memory(name, sizes):
    stages, micro_batches = sizes
    schedules = [SCHEDULES[name](r, stages, micro_batches) for r in range(stages)]
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
    spans = pipeline_parallel.simulate(schedules)
    assert pipeline_parallel.idle_share(spans) == pytest.approx(
        predict.pipeline_bubble(stages, micro_batches), abs=1e-12
    )


def test_the_bubble_is_the_same_whatever_a_backward_costs(monkeypatch):
    for backward in (1, 2, 3, 7):
        monkeypatch.setitem(pipeline_parallel.COSTS, "backward", backward)
        for schedule in SCHEDULES.values():
            spans = pipeline_parallel.simulate([schedule(rank, 4, 8) for rank in range(4)])
            assert max(stage[-1][2] for stage in spans) == (8 + 4 - 1) * (1 + backward)


def test_the_simulation_knows_a_deadlock():
    too_early = [("forward", 0), ("backward", 1), ("forward", 1), ("backward", 0)]
    with pytest.raises(ValueError, match="deadlock"):
        pipeline_parallel.simulate([too_early, one_f_one_b(1, 2, 2)])


def test_the_drawing_shows_when_a_stage_works():
    spans = pipeline_parallel.simulate([one_f_one_b(rank, 2, 2) for rank in range(2)])
    assert [pipeline_parallel.draw(own) for own in spans] == [
        "F0 F1 .  .  B0--- .  B1---",
        ".  F0 B0--- F1 B1---",
    ]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_from_scratch_equals_the_library_equals_one_process(ranks):
    for scratch, theirs, differences in spawn(run_both, ranks, timeout_s=120):
        for (checks, _), each in ((scratch, 7), (theirs, 4)):
            assert [name for name, ok in checks if not ok] == []
            assert len(checks) == 2 * each + (each == 7)
        sent = {name: c for name, c in scratch[1].items() if "sent by" in name}
        assert len(sent) == 6
        assert all(c["predicted"] == c["measured"] > 0 for c in sent.values())
        assert len(differences) > 9
        args = pipeline_parallel.parse_args(SMOKE)
        tokens = args.batch_size * args.seq_len
        assert max(differences.values()) < most_rounding(config_from_args(args), tokens)


@pytest.mark.slow
def test_stages_that_do_not_divide_the_layers_and_few_micro_batches_agree_too():
    odd = [*SMOKE, "--layers", "5", "--batch-size", "6", "--micro-batches", "2", "--seq-len", "7"]
    checks, _ = spawn(
        run_script, 3, pipeline_parallel.compare_with_one_process, odd, timeout_s=120
    )[0]
    assert [name for name, ok in checks if not ok] == []


def test_a_tied_embedding_that_is_not_summed_is_noticed():
    checks, _ = spawn(
        run_script,
        2,
        pipeline_parallel.compare_with_one_process,
        SMOKE,
        forget_the_sum,
        timeout_s=120,
    )[0]
    assert "gpipe: each gradient is one process's" in [name for name, ok in checks if not ok]


@pytest.mark.slow
def test_blocking_sends_deadlock_in_1f1b_within_the_timeout():
    argv = [*SMOKE, "--schedule", "1f1b", "--timeout", "3"]
    with pytest.raises(RunError, match="Timed out waiting 3000ms for send"):
        spawn(
            run_script,
            2,
            pipeline_parallel.compare_with_one_process,
            argv,
            send_and_wait,
            timeout_s=60,
        )


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (1, [], "a pipeline has 2 stages or more; use torchrun --nproc_per_node=2"),
        (2, ["--micro-batches", "0"], "--micro-batches 0 is too few; use 1 or more"),
        (2, ["--micro-batches", "3"], "--micro-batches 3 does not divide --batch-size 8"),
        (3, ["--layers", "2"], "--layers 2 is too few for 3 stages; use --layers 3 or more"),
    ],
)
def test_what_cannot_be_cut_is_refused(ranks, flags, message):
    args = pipeline_parallel.parse_args([*SMOKE, *flags])
    with pytest.raises(UsageError, match=message):
        check_cuts(args, ranks, args.layers)


def run_script(job, compare_with_one_process, argv, change=lambda: None):
    """The script's own run on this rank: its checks, and its comparisons."""
    change()
    args = pipeline_parallel.parse_args(argv)
    with script.run(args) as run:
        compare_with_one_process(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.comparisons


def forget_the_sum():
    Links.sum_of_both_ends = lambda self, gradient: None


def send_and_wait():
    def send_now(self, tensor, to):
        dist.send(tensor.contiguous(), group=self.group, group_dst=to)

    Direction.send_later = send_now


def run_both(job):
    scratch, theirs = (
        run_script(job, one.compare_with_one_process, SMOKE) for one in (pipeline_parallel, library)
    )
    return scratch, theirs, differences(job)


def differences(job):
    """The largest difference of each gradient of this rank's stage, in its largest elements."""
    args = pipeline_parallel.parse_args(SMOKE)
    with script.run(args) as run:
        problem = one_process(run, args, job)
    own, theirs = (Stage(problem.model, job.rank, job.world_size) for _ in range(2))
    links = Links(job, 30.0)
    actions = one_f_one_b(job.rank, job.world_size, 4)
    loss = Pipeline(own, links).step(actions, Slots(job, 0.0), problem.input_ids, problem.targets)
    library_loss = library.step(library.Schedule1F1B, theirs, job, problem, 4)
    if theirs.holds_tied_embedding:
        links.sum_of_both_ends(theirs.model.embed_tokens.weight.grad)
    pairs = zip(own.named_parameters(), theirs.parameters(), strict=True)
    relative = {name: library.distance(a.grad, b.grad).item() for (name, a), b in pairs}
    return relative | {"loss": torch.abs(loss - library_loss).item()}
