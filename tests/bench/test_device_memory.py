"""A device with a size: what fits runs, what does not ends with a line that says what held it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distlab.errors import RunError, UsageError
from distlab.spawning import spawn
from distlab.training.memory import bytes_of, device_memory

WIDTH, LAYERS = 512, 16
STATE_MB = 4 * 4 * WIDTH**2 * LAYERS / 1e6  # weights, gradients, AdamW's two means


def trained(job, megabytes):
    try:
        with device_memory(job, megabytes) as memory:
            layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
            model = nn.Sequential(*layers)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            memory.watch("try more", **bytes_of(model, optimizer))
            memory.phase = "backward"
            model(torch.ones(2, WIDTH)).sum().backward()
            memory.phase = "the optimizer's step"
            optimizer.step()
            return memory.by_kind(), memory.used() / 1e6
    except RunError as error:
        return str(error)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds what a process maps")
def test_memory_is_bounded_to_a_few_megabytes():
    kinds, used = spawn(trained, 1, STATE_MB + 6)[0]
    assert {name: round(size / 1e6, 3) for name, size in kinds.items()} == {
        "weights": round(STATE_MB / 4, 3),
        "gradients": round(STATE_MB / 4, 3),
        "optimizer": round(STATE_MB / 2, 3),
    }
    assert used < STATE_MB + 6
    told = spawn(trained, 1, STATE_MB - 2)[0]
    assert told.startswith("rank 0: its 65.1 MB are used up in the optimizer's step, where 1.05 MB")
    assert "weights 16.8 MB, gradients 16.8 MB, optimizer" in told
    assert told.endswith("; try more")
    assert "are used up in backward" in spawn(trained, 1, STATE_MB / 3)[0]


@pytest.mark.parametrize("megabytes", [1e12, 1e307])
def test_a_bound_above_what_the_process_may_have_is_refused(megabytes):
    job = SimpleNamespace(device=torch.device("cpu"))
    with (
        pytest.raises(UsageError, match=r"^--memory-mb 1e\+\d+ is more than this process may have"),
        device_memory(job, megabytes),
    ):
        pytest.fail("it began")
