"""vLLM, paged_engine and transformers give the same greedy tokens, and the parts that tune vLLM."""

import os
import subprocess

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from distlab.errors import RunError, UsageError
from distlab.files import repo_root
from distlab.model import SIZES, Llama, ModelConfig, save
from distlab.serving.frontier import frontier
from distlab.serving.node import split_flags
from inference import vllm_settings
from inference.engine_process import Load, Prompts, engine_process
from tune_vllm import Point

CODE = repo_root() / "chapter06-vllm" / "code"
VOCABULARY = 300
# Around vLLM's blocks of 32 and paged_engine's of 16; the last two are more than a step may hold.
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 150)
STEP_TOKENS = 64
NEW_TOKENS = 24


def test_three_engines_give_the_same_greedy_tokens(vllm_python, tmp_path):
    """Chunked prefill, prompts that begin alike, and more requests than a batch holds."""
    torch.manual_seed(3)
    shape = ModelConfig(VOCABULARY, 64, 96, 2, 4, 2, head_dim=32, max_position_embeddings=256)
    model = save(Llama(shape), tmp_path / "model")
    start = torch.randint(1, VOCABULARY, (max(LENGTHS),)).tolist()
    prompts = [[VOCABULARY - 1 - n % 7, *start[: n - 1]] for n in LENGTHS]
    prompts += [start[:n] for n in LENGTHS]
    small = {"max_model_len": 200}
    cpu = {
        "block_size": 32, "kv_cache_memory_bytes": 2**26, "gpu_memory_utilization": 0.1,
    }  # fmt: skip
    options = {
        "transformers": {},
        "paged_engine": {
            **small, "max_batch_tokens": STEP_TOKENS, "max_sequences": 4, "num_blocks": 64,
            "compile": False,
        },
        "vllm": {
            **small, **(cpu if not torch.cuda.is_available() else {}), "enforce_eager": True,
            "max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": 4, "skip_tokenizer_init": True,
        },
    }  # fmt: skip
    made = {}
    for name, chosen in options.items():
        with engine_process(name, model, "float32", chosen, vllm_python) as engine:
            concurrency = 1 if name == "transformers" else len(prompts)  # padded prompts round
            made[name] = engine.generate(prompts, NEW_TOKENS, concurrency)
    assert {len(tokens) for tokens in made["transformers"].tokens} == {NEW_TOKENS}
    assert len({tuple(tokens) for tokens in made["transformers"].tokens}) > len(LENGTHS) // 2
    assert made["paged_engine"].tokens == made["transformers"].tokens
    assert made["vllm"].tokens == made["transformers"].tokens
    assert made["paged_engine"].cached > 0 and made["vllm"].cached > 0


def test_an_engine_that_does_not_start_is_one_line(tmp_path):
    with (
        pytest.raises(RunError, match=r"^paged_engine (did not start|ended): .*Error") as failure,
        engine_process("paged_engine", tmp_path / "nothing", "float32"),
    ):
        pytest.fail("there is no model to start with")
    assert "\n" not in str(failure.value)


def test_a_head_that_vllm_cannot_attend_with_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_settings.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_settings, "has_cuda", lambda: False)
    model = save(Llama(SIZES["smoke"]), tmp_path / "model")
    with pytest.raises(UsageError, match="heads of 16 dimensions"):
        vllm_settings.refuse(model, 128)
    monkeypatch.setattr(vllm_settings, "has_cuda", lambda: True)
    vllm_settings.refuse(model, 128)
    with pytest.raises(UsageError, match="--max-model-len 4096 is more than the model's 2048"):
        vllm_settings.refuse(model, 4096)


@pytest.mark.parametrize(
    ("threads", "bound"),
    [("1", False), ("", True), ("64", True), ("1,4", False), ("0", True), ("many", True)],
)
def test_threads_are_bound_to_cores_unless_fewer_are_wanted(monkeypatch, threads, bound):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(vllm_settings.os, "sched_getaffinity", lambda pid: {2, 5, 3}, raising=False)
    monkeypatch.setattr(vllm_settings.host, "usable_cores", lambda: 3)
    assert vllm_settings.thread_binding() == ("2,3,5" if bound else "nobind")


def test_the_frontier_leaves_out_what_another_point_beats_in_both():
    def point(latency: float, rate: float) -> Point:
        return Point(f"{latency}/{rate}", 1, Load([[1]], [latency], [0.0], 1 / rate, 0))

    points = [point(3.0, 9.0), point(1.0, 2.0), point(2.0, 8.0), point(2.5, 5.0), point(1.0, 1.0)]
    assert [p.setting for p in frontier(points)] == ["1.0/2.0", "2.0/8.0", "3.0/9.0"]


def test_prompts_differ_by_key_and_are_the_same_in_every_run(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model = save(Llama(SIZES["smoke"]), tmp_path / "model", tokenizer)
    one, two = (Prompts(model, 512, seed=0) for _ in range(2))
    assert one.mixed(9, 40, "a") == two.mixed(9, 40, "a") != one.mixed(9, 40, "b")
    assert {len(prompt) for prompt in one.mixed(500, 40, "a")} == set(range(16, 65))
    shared = one.shared(5, 30, 4, "a")
    assert {tuple(prompt[:30]) for prompt in shared} == {tuple(shared[0][:30])}
    assert len({tuple(prompt) for prompt in shared}) == 5


def test_a_node_keeps_its_flags_and_hands_the_others_on():
    words = ["--model", "DIR", "--seed", "1", "--port=9", "--dtype=bfloat16"]
    ours, others = split_flags(words, {"--model", "--port"})
    assert ours == ["--model", "DIR", "--port=9"]
    assert others == ["--seed", "1", "--dtype=bfloat16"]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("vllm_server.sh", ["--model"], "--model needs a value"),
        ("vllm_server.sh", ["--config", "/nowhere.yaml"], "--config /nowhere.yaml is no file"),
        ("vllm_multi_node.sh", [], "NODE_RANK, NNODES and HEAD say which node this is"),
    ],
)
def test_a_shell_script_refuses_in_one_line(script, flags, message):
    env = {k: v for k, v in os.environ.items() if k not in ("NODE_RANK", "NNODES", "HEAD")}
    done = subprocess.run(
        ["bash", CODE / script, *flags], capture_output=True, text=True, timeout=60, env=env
    )
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["vllm_server.sh", "vllm_multi_node.sh"])
def test_a_shell_script_tells_how_it_is_used(script):
    done = subprocess.run(
        ["bash", CODE / script, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"bash chapter06-vllm/code/{script}" in done.stdout and "--model DIR" in done.stdout
