"""What training scripts share: refusals, the held-out loss, progress, the schedule, the outcome."""

import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distlab import script
from distlab.data import Tokens
from distlab.errors import RunError
from distlab.spawning import spawn
from distlab.training import flags, outcome
from distlab.training.held_out import HeldOut
from distlab.training.progress import Progress, StopRequest, warmup_cosine

JOB = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


def test_a_batch_that_does_not_divide_is_told_with_those_that_do():
    with pytest.raises(script.UsageError, match=r"2 rank\(s\) x --accumulate 4; .* 8 or 16$"):
        flags.refuse_batch(SimpleNamespace(batch_size=12, accumulate=4), 2)
    with pytest.raises(script.UsageError, match="use --batch-size 8$"):
        flags.refuse_batch(SimpleNamespace(batch_size=2, accumulate=4), 2)


def test_an_export_that_cannot_be_written_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(script.UsageError, match=r"^--export \S+/file/model cannot be written: "):
        flags.refuse_used_folder(tmp_path / "file" / "model")
    flags.refuse_used_folder(tmp_path / "new" / "model")
    assert not (tmp_path / "new" / "model").exists()


def test_float16_where_the_processor_has_none_is_refused(monkeypatch):
    """Of a CPU's versions of torch some cannot; here one is made up."""

    def unsupported(device, dtype):
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'\nand more")

    monkeypatch.setattr(flags, "autocast", unsupported)
    flags.refuse_dtype("float32", torch.device("cpu"))
    with pytest.raises(script.UsageError, match="--dtype float16 does not work on this cpu .*Half"):
        flags.refuse_dtype("float16", torch.device("cpu"))


def by_its_number(input_ids, targets):
    """A model whose loss is the first token's number: windows can be told apart."""
    return input_ids[:, 0].float().mean()


def test_the_held_out_loss_is_the_mean_over_windows_whatever_the_ranks_have():
    """Seven windows on three ranks, in batches of two and of one; rank 2 has the fewest."""
    for loss, counted in spawn(held_out_loss, 3, timeout_s=60):
        assert loss == pytest.approx(np.mean(range(0, 7 * 4, 4))) and counted == 7


def held_out_loss(job):
    tokens = Tokens((np.arange(29, dtype=np.uint16),), 512, "numbers")
    held_out = HeldOut(tokens, job, windows=99, seq_len=4, batch_size=6)
    return held_out.loss(by_its_number), held_out.counted


def test_progress_tells_the_mean_loss_of_the_ranks_and_stops_all_of_them_a_step_later():
    for losses, stopped_after in spawn(two_losses, 2, timeout_s=60):
        assert losses == [1.5, 2.5, 3.5] and stopped_after == 2


def two_losses(job):
    run = SimpleNamespace(progress=lambda steps, label: steps)
    progress = Progress(run, job, steps=9, tokens_per_step=100)
    for step in progress.steps():
        loss = torch.tensor(1.0 + step + job.rank)
        if progress.share(step, loss, asked_to_stop=step == 1 and job.rank == 1):
            return progress.losses(), step


def test_a_loss_that_is_no_number_ends_the_run_on_all_ranks():
    """The next checkpoints would push out those from before."""
    for told, steps in spawn(lost_on_one_rank, 2, timeout_s=60):
        assert told.startswith("the loss of step 3 is nan, and stays so; use a lower")
        assert steps == 3


def lost_on_one_rank(job):
    run = SimpleNamespace(progress=lambda steps, label: steps)
    progress = Progress(run, job, steps=9, tokens_per_step=100)
    with pytest.raises(RunError) as caught:
        for step in progress.steps():
            progress.share(step, torch.tensor(math.nan if step + job.rank == 3 else 1.0), False)
    return str(caught.value), step


def test_tokens_per_second_are_those_of_the_median_step_without_the_first():
    progress = Progress(None, JOB, steps=9, tokens_per_step=100)
    assert progress.tokens_per_second() is None
    progress.seconds = [9.0] * 5 + [1.0, 2.0, 4.0]
    assert progress.tokens_per_second() == 50.0


def test_the_schedule_rises_in_a_line_and_falls_by_a_cosine():
    factors = [warmup_cosine(step, 20, warmup=0.2) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[12] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.05
    assert warmup_cosine(0, 3, warmup=0.0) == 1.0
    assert warmup_cosine(2, 3, warmup=1.0) == 1.0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_to_stop_is_noted_and_nothing_else_happens(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.is_asked
        os.kill(os.getpid(), number)
        assert stop.is_asked
    assert signal.getsignal(number) is before


def test_lines_that_python_reads():
    text = """
    def f(x):
        return x + 1
    else:
    except ValueError:
    word
    # a comment is not counted
    def f(x:
    """
    assert outcome.readable_share(text) == pytest.approx(3 / 4)  # "else:" is one word
    assert outcome.readable_share("") == 0


def test_a_token_that_is_not_the_likeliest_is_regretted():
    logits = torch.tensor([[[0.0, 5.0], [3.0, 1.0], [2.0, 2.5]]])
    written = torch.tensor([[0, 1, 0, 1]])  # after a prompt of one token
    assert outcome.regret(lambda ids: logits, written, prompt=1) == 0
    assert outcome.regret(lambda ids: logits, torch.tensor([[0, 1, 1, 1]]), prompt=1) == 2
