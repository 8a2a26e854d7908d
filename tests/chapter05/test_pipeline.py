"""DeepSpeed's pipeline trains what one process trains, however it is cut; what it refuses."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import pipeline
from distlab.errors import UsageError
from distlab.model import SIZES, Llama
from distlab.ranks import gathered
from distlab.spawning import spawn
from zero.engine import begin, engine_of, stage_config
from zero.pipeline_parts import Paced, cut, weights_of

CONFIG = replace(SIZES["smoke"], num_hidden_layers=4, hidden_size=32, intermediate_size=48)
CASES = {  # stages, micro-batches, ZeRO stage, tied embedding, partition_method
    "two replicas, ZeRO 1": (2, 2, 1, True, "parameters"),
    "untied": (2, 2, 0, False, "type:Block"),
    "fewer micro-batches than stages": (4, 1, 0, True, "type:Block"),
    "an odd number of them, another cut": (4, 3, 0, False, "uniform"),
}
PASS_S = 0.02
LIMIT_S = 200


def new_model(tied):
    torch.manual_seed(0)
    return Llama(replace(CONFIG, tie_word_embeddings=tied))


def parted(job, stages, micro_batches, zero, tied, method):
    """How far losses and weights are from one process's after 3 steps, on any rank."""
    alone, replicas = new_model(tied), job.world_size // stages
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    config = stage_config(zero, 12 // replicas // micro_batches, accumulate=micro_batches)
    worst = 0.0
    with engine_of(cut(new_model(tied), stages, job, method), config, job) as engine:
        for _ in range(3):
            tokens = torch.randint(CONFIG.vocab_size, (12, 9))
            loss = alone.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own = tokens.chunk(replicas)[engine.grid.get_data_parallel_id()].chunk(micro_batches)
            piped = engine.train_batch(iter([(part[:, :-1], part[:, 1:]) for part in own]))
            worst = max(worst, abs(piped.item() - loss.item()))
        for name, weight in weights_of(engine.module).items():
            worst = max(worst, (weight - alone.get_parameter(name).detach()).abs().max().item())
    return max(gathered(worst))


def refused(job, zero):
    with pytest.raises(AssertionError) as error:
        begin(cut(new_model(True), 2, job), stage_config(zero, 2, accumulate=2), job)
    return str(error.value)


def paced(job):
    """Of a step of 4 stages and 3 micro-batches: its seconds, and the passes of each stage."""
    with engine_of(cut(new_model(True), 4, job), stage_config(0, 1, accumulate=3), job) as engine:
        pace = Paced(engine, PASS_S, job)
        tokens = torch.zeros(1, 8, dtype=torch.long)
        engine.train_batch(iter([(tokens, tokens)] * 3))
        spans = gathered(pace.passes)
    step = max(own[-1][1] for own in spans) - min(own[0][0] for own in spans)
    return step, [len(own) for own in spans]


def everything(job):
    worst = {name: parted(job, *case) for name, case in CASES.items()}
    return worst, paced(job), [refused(job, zero) for zero in (2, 3)]


@pytest.fixture(scope="module")
def found():
    """What 4 ranks found, which import DeepSpeed once."""
    return spawn(everything, 4, timeout_s=LIMIT_S)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_is_one_process(found, name):
    assert found[0][name] < 1e-5


def test_no_step_is_shorter_than_its_formula(found):
    step, passes = found[1]
    assert passes == [6] * 4  # 3 micro-batches, forward and backward
    assert step >= (3 + 4 - 1) * 3 * PASS_S  # a backward is twice a forward


def test_stages_2_and_3_are_refused(found):
    assert found[2] == ["ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism"] * 2


@pytest.mark.parametrize(
    ("ranks", "flags", "told"),
    [
        (3, [], r"3 rank\(s\): this wants 2 or 4; use torchrun --nproc_per_node=4"),
        (4, ["--layers", "6"], "--layers 6 is no multiple of 4 stages"),
        (4, ["--batch-size", "12"], "--batch-size 12 does not divide .* use a multiple of 8"),
    ],
)
def test_what_cannot_be_cut(monkeypatch, ranks, flags, told):
    monkeypatch.setattr(pipeline, "detect_launch", lambda: Namespace(world_size=ranks))
    with pytest.raises(UsageError, match=told):
        pipeline.parse_args(["--preset", "smoke", *flags])
