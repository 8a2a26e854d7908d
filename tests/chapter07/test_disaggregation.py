"""Engines that hand each other blocks: the same tokens, no request lost, wrong partners refused."""

from dataclasses import replace
from multiprocessing import Pipe

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import disaggregation
from distlab import script
from distlab.cluster import unavailable
from distlab.errors import RunError, UsageError
from paged_engine.config import EngineConfig
from paged_engine.engine import Engine
from paged_engine.llm import LLM
from paged_engine.runner import ModelRunner
from paged_engine.sampling_params import SamplingParams
from radix.disaggregated import Job, Router
from radix.fleet import local_fleet
from radix.kv_transfer import ExportingRunner, Layout, delivered
from tiny_models import save_random_model

LAYOUT = Layout(layers=2, kv_heads=2, block_size=16, head_dim=32, dtype="float32")
COUNT = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = save_random_model(tmp_path_factory.mktemp("model") / "model")
    return EngineConfig(folder, block_size=8, num_blocks=64, max_batch_tokens=24)


def greedy(count=COUNT):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def prompt_of(length, shift=0):
    return [(5 * i + shift) % 97 for i in range(length)]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 25, 61, 100])
def test_blocks_that_were_handed_over_go_on_as_if_computed_here(config, length):
    prompt, pieces = prompt_of(length), []
    giver = ExportingRunner(config, lambda name, first, blocks: pieces.append((first, blocks)))
    giver.export("a", 0)
    with Engine(config, giver) as engine:
        engine.add_request(prompt, greedy(1), "a")
        while not (made := engine.step()):
            pass
    [first_token] = made[0].token_ids
    with LLM(engine=Engine(config, ModelRunner(config))) as llm:
        wanted = llm.generate([prompt], greedy())[0].outputs[0].token_ids
        engine = llm.engine
        engine.blocks.prefix_caching = False
        sequence = engine.reserve(prompt, greedy(), "a")
        for first, blocks in pieces:
            table = sequence.block_table[first : first + len(blocks)]
            engine.runner.cache.write(table, blocks)
        engine.scheduler.check()
        tokens = list(engine.adopt("a", first_token).token_ids)
        while engine.has_work:
            tokens += [token for one in engine.step() for token in one.token_ids]
            engine.scheduler.check()
    assert tokens == wanted
    assert sum(len(blocks) for _, blocks in pieces) == -(-length // 8)
    assert len(pieces) > 1 or length <= 24


def test_what_is_reserved_is_given_up_by_cancel_and_refused_without_room(config):
    with Engine(config, ModelRunner(replace(config, num_blocks=8))) as engine:
        assert engine.reserve(prompt_of(40), greedy(), "a") is not None
        assert engine.reserve(prompt_of(40), greedy(), "b") is None
        engine.scheduler.check()
        assert engine.cancel("a") and engine.blocks.num_free == 8
        with pytest.raises(UsageError, match="n 2 samples cannot be moved"):
            engine.reserve(prompt_of(8), replace(greedy(), n=2), "c")


@pytest.mark.parametrize(
    ("field", "value"), [("block_size", 32), ("dtype", "bfloat16"), ("kv_heads", 1)]
)
def test_another_layout_is_refused_by_name(field, value):
    LAYOUT.refuse_other(replace(LAYOUT))
    with pytest.raises(UsageError, match=f"KV transfer is refused.*{field}"):
        LAYOUT.refuse_other(replace(LAYOUT, **{field: value}))


def test_a_layout_knows_its_bytes(config):
    layout = Layout.of(ModelRunner(config).cache)
    contents = torch.empty(layout.shape(3), dtype=torch.float32)
    assert contents.nbytes == 3 * layout.block_bytes


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100)), min_size=1).map(sorted),
    st.floats(1, 1e6),
)
def test_pieces_arrive_in_order_and_no_faster_than_the_link(pieces, rate):
    times = delivered(pieces, rate)
    assert times == sorted(times)
    for (ready, size), at in zip(pieces, times, strict=True):
        assert at >= ready + size / rate - 1e-9
    assert times[-1] >= pieces[0][0] + sum(size for _, size in pieces) / rate - 1e-6


