"""SGLang, vLLM, paged_engine and transformers give the same greedy answers, in float32."""

import json
import os
import subprocess

import httpx
import pytest

from distlab.files import repo_root
from distlab.serving.tiny_model import tiny_model, transformers_greedy
from paged_engine.llm import LLM
from paged_engine.sampling_params import SamplingParams

NEW_TOKENS = 24
TEXT = "import os\n\ndef main(arguments):\n    for name in arguments:\n        print(name)\n" * 4
PROMPTS = [TEXT[:n] for n in (3, 17, 60, 150, 300)] + [f"class A{n}:\n    def " for n in range(3)]
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
prompts, new = json.loads(sys.argv[2]), int(sys.argv[3])
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, block_size=32,
          gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**26, disable_log_stats=True)
made = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts],
                    SamplingParams(max_tokens=new, temperature=0.0), use_tqdm=False)
print("ANSWERS " + json.dumps([list(m.outputs[0].token_ids) for m in made]))
"""


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return transformers_greedy(tiny_model("smoke"), PROMPTS, NEW_TOKENS, "float32")


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("smoke"))
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def test_sglang(sglang_server, expected, ids):
    """All at once, so batched and with shared beginnings from the radix cache."""
    asked = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0},
    }
    answer = httpx.post(f"{sglang_server.url}/generate", json=asked, timeout=120, trust_env=False)
    assert [made["output_ids"] for made in answer.json()] == expected


def test_paged_engine(expected, ids):
    with LLM(str(tiny_model("smoke")), dtype="float32", num_blocks=128, compile=False) as llm:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
        made = llm.generate(ids, sampling)
    assert [answer.outputs[0].token_ids for answer in made] == expected


def test_vllm(vllm_python, expected, ids):
    env = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    command = [str(vllm_python), "-c", VLLM, str(tiny_model("smoke")), json.dumps(ids)]
    done = subprocess.run(
        [*command, str(NEW_TOKENS)], capture_output=True, text=True, timeout=300, env=env,
        cwd=repo_root(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    assert json.loads(line.removeprefix("ANSWERS ")) == expected
