"""Requests made from the server's own description: none breaks it, each answer is as described."""

import os
import subprocess
import sys

import httpx
import pytest

from fake_engine import fake_engine
from paged_engine.limits import Limits
from server_helper import is_empty, on_a_port, wait_until

LIMIT_S = 200
# A body may fit the schema and still be wrong: a schema cannot say how many tokens a prompt has,
# nor that the options of a stream need a stream.
NOT_FOR_US = "positive_data_acceptance"


@pytest.mark.slow
def test_no_request_breaks_the_server_and_every_answer_is_as_described(tmp_path):
    limits = Limits(body_bytes=2**25)  # schemathesis makes lists just longer than they may be
    with on_a_port(fake_engine(max_model_len=64), limits=limits) as served:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json",
            "--phases", "coverage,fuzzing", "--max-examples", "8", "--no-shrink", "--no-color",
            "--exclude-checks", NOT_FOR_US, "--generation-deterministic", "--warnings", "off",
            "--output-truncate", "true",
        ]  # fmt: skip
        # A slow machine may take its time to make the data.
        command += ["--suppress-health-check", "all", "--request-timeout", "60"]
        environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert "Tested: 7" in done.stdout
        wait_until(lambda: is_empty(served.engine))
        assert served.behind.reserved == 0
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "seed": 1})
        assert answer.status_code == 200
    served.engine.blocks.check()
