"""ZeRO from scratch trains as one process does, in every stage; stage 3 is chapter 4's FSDP."""

import pytest
import torch
from torch import nn

from distlab.errors import RunError, UsageError
from distlab.model import Llama, num_parameters
from distlab.model_config import ModelConfig
from distlab.spawning import spawn
from fsdp.sharded import FullySharded
from zero import engine
from zero.stages import Zero

SHAPE = ModelConfig(40, 24, 40, 3, 2, 1)  # sizes that 2, 3 and 4 ranks do not divide
STEPS, SWAP_AFTER, BATCH = 6, 3, 24
TOLERANCE = 1e-5
CASES = ("plain", "tied", "accumulated", "frozen and unused")


class Partly(nn.Module):
    """A model of which one layer is frozen, and one never used."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))
        self.layers[1].requires_grad_(False)

    def forward(self, inputs, targets):
        for layer in self.layers[:3]:
            inputs = torch.tanh(layer(inputs))
        return (inputs - targets).square().mean()


def model_of(case):
    torch.manual_seed(0)
    if case == "frozen and unused":
        return Partly()
    config = ModelConfig(**{**vars(SHAPE), "tie_word_embeddings": case == "tied"})
    return Llama(config)


def units_of(model):
    return model.layers if isinstance(model, Partly) else model.model.layers


def batches(case):
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        if case == "frozen and unused":
            yield torch.randn(BATCH, 7, generator=draw), torch.randn(BATCH, 7, generator=draw)
        else:
            tokens = torch.randint(40, (BATCH, 9), generator=draw)
            yield tokens[:, :-1], tokens[:, 1:]


def pieces(case, batch, rank, ranks):
    own = [part.chunk(ranks)[rank] for part in batch]
    return zip(*(part.chunk(2 if case == "accumulated" else 1) for part in own), strict=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def alone(case):
    model = model_of(case)
    optimizer = sgd(p for p in model.parameters() if p.requires_grad)
    for batch in batches(case):
        model(batch[0], targets=batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def with_zero(case, job, stage):
    model = model_of(case)
    zero = Zero(model, units_of(model), stage)
    optimizer = sgd(zero.partitions)
    for batch in batches(case):
        for inputs, targets in (split := [*pieces(case, batch, job.rank, job.world_size)]):
            (model(inputs, targets=targets) / len(split)).backward()
        zero.step(optimizer)
    return zero.whole(lambda unit: unit.partition)


def every_stage(job):
    found = {}
    for case in CASES:
        reference = alone(case)
        for stage in range(4):
            weights = with_zero(case, job, stage)
            worst = max((weights[n] - reference[n]).abs().max().item() for n in weights)
            trained = {n for n, p in model_of(case).named_parameters() if p.requires_grad}
            found[case, stage] = worst if weights.keys() == trained else float("inf")
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_stage_is_one_process(ranks):
    for found in spawn(every_stage, ranks):
        assert max(found.values()) < TOLERANCE, found


def swapped(job):
    """Stage 3, then FullySharded from its weights and momentum; and FullySharded throughout."""

    def train(module, shards, optimizer, begin, end, step):
        for number, batch in enumerate(batches("plain")):
            if begin <= number < end:
                inputs, targets = (part.chunk(job.world_size)[job.rank] for part in batch)
                module(inputs, targets=targets).backward()
                step(optimizer)

    def plainly(optimizer):
        optimizer.step()
        optimizer.zero_grad()

    model = model_of("plain")
    zero = Zero(model, units_of(model), 3)
    optimizer = sgd(zero.partitions)
    train(model, None, optimizer, 0, SWAP_AFTER, zero.step)
    weights = zero.whole(lambda unit: unit.partition)
    momentum = zero.whole(lambda unit: optimizer.state[unit.partition]["momentum_buffer"])

    model = model_of("plain")
    model.load_state_dict(weights)
    sharded = FullySharded(model, units_of(model))
    later = sgd(sharded.parameters())
    for flat in sharded.flats:  # the same values, in this wrapper's own layout
        whole = torch.zeros(flat.padded)
        for slots, view in zip(flat.slots, flat.views(whole), strict=True):
            view.copy_(momentum[slots[0].path])
        own = whole.chunk(job.world_size)[job.rank]
        later.state[flat.shard]["momentum_buffer"] = own.clone()
    train(sharded, None, later, SWAP_AFTER, STEPS, plainly)

    model = model_of("plain")
    throughout = FullySharded(model, units_of(model))
    train(throughout, None, sgd(throughout.parameters()), 0, STEPS, plainly)
    both = [wrapper.whole(lambda shard: shard) for wrapper in (sharded, throughout)]
    return max((both[0][n] - both[1][n]).abs().max().item() for n in both[1])


@pytest.mark.parametrize("ranks", [2, 3])
def test_stage_3_and_fsdp_take_over_from_each_other(ranks):
    assert max(spawn(swapped, ranks)) < TOLERANCE


def narrow(job):
    """Bytes of a mixed precision's parts, for each parameter."""
    found = {}
    for stage in range(4):
        model = model_of("plain")
        zero = Zero(model, units_of(model), stage, torch.bfloat16)
        optimizer = torch.optim.AdamW(zero.partitions)
        losses = []
        for batch in batches("plain"):
            inputs, targets = (part.chunk(job.world_size)[job.rank] for part in batch)
            loss = model(inputs, targets=targets)
            loss.backward()
            losses.append(loss.item())
            zero.step(optimizer)
        found[stage] = losses, {unit.flat.dtype for unit in zero.units}
    return found


