"""Steps of the scheduler: what they compute, who is preempted, who shares, who may leave."""

import pytest

from distlab.errors import UsageError
from fake_runner import EOS, MOMENTS, engine_of, names, prompt_of, request_of, shape
from paged_engine.block_manager import BlockManager
from paged_engine.config import EngineConfig
from paged_engine.request import Request, Status
from paged_engine.sampling_params import SamplingParams
from paged_engine.scheduler import Scheduler


def test_running_sequences_come_first_and_prompts_fill_the_budget() -> None:
    engine = engine_of(max_batch_tokens=10)
    engine.add(request_of("a", prompt_of(4)))
    assert shape(engine.step()) == [("a", 0, 4)]
    engine.add(request_of("b", prompt_of(20, first=1)))
    engine.add(request_of("c", prompt_of(3, first=2)))
    assert shape(engine.step()) == [("a", 4, 1), ("b", 0, 9)]
    assert shape(engine.step()) == [("a", 5, 1), ("b", 9, 9)]
    assert shape(engine.step()) == [("a", 6, 1), ("b", 18, 2), ("c", 0, 3)]
    assert shape(engine.step()) == [("b", 20, 1), ("c", 3, 1)]
    engine.run()
    engine.check_outputs()


def test_only_the_chunk_with_the_last_token_samples() -> None:
    engine = engine_of(max_batch_tokens=3)
    engine.add(request_of("a", prompt_of(7)))
    samples = [engine.step().chunks[0].samples for _ in range(4)]
    assert samples == [False, False, True, True]


def test_a_sequence_ends_by_a_stop_token_or_a_limit() -> None:
    ends = {
        "eos": (SamplingParams(max_tokens=50), "stop"),
        "stop token": (
            SamplingParams(max_tokens=50, stop_token_ids=(EOS,), ignore_eos=True),
            "stop",
        ),
        "ignored eos": (SamplingParams(max_tokens=9, ignore_eos=True), "length"),
        "min_tokens": (SamplingParams(max_tokens=9, min_tokens=9), "any"),
        "the model's length": (SamplingParams(max_tokens=50, ignore_eos=True), "length"),
    }
    engine = engine_of(max_model_len=30)
    requests = [
        Request(name, prompt_of(5), params, eos_token_ids=frozenset([EOS]))
        for name, (params, _) in ends.items()
    ]
    for request in requests:
        engine.add(request)
    engine.run()
    eos, stop, ignored, at_least, long = (request.sequences[0] for request in requests)
    assert [one.finish_reason for one in (eos, stop, ignored, long)] == [
        "stop", "stop", "length", "length",
    ]  # fmt: skip
    assert eos.output_ids[-1] == EOS and EOS not in eos.output_ids[:-1]
    assert eos.output_ids == stop.output_ids
    assert ignored.num_output == at_least.num_output == 9
    assert len(long.token_ids) == 30


def test_the_engine_may_end_a_sequence_by_its_text() -> None:
    engine = engine_of()
    request = request_of("a", prompt_of(5), max_tokens=50)
    engine.add(request)
    engine.step()
    engine.scheduler.finish(request.sequences[0], "stop")
    engine.scheduler.finish(request.sequences[0], "length")  # too late
    assert request.sequences[0].finish_reason == "stop"
    assert engine.scheduler.blocks.num_free == 64 and not engine.scheduler.requests
    assert shape(engine.step()) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (request_of("new", prompt_of(30)), "30 tokens and one more .* the model's length, 30"),
        (request_of("new", []), "no tokens"),
        (request_of("used", prompt_of(3)), "'used' is in use"),
        (request_of("new", prompt_of(3), n=5), "n 5 is more than --max-sequences 4"),
    ],
)
def test_a_request_that_can_never_run_is_refused(request_: Request, message: str) -> None:
    engine = engine_of(max_model_len=30, max_sequences=4)
    engine.add(request_of("used", prompt_of(29)))
    with pytest.raises(UsageError, match=message):
        engine.scheduler.add(request_)
    engine.run()
    engine.check_outputs()


