"""Training from files on disk is training from memory, bit for bit, and leaves nothing behind."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from distlab.errors import RunError, UsageError
from distlab.model import SIZES, Llama
from distlab.ranks import digest
from distlab.spawning import spawn
from fsdp import disk
from fsdp.disk import put_on_disk

WAYS = {
    "dropped": {},
    "kept": {"drop": False},
    "clipped and accumulated": {"clip": 0.1, "micro_batches": 2},
    "only the root wrapped": {"units": False},
    "after a step in memory": {"moved_after": 1},
}


def trained(job, folder, drop=True, clip=None, micro_batches=1, units=True, moved_after=0):
    """Losses, a digest of the shards, and what the files told; from memory with folder None."""
    torch.manual_seed(0)
    model = Llama(SIZES["smoke"])
    for unit in model.model.layers if units else ():
        fully_shard(unit)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    draw = torch.Generator().manual_seed(job.rank)
    losses, files = [], None
    for step in range(2):
        if folder and step == moved_after:
            files = put_on_disk(model, optimizer, folder, drop)
        for _ in range(micro_batches):
            tokens = torch.randint(512, (2, 17), generator=draw)
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
            loss.backward()
            losses.append(loss.item())
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)
        (files or optimizer).step()
        optimizer.zero_grad()
    weights = digest(p.to_local() for p in model.parameters())
    if not files:
        return losses, weights, {}
    told = {"parameters": sum(p.to_local().numel() for p in model.parameters())}
    files.drops or [file.drop(disk.PARTS) for file in files.files]
    return losses, weights, told | {"bytes": files.bytes}


def all_ways(job, folder):
    memory = {name: trained(job, None, **options)[:2] for name, options in WAYS.items()}
    return memory, {name: trained(job, folder, **options) for name, options in WAYS.items()}


def test_on_disk_equals_in_memory(tmp_path):
    for memory, on_disk in spawn(all_ways, 2, str(tmp_path)):
        assert {name: result[:2] for name, result in on_disk.items()} == memory
        for *_, told in on_disk.values():
            assert told["bytes"] == pytest.approx(16 * told["parameters"], rel=0.2)
    assert not list(tmp_path.iterdir()), "the files have no names"


def shards(optimizer=torch.optim.AdamW):
    model = torch.nn.Linear(64, 64)
    return model, optimizer(model.parameters())


def refused(folder, **options):
    model, optimizer = shards(**options)
    with pytest.raises((UsageError, RunError)) as error:
        put_on_disk(model, optimizer, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(disk, "gathered", lambda value: [value])


def test_what_was_dropped_is_not_in_memory(alone, tmp_path):
    model, optimizer = shards()
    with put_on_disk(model, optimizer, tmp_path) as files:
        assert files.cached() == 0
        model(torch.ones(1, 64)).sum().backward()
        assert files.cached() < files.bytes
        files.step()
        assert files.cached() == 0


def test_a_folder_without_room_is_refused_before(alone, tmp_path, monkeypatch):
    room = SimpleNamespace(f_bavail=3, f_frsize=4096)
    monkeypatch.setattr(disk.os, "statvfs", lambda path: room)
    assert f"--folder {tmp_path} has 12.3 KB free" in refused(tmp_path)


def test_a_disk_that_fills_meanwhile_is_told(alone, tmp_path, monkeypatch):
    def full(fd, begin, size):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(disk.os, "posix_fallocate", full)
    assert "No space left on device while its room was taken" in refused(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no file system in memory here")
def test_a_folder_in_memory_is_refused(alone):
    folder = f"/dev/shm/distlab-test-{os.getpid()}"
    try:
        assert "is in memory (tmpfs)" in refused(folder)
    finally:
        shutil.rmtree(folder)


def test_another_optimizer_is_refused(alone, tmp_path):
    assert "SGD cannot be kept on disk" in refused(tmp_path, optimizer=torch.optim.SGD)
