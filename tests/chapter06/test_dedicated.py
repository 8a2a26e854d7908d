"""In a process for one engine, what is loaded is spared from garbage collection."""

import gc

from distlab.spawning import fork_context
from paged_engine.config import dedicate_process


def test_what_is_loaded_is_spared():
    with fork_context().Pool(1) as pool:
        assert pool.apply(dedicated) > 100_000  # torch's objects are among them


def dedicated() -> int:
    dedicate_process()
    return gc.get_freeze_count()
