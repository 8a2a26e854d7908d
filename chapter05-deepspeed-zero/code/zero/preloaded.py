"""Imported once by the process from which `zero.rehearsal` forks ranks: what DeepSpeed's first
engine imports and tries in each process anew, which takes seconds."""

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401

from zero import engine

engine.load()