def test_break_even_is_where_the_pieces_are_as_late_as_it_saves():
    pieces = [[[0.0, 500.0, 0.0], [1.0, 1000.0, 1.0]]]
    rate = disaggregation.break_even(pieces, saved_s=0.5, least=1.0)
    assert rate == pytest.approx(2000, rel=0.02)
    assert disaggregation.late(pieces, rate) == pytest.approx(0.5, rel=0.03)


def test_jobs_are_done_again_until_no_worker_is_left(config):
    """Three workers: one that prefills and one that decodes are killed, then the last one."""
    jobs = [Job(prompt_of(20 + 7 * i, i), COUNT) for i in range(6)]
    with LLM(engine=Engine(config)) as llm:
        made = llm.generate([job.prompt for job in jobs], greedy())
    wanted = [one.outputs[0].token_ids for one in made]
    with local_fleet([config] * 3, 60) as fleet:
        for victim in (0, 1):
            again = [Job(job.prompt, COUNT) for job in jobs]
            killed = []

            def after(job, victim=victim, killed=killed):
                """In the midst of what it has: with a prompt to compute, or tokens to make."""
                if job.by[victim] == victim and len(job.tokens) == 1 + victim and not killed:
                    killed.append(victim)
                    fleet.kill(victim)

            fleet.router.serve(again, [0], [1, 2], after)
            assert [job.tokens for job in again] == wanted
        assert sorted(fleet.router.dead) == [0, 1]
        with pytest.raises(RunError, match="no worker is left"):
            fleet.router.serve(jobs, [0], [1, 2], lambda job: fleet.kill(2))


class FakeListener:
    """Gives out connections that are there already."""

    address = ("127.0.0.1", 1)

    def __init__(self, *connections):
        self._connections = list(connections)
        self._listener = self
        self._socket = self

    def settimeout(self, seconds):
        pass

    def accept(self):
        if not self._connections:
            raise TimeoutError
        return self._connections.pop()


class FakeStore(dict):
    def set(self, key, value):
        self[key] = value


def test_who_does_not_come_is_told():
    with pytest.raises(RunError, match="0 of 2 workers came within 1 s"):
        Router(FakeListener(), FakeStore(), 2, limit_s=1, silent_s=1)
    here, there = Pipe()
    there.close()
    with pytest.raises(RunError, match="a worker ended before it was ready"):
        Router(FakeListener(here), FakeStore(), 1, limit_s=1, silent_s=1)


def test_a_smoke_run_and_other_blocks_are_refused(capsys):
    assert disaggregation.main(["--preset", "smoke"]) == 0
    flags = ["--preset", "smoke", "--decode-block-size", "32"]
    assert script.status_of(lambda: disaggregation.main(flags)) == 2
    said = capsys.readouterr().err
    assert "block_size is 16, the decode engine's 32; give both the same --block-size" in said


@pytest.mark.skipif(unavailable() is not None, reason=f"no virtual cluster: {unavailable()}")
def test_the_ranks_of_a_job_are_a_fleet():
    args = disaggregation.parse_args(["--preset", "smoke"])
    sweep = disaggregation.Sweep(
        disaggregation.Path(disaggregation.__file__), args, disaggregation.FOR_THE_NODES
    )
    record = sweep.on_nodes(3, "100mbit")
    assert sweep.sound == [True] and set(record["tpot"]) == set(disaggregation.WAYS)
    blocks = sum(size for turn in record["pieces"] for _, size, _ in turn)
    assert blocks > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output-tokens", "1"], "--output-tokens 1 has no TPOT"),
        (["--prompt-tokens", "5000"], "more than the model's 2048"),
        (["--link-rate", "fast"], "--link-rate fast"),
    ],
)
def test_wrong_flags(capsys, flags, words):
    assert (
        script.status_of(lambda: disaggregation.main(["--preset", "smoke", *flags])) == 2
        and words in capsys.readouterr().err
    )
