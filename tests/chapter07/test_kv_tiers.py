"""Blocks in lower tiers: what is kept, what comes back, when it is worth it; and damaged files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kv_tiers
from distlab import script
from distlab.errors import UsageError
from paged_engine.config import EngineConfig
from paged_engine.engine import Engine
from paged_engine.runner import ModelRunner
from paged_engine.sampling_params import SamplingParams
from radix.tiers import Costs, DiskTier, HostTier, TieredBlocks
from tiny_models import save_random_model


def block(number):
    return torch.full((2, 3), float(number))


def name(number):
    return bytes([number])


def test_the_host_gives_up_what_was_longest_unused():
    host = HostTier(2)
    assert host.put(name(1), block(1)) is None and host.put(name(2), block(2)) is None
    host.get(name(1))
    digest, contents = host.put(name(3), block(3))
    assert digest == name(2) and contents[0, 0] == 2
    assert name(1) in host and name(2) not in host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_disk_gives_back_what_it_was_given(tmp_path, dtype):
    disk = DiskTier(tmp_path, 2)
    for number in (1, 2, 3):
        disk.put(name(number), block(number).to(dtype))
    assert name(1) not in disk and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(disk.get(name(3)), block(3).to(dtype))


@pytest.mark.parametrize("harm", ["truncated", "a bit", "empty", "gone"])
def test_a_damaged_file_is_noticed_and_forgotten(tmp_path, harm):
    disk = DiskTier(tmp_path, 4)
    disk.put(name(1), block(1))
    path = disk.path(name(1))
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        torn = {"truncated": content[:-1], "a bit": content[:-1] + b"\x01", "empty": b""}
        path.write_bytes(torn[harm])
    assert disk.get(name(1)) is None
    assert disk.damaged == 1 and name(1) not in disk and not path.exists()


def test_a_disk_that_takes_nothing_or_gives_nothing_ends_no_engine(tmp_path):
    (tmp_path / "no folder").touch()
    disk = DiskTier(tmp_path / "no folder", 4)
    assert disk.put(name(1), block(1)) is None
    assert disk.refused == 1 and name(1) not in disk
    disk = DiskTier(tmp_path, 4)
    disk.put(name(1), block(1))
    disk.path(name(1)).unlink()
    disk.path(name(1)).mkdir()  # reading it fails otherwise than by its absence
    assert disk.get(name(1)) is None and disk.damaged == 1


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    found=st.lists(st.sampled_from(["host", "disk"]), max_size=8),
    host=st.floats(0, 10),
    disk=st.floats(0, 10),
)
def test_what_is_fetched_saves_most(found, host, disk):
    costs = Costs(token_s=1.0, block_s={"host": host, "disk": disk})
    saved = [sum(4 - costs.block_s[tier] for tier in found[:n]) for n in range(len(found) + 1)]
    assert saved[costs.worth_fetching(found, 4)] == pytest.approx(max(saved))


def answers_of(runner, config, prompts, tiers, n=1):
    """Greedy answers of all prompts, twice; everything's books are checked after each step."""
    blocks = TieredBlocks(runner, tiers)
    engine = Engine(config, runner, blocks=blocks)
    made = []
    for prompt in prompts * 2:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, n=n)
        engine.add_request(prompt, params)
        while engine.has_work:
            made += [(one.index, one.token_ids[0]) for one in engine.step()]
            engine.scheduler.check()
    return made, blocks.fetched


@pytest.mark.parametrize("n", [1, 3])
def test_answers_are_the_same_with_tiers(tmp_path, n):
    config = EngineConfig(save_random_model(tmp_path / "model"), block_size=4, num_blocks=16)
    runner = ModelRunner(config)
    prompts = [[(7 * i + k) % 97 for i in range(33)] for k in (1, 2, 3)]
    (tmp_path / "disk").mkdir()
    without, _ = answers_of(runner, config, prompts, [], n)
    tiers = [HostTier(6), DiskTier(tmp_path / "disk", 100)]
    with_tiers, fetched = answers_of(runner, config, prompts, tiers, n)
    assert with_tiers == without and sum(fetched.values()) > 0


def test_a_limited_disk_is_as_slow_as_it_says(tmp_path):
    disk = DiskTier(tmp_path, 1, bytes_per_s=1000)
    disk.put(name(1), block(1))
    from time import perf_counter

    started = perf_counter()
    disk.get(name(1))
    assert perf_counter() - started >= 0.02


def test_a_smoke_run():
    assert kv_tiers.main(["--preset", "smoke"]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--conversations", "1"], "--conversations 1 is never evicted"),
        (["--prompt-tokens", "20"], "--prompt-tokens 20 fill few blocks"),
        (["--repeats", "2"], "--repeats 2 gives no median"),
    ],
)
def test_wrong_flags(flags, words):
    with pytest.raises(UsageError, match=words):
        kv_tiers.parse_args(["--preset", "smoke", *flags])
    assert script.status_of(lambda: kv_tiers.main(["--preset", "smoke", *flags])) == 2