def test_a_request_that_the_cache_can_never_hold_is_refused() -> None:
    engine = engine_of(num_blocks=3, max_model_len=1000)
    with pytest.raises(UsageError, match="12 tokens and one more do not fit into the KV cache, 12"):
        engine.add(request_of("a", prompt_of(12)))
    engine.add(request_of("b", prompt_of(11), max_tokens=100))
    engine.run()
    assert engine.order[0].sequences[0].finish_reason == "length"
    assert len(engine.order[0].sequences[0].token_ids) == 12


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="max_batch_tokens 0"):
        EngineConfig("no model", max_batch_tokens=0)


def test_the_latest_arrived_is_preempted_and_comes_back_before_who_waited() -> None:
    engine = engine_of(num_blocks=7, caching=False, max_sequences=3)
    for number, name in enumerate("abcd"):
        engine.add(request_of(name, prompt_of(4, first=number), max_tokens=9))
    while not engine.scheduler.num_preemptions:
        engine.step()
    assert names(engine.scheduler.running) == ["a", "b"]
    assert names(engine.scheduler.waiting) == ["c", "d"]
    preempted = engine.order[2].sequences[0]
    assert preempted.block_table == [] and preempted.computed == 0 and preempted.num_output > 0
    while preempted.status is Status.WAITING:
        engine.step()
    assert names(engine.scheduler.running) == ["c", "d"]
    engine.run()
    engine.check_outputs()


def test_the_latest_arrived_keeps_its_blocks_while_it_waits_for_one_more() -> None:
    engine = engine_of(num_blocks=5, caching=False)
    engine.add(request_of("a", prompt_of(7), max_tokens=5))
    engine.add(request_of("b", prompt_of(7, first=1), max_tokens=9))
    batches = [shape(engine.step()) for _ in range(3)]
    assert batches[2] == [("a", 8, 1)]  # its third block was the last one; b needs one too
    assert engine.order[1].sequences[0].computed == 8
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.num_preemptions == 0


