"""What tests of the chapter share: DeepSpeed's compiled operators."""

import os
from pathlib import Path

import pytest

from distlab.environments.recipes import FOLDER
from distlab.lab.blocks import environment_python


@pytest.fixture
def deepspeed_operators() -> Path:
    """The folder of the environment deepspeed that has them. Only CI builds it unasked."""
    if not (FOLDER / "deepspeed" / ".lab-stamp.json").is_file():
        if os.environ.get("CI") != "true":
            pytest.skip("no environment deepspeed; python3 scripts/lab.py env deepspeed builds it")
        environment_python("deepspeed")
    return FOLDER / "deepspeed" / "operators"
