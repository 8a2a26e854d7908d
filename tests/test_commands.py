"""Every command of README.md and of every main.md is run, at smoke size, and does what it says.

README's first command runs a chapter, and what became of each command in that very run is taken
for the chapter's own tests; where README's was not run, they run the commands themselves.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from distlab.lab import shape
from distlab.lab.blocks import run_block
from distlab.lab.lessons import Block, all_blocks
from distlab.lab.running import kept_outcome
from distlab.lab.servers import Servers
from distlab.lab.warm import warm_commands

SMOKE_LIMIT_S, LAB_LIMIT_S = 420, 1500  # of a script's command; of the lab's, which run many
FAST_BLOCKS = 3  # of a lesson


def _cases() -> Iterator[pytest.param]:
    """Each block with gloo, and those that compute with NCCL too.

    The fast tier has the first commands of each lesson: it keeps its three minutes as they grow.
    """
    fast_ones: Counter[Path] = Counter()
    for block in all_blocks():
        if block.background:
            continue
        fast = bool(block.scripts) and fast_ones[block.lesson] < FAST_BLOCKS
        fast_ones[block.lesson] += fast
        for backend in ("gloo", "nccl") if block.scripts and not block.norun else ("gloo",):
            marks = [pytest.mark.timeout(_limit_s(block) + 60)]
            marks += [] if fast else [pytest.mark.slow]
            yield pytest.param(block, backend, marks=marks, id=f"{block.id}-{backend}")


def _limit_s(block: Block) -> int:
    return SMOKE_LIMIT_S if block.scripts else LAB_LIMIT_S


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """python and torchrun need not import torch anew for each command; LAB_COLD=1 lets them."""
    with warm_commands(tmp_path_factory.mktemp("warm")):
        yield


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers("smoke", tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where `lab run`, when a block calls it, leaves what became of its own commands."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("outcomes")
        patch.setenv("LAB_OUTCOMES", str(folder))
        yield folder


@pytest.mark.timeout(600)  # a server's start, and a command
@pytest.mark.parametrize(("block", "backend"), list(_cases()))
def test_command(
    block: Block, backend: str, servers: Servers, outcomes: Path, ledger, tmp_path: Path
) -> None:
    outcome = kept_outcome(outcomes, block, backend)
    if outcome is None:
        if not block.norun:
            servers.start_for(block)
        outcome = run_block(block, "smoke", tmp_path / "records", backend, _limit_s(block))
    if outcome.result == "ran" and backend == "gloo" and block.output is not None:
        printed = outcome.stdout + (outcome.stderr if block.exit else "")
        if changed := shape.difference(block.output, printed, block.free):
            outcome.result = "failed"
            outcome.reason = f"the output shown in the lesson has another shape:\n{changed}"
    ledger.add(outcome)
    if outcome.result == "skipped":
        missing_hardware = block.norun or "GPU" in outcome.reason
        assert missing_hardware or os.environ.get("CI") != "true", outcome.reason
        pytest.skip(outcome.reason)
    assert outcome.result == "ran", f"{block.text}\n{outcome.reason}\n{outcome.stderr[-2000:]}"