def test_nobody_starts_in_the_room_that_who_runs_needs_next() -> None:
    engine = engine_of(num_blocks=4, caching=False)
    engine.add(request_of("a", prompt_of(4), max_tokens=4))
    engine.add(request_of("b", prompt_of(9, first=1), max_tokens=2))
    assert shape(engine.step()) == [("a", 0, 4)], "b would fit, and be preempted at once"
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tight", [0, 1, 2, 5])
def test_preemption_with_prefix_caching_gives_the_tokens_of_a_run_alone(
    block_size: int, tight: int
) -> None:
    """Where small published engines crashed: a preempted sequence finds its own old blocks."""
    longest = 24
    num_blocks = -(-longest // block_size) + tight
    engine = engine_of(num_blocks, block_size, max_batch_tokens=16)
    for number in range(6):
        engine.add(
            request_of(str(number), prompt_of(8 + number % 3), max_tokens=14, n=1 + number % 2)
        )
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.blocks.hits > 0
    assert engine.scheduler.blocks.num_free == num_blocks


def test_preemption_with_prefix_caching_computes_only_what_was_evicted() -> None:
    engine = engine_of(num_blocks=7)
    engine.add(request_of("a", prompt_of(9), max_tokens=5))
    engine.add(request_of("b", prompt_of(9, first=1), max_tokens=9))
    engine.step()
    b = engine.order[1].sequences[0]
    engine.scheduler._preempt(b)
    batch = engine.step()
    assert shape(batch) == [("a", 9, 1), ("b", 8, 2)]  # two blocks were still there
    assert b.cached_tokens == 0, "its client asked for a prompt that nobody had sent before"
    engine.run()
    engine.check_outputs()


def test_preemption_with_prefix_caching_of_a_sequence_that_ends_on_a_block_boundary() -> None:
    """All its blocks are full and cached, and yet the last token must be computed."""
    engine = engine_of(num_blocks=8)
    engine.add(request_of("a", prompt_of(7), max_tokens=9))
    engine.step()
    engine.step()
    a = engine.order[0].sequences[0]
    a.token_ids.pop()  # 8 tokens, all of them in two published blocks
    engine.scheduler._preempt(a)
    assert engine.scheduler.blocks.num_cached == 2
    assert shape(engine.step()) == [("a", 4, 4)]
    engine.run()
    engine.check_outputs()


def test_preemption_of_a_sequence_whose_prompt_is_half_computed() -> None:
    engine = engine_of(num_blocks=8, max_batch_tokens=6)
    engine.add(request_of("a", prompt_of(3), max_tokens=20))
    engine.add(request_of("b", prompt_of(13, first=1), max_tokens=6))
    engine.step()
    engine.step()
    b = engine.order[1].sequences[0]
    assert 0 < b.computed < 13
    engine.scheduler._preempt(b)
    engine.run()
    engine.check_outputs()


def test_samples_share_the_prompt_and_part_when_they_write() -> None:
    engine = engine_of(max_sequences=4)
    engine.add(request_of("a", prompt_of(6), max_tokens=5, n=3))
    assert shape(engine.step()) == [("a", 0, 6)]
    family = engine.order[0].sequences
    assert [one.num_output for one in family] == [1, 1, 1]
    assert len({tuple(one.block_table) for one in family}) == 1
    batch = engine.step()
    assert shape(batch) == [("a", 6, 1)] * 3
    assert len(batch.copies) == 2  # the third writes into the block itself
    assert len({one.block_table[0] for one in family}) == 1
    assert len({one.block_table[1] for one in family}) == 3
    engine.run()
    engine.check_outputs()


def test_samples_have_their_places_reserved_from_the_start() -> None:
    engine = engine_of(max_sequences=4, max_batch_tokens=4)
    engine.add(request_of("a", prompt_of(6), n=3))
    engine.add(request_of("b", prompt_of(3), n=2))
    engine.add(request_of("c", prompt_of(1)))
    engine.step()
    engine.step()
    assert names(engine.scheduler.running) == ["a", "a", "a"]
    assert names(engine.scheduler.waiting) == ["b", "c"], "c does not overtake b"
    engine.run()
    engine.check_outputs()


def test_a_prompt_waits_a_step_for_what_another_one_computes() -> None:
    engine = engine_of()
    for name in "abc":
        engine.add(request_of(name, prompt_of(9)))
    assert shape(engine.step()) == [("a", 0, 9)]
    assert shape(engine.step()) == [("a", 9, 1), ("b", 8, 1), ("c", 8, 1)]
    assert [request.sequences[0].cached_tokens for request in engine.order] == [0, 8, 8]
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("step", range(8))
def test_a_request_is_cancelled_at_any_moment(moment: str, n: int, step: int) -> None:
    engine = engine_of(num_blocks=12, max_batch_tokens=6, max_sequences=5)
    engine.add(request_of("a", prompt_of(5), max_tokens=9))
    engine.add(request_of("b", prompt_of(10), max_tokens=9, n=n))
    engine.add(request_of("c", prompt_of(6), max_tokens=9))
    for _ in range(step):
        engine.step()

    b = engine.order[1]
    outputs = []

    def leave(now: str) -> None:
        if now == moment:
            assert engine.scheduler.cancel("b") and not engine.scheduler.cancel("b")
            outputs.extend(one.output_ids for one in b.sequences)

    engine.step(leave)
    assert [one.output_ids for one in b.sequences] == outputs
    assert b.finished and all(one.finish_reason == "cancelled" for one in b.sequences)
    assert all(one.block_table == [] for one in b.sequences)
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.blocks.num_free == 12


def test_an_unknown_request_cannot_be_cancelled() -> None:
    assert not engine_of().scheduler.cancel("nobody")


class Unscanned(list):
    """The tokens of a long sequence: they may be looked at one by one, and a block at a time."""

    def __iter__(self):
        raise AssertionError("a step walks over all tokens")

    def __getitem__(self, index):
        if isinstance(index, slice):
            assert len(range(*index.indices(len(self)))) <= 16, "a step copies all tokens"
        return super().__getitem__(index)


def test_a_step_does_not_walk_over_the_tokens_of_its_sequences() -> None:
    config = EngineConfig("no model", max_batch_tokens=64 * 500, max_sequences=64)
    scheduler = Scheduler(config, BlockManager(4096))
    for number in range(64):
        scheduler.add(request_of(str(number), [number] * 500, max_tokens=100))
    for step in range(40):
        batch = scheduler.schedule()
        assert len(batch.chunks) == 64
        scheduler.update(batch, [1] * len(scheduler.fork_samples(batch)))
        if step == 0:
            for sequence in scheduler.running:
                sequence.token_ids = Unscanned(sequence.token_ids)