def test_in_mixed_precision_all_stages_compute_alike():
    for found in spawn(narrow, 2):
        losses = [own for own, _ in found.values()]
        assert all(dtypes == {torch.bfloat16} for _, dtypes in found.values())
        for own in losses[1:]:
            assert own == pytest.approx(losses[0], abs=2e-2)


def between_micro_batches(job):
    """Bytes of gradients for each parameter, in stages 1 and 2: after each of two micro-batches."""
    found = {}
    for stage in (1, 2):
        model = model_of("plain")
        config = engine.stage_config(stage, 1, accumulate=2)
        with engine.engine_of(model, config, job) as trained:
            held = []
            for inputs, targets in list(batches("plain"))[:2]:
                trained.backward(trained(inputs[:1], targets=targets[:1]))
                held.append(engine.held(trained)["gradients"] / num_parameters(model))
                trained.step()
        found[stage] = held
    return found


def test_deepspeeds_stage_1_keeps_whole_gradients_until_the_last_micro_batch():
    for found in spawn(between_micro_batches, 2):
        assert found[1][0] == pytest.approx(4.0), "whole, in float32"
        assert found[2][0] < 2.6 and found[1][1] < 2.6, "half, and what the border cuts"


class Skipping(nn.Module):
    """Of three layers alike, each of three ranks may leave one out."""

    def __init__(self, without):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(3))
        self.without = without

    def forward(self, inputs):
        for number, layer in enumerate(self.layers):
            if number != self.without:
                inputs = torch.tanh(layer(inputs))
        return inputs.square().mean()


def a_unit_left_out(job):
    """Weights beside one process's in stages 0 and 1, and what stages 2 and 3 say."""
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    without = [1 + rank % 2 for rank in range(job.world_size)]
    reference = Skipping(None)
    optimizer = sgd(reference.parameters())
    for part, left_out in zip(inputs.chunk(job.world_size), without, strict=True):
        reference.without = left_out
        (reference(part) / job.world_size).backward()
    optimizer.step()
    told = []
    for stage in (0, 1, 2, 3):
        model = Skipping(without[job.rank])
        zero = Zero(model, model.layers, stage)
        model(inputs.chunk(job.world_size)[job.rank]).backward()
        try:
            zero.step(sgd(zero.partitions))
        except RunError as error:
            told.append(str(error))
            continue
        whole = zero.whole(lambda unit: unit.partition)
        told.append(max((whole[n] - p).abs().max().item()
                        for n, p in reference.named_parameters() if n in whole))  # fmt: skip
    return told


def test_a_unit_that_some_ranks_leave_out_is_right_or_refused():
    for early, late, *refused in spawn(a_unit_left_out, 3):
        assert max(early, late) < TOLERANCE
        assert all("let every rank run the same" in told for told in refused)


def forward_before_the_step(job):
    """An evaluation between backward and step, and an unused parameter under accumulation."""
    found = []
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    for stage in (1, 3):
        model, reference = Skipping(None), Skipping(None)
        zero = Zero(model, model.layers, stage)
        ours, theirs = sgd(zero.partitions), sgd(reference.parameters())
        for _ in range(3):
            for _ in range(2):
                model(inputs.chunk(job.world_size)[job.rank]).backward()
                reference(inputs).backward()
            with torch.no_grad():
                model(inputs)
            zero.step(ours)
            theirs.step()
            theirs.zero_grad()
        whole = zero.whole(lambda unit: unit.partition)
        found.append(max((whole[n] - p).abs().max().item()
                         for n, p in reference.named_parameters()))  # fmt: skip
    return found


def test_an_evaluation_before_the_step_leaves_no_old_weights():
    for found in spawn(forward_before_the_step, 2):
        assert max(found) < TOLERANCE


def refused(job, dtype, stage):
    model = Skipping(None).to(dtype)
    if stage == 3:
        model.layers[2].weight = model.layers[0].weight
    with pytest.raises(UsageError) as told:
        Zero(model, model.layers, stage)
    return str(told.value)


@pytest.mark.parametrize(
    ("dtype", "stage", "line"),
    [
        (torch.float64, 1, "a model in torch.float64 is not divided; give it in float32"),
        (torch.float32, 3, "layers.0.weight is in two units; stage 3 frees it after the first"),
    ],
)
def test_what_is_not_divided_is_refused(dtype, stage, line):
    assert line in spawn(refused, 1, dtype, stage)[0]
