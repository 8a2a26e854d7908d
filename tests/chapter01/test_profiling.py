"""The profiler's verdict: right on made-up timelines, its counts right on operators one can count.

That each planted bottleneck is named on a real run is a check of the script itself, which the
lesson's commands run.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import profiling
from distlab.errors import UsageError
from distlab.model import SIZES, Llama
from intro import trainer as training
from intro import verdict

CPU = torch.device("cpu")
BUSY = {"compute-bound": 2.0, "memory-bound": 1.0, "launch-bound": 0.1}


def event(name, begin, end, on_gpu=False, thread=1, annotation=False):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=begin, end=end),
        device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
        thread=thread,
        is_user_annotation=annotation,
    )


def kernels(*spans):
    return [event("kernel", begin, end, on_gpu=True) for begin, end in spans]


def verdict_on(events, blocked_seconds=0.0, least=BUSY):
    return verdict.bottleneck(verdict.read_profile(events, blocked_seconds), least)


@pytest.mark.parametrize(
    ("on_host", "expected"),
    [
        ([event("data", 110, 290)], "input-bound"),
        ([event("cudaStreamSynchronize", 50, 105)], "sync-bound"),
        ([event("cudaLaunchKernel", 295, 299)], "launch-bound"),
    ],
)
def test_an_idle_gpu_is_explained_by_what_its_host_did(on_host, expected):
    assert verdict_on([*kernels((0, 100), (300, 400)), *on_host]) == expected


def test_waiting_for_a_gpu_that_is_busy_all_the_time_is_no_bottleneck():
    on_host = [event("cudaStreamSynchronize", 0, 199), event("data", 0, 90)]
    annotation = event("forward", 0, 1000, on_gpu=True, annotation=True)
    evidence = verdict.read_profile([*kernels((0, 100), (100, 200)), *on_host, annotation], 0.0)
    assert evidence.computing == 1.0
    assert verdict.bottleneck(evidence, BUSY) == "compute-bound"


def test_kernels_that_overlap_count_once():
    evidence = verdict.read_profile(kernels((0, 100), (50, 80), (90, 200), (300, 400)), 0.0)
    assert evidence.computing == pytest.approx(300 / 400)


def test_a_cpu_waits_for_input():
    events = [event("step", 0, 1000), event("data", 0, 600), event("aten::mm", 600, 1000)]
    assert verdict_on(events) == "input-bound"


def test_a_cpu_that_sleeps_between_operators_is_sync_bound_and_one_that_does_not_launch_bound():
    events = [event("step", 0, 1000), event("data", 0, 1), event("aten::mm", 400, 900)]
    assert verdict_on(events, blocked_seconds=400e-6) == "sync-bound"
    assert verdict_on(events, blocked_seconds=0.0) == "launch-bound"


def test_sleep_inside_of_operators_is_no_synchronisation():
    events = [event("step", 0, 1000), event("data", 0, 1), event("aten::mm", 1, 1000)]
    assert verdict.read_profile(events, blocked_seconds=900e-6).blocked_in_sync == 0.0


def test_many_short_operators_are_launch_bound():
    operators = [event("aten::add", begin, begin + 8) for begin in range(10, 1000, 10)]
    inner = [event("aten::empty", begin + 1, begin + 2) for begin in range(10, 1000, 10)]
    evidence = verdict.read_profile([event("step", 0, 1000), *operators, *inner], 0.0)
    assert evidence.operators == len(operators)
    assert verdict.bottleneck(evidence, BUSY) == "launch-bound"


def test_operators_of_other_threads_do_not_count():
    events = [event("step", 0, 1000), event("aten::mm", 0, 1000)]
    loader = event("aten::cat", 200, 900, thread=2)
    assert verdict.read_profile([*events, loader], 0.0).operators == 1


def test_shares_sum_to_one():
    events = [event("step", 0, 1000), event("data", 0, 100), event("aten::mm", 300, 800)]
    found = verdict.read_profile(events, blocked_seconds=50e-6)
    shares = (found.waiting_for_input, found.blocked_in_sync, found.launching, found.computing)
    assert sum(shares) == pytest.approx(1.0)


def test_the_work_of_a_busy_device_decides_between_the_rest():
    events = [event("step", 0, 1000), event("aten::mm", 0, 1000)]
    for name in BUSY:
        assert verdict_on(events, least=dict.fromkeys(BUSY, 1.0) | {name: 2.0}) == name


def test_flops_and_bytes_of_operators_that_one_can_count():
    a, b = torch.randn(8, 4), torch.randn(4, 2)
    with verdict.StepAnatomy([], CPU) as anatomy:
        c = a @ b
        c.view(16).add_(1)
        c.t()  # moves nothing
    product, addition = anatomy.operators
    assert (product.name, product.flops) == ("mm", 2 * 8 * 4 * 2)
    assert product.bytes_moved == 4 * (8 * 4 + 4 * 2 + 8 * 2)
    assert (addition.name, addition.bytes_moved) == ("add_", 4 * 2 * 16)


def test_memory_is_alive_until_it_is_freed():
    weight = torch.nn.Parameter(torch.randn(100, 100))
    with verdict.StepAnatomy([weight], CPU) as anatomy:
        hidden = torch.randn(50, 100) @ weight  # 20 kB of input, 20 kB of output
        loss = hidden.sum()
        loss.backward()
        del hidden, loss
        weight.grad.add_(1)
    assert max(anatomy.activations) >= 40_000
    assert anatomy.gradients[0] == 0
    assert anatomy.gradients[-1] == 40_000
    assert anatomy.activations[-1] < 1_000  # scalars at most


def test_an_operator_is_limited_by_its_largest_need():
    operators = [
        verdict.Operator("mm", torch.float32, 1000, 10),
        verdict.Operator("add", torch.float32, 0, 100),
        verdict.Operator("add", torch.float32, 0, 1),
    ]
    sums = verdict.least_seconds(operators, lambda _: 10.0, bandwidth=1.0, call=2.0)
    assert sums == {"compute-bound": 100.0, "memory-bound": 100.0, "launch-bound": 2.0}


class OneBatch:
    """A loader that always gives the same two short sequences."""

    def __next__(self):
        batch = torch.zeros(2, 16, dtype=torch.int64)
        return batch, batch

    def close(self):
        pass


def test_the_loop_sleeps_where_it_was_told_to():
    with training.Trainer(Llama(SIZES["smoke"]), OneBatch(), CPU, "float32") as trainer:
        trainer.plant("sync")
        waiting = trainer.run(2)
        trainer.plant("slow-input")
        starving = trainer.run(2)
    # Three fifths are planted; the rest of the machine may take some of it.
    assert waiting.blocked_seconds / (2 * waiting.seconds) > 0.4
    assert sum(starving.phases["data"]) / (2 * starving.seconds) > 0.4


def test_bad_arguments_are_told_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as ended:
        profiling.parse_args(["--plant", "gremlins"])
    assert ended.value.code == 2
    with pytest.raises(UsageError, match="is a folder"):
        profiling.parse_args(["--preset", "smoke", "--trace", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        profiling.parse_args(
            ["--preset", "smoke", "--trace", str(tmp_path / "file" / "trace.json")]
        )
