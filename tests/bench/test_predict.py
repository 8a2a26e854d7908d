"""The formulas of distlab.predict against cases worked out by hand, and against torch itself."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distlab import predict
from distlab.catalog import GPUS, MODELS, find_gpu
from distlab.errors import UsageError
from distlab.predict import Architecture, Experts, TrainingPlan

# vocabulary 10, hidden 8, MLP 12, 2 layers, 4 heads of 2, 2 key-value heads
SMALL = Architecture(10, 8, 12, 2, 4, 2, 2, 64)
LLAMA_8B = MODELS["llama-3-8b"].architecture

HF_CONFIGS = {
    "gpt2": {"model_type": "gpt2"},
    "smollm2-135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "llama-2-13b": dict(
        model_type="llama", vocab_size=32000, hidden_size=5120, intermediate_size=13824,
        num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40,
        max_position_embeddings=4096,
    ),
    "llama-3-8b": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "llama-3-70b": dict(
        model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "llama-3-405b": dict(
        model_type="llama", vocab_size=128256, hidden_size=16384, intermediate_size=53248,
        num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "qwen3-0.6b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=True,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=False,
    ),
    "qwen3-32b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=5120, intermediate_size=25600,
        num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=False,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144,
        num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=False, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768,
    ),
    "qwen3-235b-a22b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
        num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=False, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=1536,
    ),
    "mixtral-8x7b": dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=32768, num_local_experts=8, num_experts_per_tok=2,
    ),
    "deepseek-v3": dict(
        model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432,
        moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
        num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8,
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, first_k_dense_replace=3, max_position_embeddings=163840,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_catalog_is_the_published_config(name: str) -> None:
    assert predict.architecture_from_config(HF_CONFIGS[name]) == MODELS[name].architecture


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_those_of_transformers(name: str) -> None:
    """Exactly: two depths are instantiated on the meta device, and the rest are equal layers."""
    architecture = MODELS[name].architecture
    first = architecture.experts.first_dense_layers if architecture.experts else 0
    shallow = instantiated_parameters(HF_CONFIGS[name], first + 1)
    deeper = instantiated_parameters(HF_CONFIGS[name], first + 2)
    remaining = architecture.num_hidden_layers - (first + 1)
    assert predict.total_parameters(architecture) == shallow + remaining * (deeper - shallow)


def instantiated_parameters(config: dict, layers: int) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    depth = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
    settings = {**config, depth: layers}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral", "sliding_window": None},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_other_model_types_equal_transformers(changes: dict) -> None:
    config = {**HF_CONFIGS["llama-3-8b"], "hidden_size": 64, "vocab_size": 96, **changes}
    architecture = predict.architecture_from_config({**config, "num_hidden_layers": 2})
    assert predict.total_parameters(architecture) == instantiated_parameters(config, 2)


def test_published_parameter_counts() -> None:
    """To all digits where the model card gives them, else as the papers say."""
    published = {
        "gpt2": 124_439_808,
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
        "llama-3-405b": 405_853_388_800,
        "mixtral-8x7b": 46_702_792_704,
    }
    for name, count in published.items():
        assert predict.total_parameters(MODELS[name].architecture) == count
    deepseek = MODELS["deepseek-v3"].architecture
    assert round(predict.total_parameters(deepseek) / 1e9) == 671
    assert round(predict.active_parameters(deepseek) / 1e9) in (37, 38)  # the paper rounds down
    mixtral = MODELS["mixtral-8x7b"].architecture
    assert round(predict.active_parameters(mixtral) / 1e9) == 13


def test_parameters_by_hand() -> None:
    # attention: Q 8·8, K and V 8·4 each, O 8·8 = 64 + 64 + 64 = 192; SwiGLU 3·8·12 = 288; norms 16
    assert predict.layer_parameters(SMALL, 0).total == 192 + 288 + 16
    # two tables of 10·8, two layers of 496, a final norm of 8
    assert predict.total_parameters(SMALL) == 2 * 80 + 2 * 496 + 8
    # matrices only: 2·(192 + 288) and the output projection's 80
    assert predict.matmul_parameters(SMALL) == 960 + 80
    # with 4 experts of 12 and a router of 8·4: 4·288 + 32; active, 2 of them: 2·288 + 32
    sparse = replace(SMALL, experts=Experts(4, 2, 12))
    assert predict.layer_parameters(sparse, 0).total == 192 + 4 * 288 + 32 + 16
    assert predict.layer_parameters(sparse, 0, active=True).total == 192 + 2 * 288 + 32 + 16


def test_parallel_ranks_hold_everything_once() -> None:
    # tp 2: matrices halve (192 + 288) / 2, norms 16 stay; each half of both tables is 40; norm 8
    assert predict.rank_parameters(SMALL, tp=2) == 2 * (240 + 16) + 2 * 40 + 8
    # pp 2: the first stage has a layer and the embedding, the last a layer, the norm and the head
    assert predict.rank_parameters(SMALL, pp=2, stage=0) == 496 + 80
    assert predict.rank_parameters(SMALL, pp=2, stage=1) == 496 + 8 + 80
    tied = replace(SMALL, tie_word_embeddings=True)  # the table is then needed on both stages
    assert predict.rank_parameters(tied, pp=2, stage=1) == 496 + 8 + 80
    # 10 rows over 4 ranks are padded to 12: 3·8 rows each
    assert predict.rank_parameters(SMALL, tp=4) == 2 * (480 / 4 + 16) + 2 * 24 + 8


@given(layers=st.integers(1, 200), stages=st.integers(1, 50))
def test_stages_share_the_layers(layers: int, stages: int) -> None:
    shares = [predict.stage_layers(layers, stages, stage) for stage in range(stages)]
    assert [layer for share in shares for layer in share] == list(range(layers))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_flops_by_hand() -> None:
    # 2·1040 for the matrices; attention 4·L·H·Q·T = 4·2·8·16 = 1024
    assert predict.forward_flops_per_token(SMALL, 16) == 2080 + 1024
    # 6·1040 + 12·2·8·16
    assert predict.training_flops_per_token(SMALL, 16) == 6240 + 3072
    # with checkpointing the layers' forward again: 3104 less the output projection's 2·80
    assert predict.training_flops_per_token(SMALL, 16, recompute="full") == 9312 + 2944
    # PaLM's rule of thumb: 6N within 1 % of itself plus attention for an 8B model at 1k context
    assert predict.training_flops_per_token(LLAMA_8B, 1024) == pytest.approx(6 * 7.50e9, rel=0.05)


def test_model_state_by_hand() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 GPUs, K = 12, in GB."""
    for zero, gigabytes in [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)]:
        state = predict.model_state(7.5e9, "mixed", "adamw", zero, data_parallel=64)
        assert state.total / 1e9 == pytest.approx(gigabytes, abs=0.05)  # the paper's rounding
    assert predict.model_state(1, "fp32", "adamw").total == 4 + 4 + 8
    assert predict.model_state(1, "bf16", "sgd").total == 2 + 2
    assert predict.model_state(1, "fp32", "sgd-momentum").total == 4 + 4 + 4
    # two moments of one byte and a float32 scale per 256 of them: 2·(1 + 4/256)
    assert predict.optimizer_bytes_per_parameter("adamw-8bit", "bf16") == 2 * (1 + 1 / 64)


def test_kv_cache_by_hand() -> None:
    # Llama 3 8B: 2 (K and V) · 32 layers · 8 heads · 128 · 2 bytes
    assert predict.kv_bytes_per_token(LLAMA_8B) == 131072
    assert predict.kv_bytes_per_token(LLAMA_8B, "fp8", tp=8) == 131072 / 2 / 8
    # DeepSeek-V3: 61 layers · (512 + 64) · 2 bytes, whole on every tensor-parallel rank
    deepseek = MODELS["deepseek-v3"].architecture
    assert predict.kv_bytes_per_token(deepseek, tp=8) == 61 * 576 * 2


def test_korthikanti_by_hand() -> None:
    # s·b·h = 4·1·8 = 32; 34 + 5·a·s/h = 34 + 5·2·4/8 = 39
    assert predict.gpt_block_activations(8, 2, 4, 1) == 32 * 39
    # t = 2: 10 + 24/2 + 5/2
    assert predict.gpt_block_activations(8, 2, 4, 1, tp=2) == 32 * 24.5
    sharded = predict.gpt_block_activations(8, 2, 4, 1, 2, True, recompute="selective")
    assert sharded == 32 * 34 / 2
    assert predict.gpt_block_activations(8, 2, 4, 1, recompute="full") == 64


def test_gpt2_block_agrees_with_korthikanti() -> None:
    """Ours has no dropout masks (2 of the 34·h bytes) and keeps 8 bytes a norm and 4 a head."""
    gpt2 = MODELS["gpt2"].architecture
    theirs = predict.gpt_block_activations(768, 12, 1, 1, recompute="selective") - 2 * 768
    ours = predict.layer_activations(gpt2, 0, "mixed").total
    assert ours == theirs + 2 * 8 + 12 * 4


def test_llama_activations_by_hand() -> None:
    # float32, per token: norms 2·(12·8 + 4) = 200; q, output 2·8·4, k, v 2·4·4; 4 heads · 4 = 112;
    # SwiGLU 4·12·4 = 192
    layer = predict.layer_activations(SMALL, 0, "fp32")
    assert layer.total == 200 + 112 + 192
    assert layer.per_rank(2) == 200 + (112 + 192) / 2
    # two layers, the final norm 100 and the log-probabilities 4·10, for 2·16 tokens;
    # cosine and sine tables 2·16·2·4
    saved = predict.saved_activations(SMALL, "fp32", seq_len=16, batch=2)
    assert saved == 32 * (2 * 504 + 100 + 40) + 256
    # with checkpointing each layer keeps its input, 8·4
    saved = predict.saved_activations(SMALL, "fp32", 16, 2, recompute="full")
    assert saved == 32 * (2 * 32 + 100 + 40) + 256
    # its peak: inputs, and a layer again (504) with two MLP gradients and the residual's, 2·48 + 32
    peak = predict.peak_activations(SMALL, "fp32", 16, 2, recompute="full")
    assert peak == 32 * (2 * 32 + 504 + 128) + 256


def test_pipeline_stages_hold_fewer_micro_batches_later() -> None:
    first, last = (
        predict.peak_activations(SMALL, "fp32", 16, 1, pp=2, stage=stage, micro_batches=8)
        for stage in (0, 1)
    )
    # stage 0 has two micro-batches in flight of its one layer, 504 and its output, 8·4, each; stage
    # 1 has one and the loss
    assert first == 16 * (2 * (504 + 32) + 2 * 48 + 32) + 256
    assert last == 16 * (504 + 12 * 10 + 100) + 256


def test_collectives_by_hand() -> None:
    n, k, alpha, beta, gamma = 1024.0, 4, 1.0, 0.5, 0.25
    cost = (n, k, alpha, beta)
    assert predict.point_to_point(n, alpha, beta) == 1 + 512
    assert predict.tree_broadcast(*cost) == 2 * 513
    assert predict.scatter_allgather_broadcast(*cost) == (2 + 3) + 2 * 0.75 * 512
    assert predict.ring_all_gather(*cost) == 3 + 0.75 * 512
    assert predict.recursive_doubling_all_gather(*cost) == 2 + 0.75 * 512
    assert predict.ring_reduce_scatter(*cost, gamma) == 3 + 0.75 * (512 + 256)
    assert predict.ring_all_reduce(*cost, gamma) == 6 + 2 * 0.75 * 512 + 0.75 * 256
    assert predict.tree_all_reduce(*cost, gamma) == 4 * 513 + 2 * 256
    assert predict.recursive_doubling_all_reduce(*cost, gamma) == 2 * (1 + 512 + 256)
    assert predict.rabenseifner_all_reduce(*cost, gamma) == 4 + 2 * 0.75 * 512 + 0.75 * 256
    assert predict.pairwise_all_to_all(*cost) == 3 + 0.75 * 512
    assert predict.chain_broadcast(*cost) == 3 + 512
    # 2·3/4 of 1024 bytes in a second
    assert predict.bus_bandwidth("all_reduce", n, 1.0, k) == 1536
    assert predict.data_parallel_bytes(n, k) == 1536
    assert predict.data_parallel_bytes(n, k, zero=3) == 2304


def test_tcp_headers_take_their_part_of_a_link() -> None:
    assert predict.tcp_goodput(8e9) == pytest.approx(1e9 * 1448 / 1514)
    assert predict.tcp_goodput(8e9, mtu=9000) == pytest.approx(1e9 * 8948 / 9014)
    alpha, beta = predict.tcp_link(100e6, 2e-3)
    assert (alpha, 1 / beta) == (2e-3, pytest.approx(11_955_086, abs=1))


@given(n=st.floats(1, 1e12), alpha=st.floats(0, 1), beta=st.floats(0, 1e-6))
def test_one_worker_sends_nothing(n: float, alpha: float, beta: float) -> None:
    for collective in (
        predict.ring_all_reduce, predict.tree_all_reduce, predict.tree_broadcast,
        predict.chain_broadcast,
    ):  # fmt: skip
        assert collective(n, 1, alpha, beta) == 0


def test_time_and_cost_by_hand() -> None:
    assert predict.pipeline_bubble(4, 12) == 3 / 15
    assert predict.pipeline_bubble(4, 12, chunks=3) == 3 / 39
    assert predict.pipeline_bubble(1, 1) == 0
    # 1e15 FLOP on 2 GPUs of 1e15 at 50 %: 1 s; a quarter of the time is bubble: 4/3 s
    assert predict.step_seconds(1e15, 2, 1e15, 0.5) == 1
    assert predict.step_seconds(1e15, 2, 1e15, 0.5, bubble=0.25) == pytest.approx(4 / 3)
    assert predict.mfu(1000, 6e9, 12e12) == 0.5
    assert predict.roofline_seconds(10, 100, 10, 50) == 2
    assert predict.roofline_seconds(30, 100, 10, 50) == 3
    # 16 GB of weights and 4 GB of cache at 2 TB/s: 10 ms a step, 8 tokens each
    assert predict.decode_tokens_per_second(8, 16e9, 4e9, 2e12) == pytest.approx(800)
    assert predict.cost_usd(7200, 8, 2.5) == 40


def test_experts_touched() -> None:
    mixtral = MODELS["mixtral-8x7b"].architecture
    assert predict.experts_touched(mixtral, 1) == 2
    assert predict.experts_touched(mixtral, 2) == 8 * (1 - 0.75**2)
    assert predict.experts_touched(LLAMA_8B, 5) == 0


def test_decode_is_bound_by_the_bytes_it_reads() -> None:
    plan = predict.ServingPlan(batch=1, context=0)
    flops, moved, seconds = predict.decode_step(LLAMA_8B, plan, 989.4e12, 3350e9)
    # all parameters but the embedding table of 128256·4096, in two bytes
    assert moved == 2 * (8_030_261_248 - 128256 * 4096)
    assert flops == 2 * predict.matmul_parameters(LLAMA_8B)
    assert seconds == moved / 3350e9


def test_key_value_heads_fewer_than_ranks_are_copied() -> None:
    """As vLLM serves Qwen3-235B-A22B, 4 key-value heads, on 8 GPUs with TP 8."""
    qwen = MODELS["qwen3-235b-a22b"].architecture
    four, eight = (
        predict.serving_memory(qwen, predict.ServingPlan(gpus=8, tp=tp, reserve=0)) for tp in (4, 8)
    )
    assert eight.kv_cache == four.kv_cache  # one head on each of 4 ranks, and on each of 8
    # of 94 layers: a key and a value matrix of 128 columns on every rank, the other weights halved
    copied = 94 * 2 * 128 * 4096 * 2
    norms = (94 * (2 * 4096 + 2 * 128) + 4096 + 94 * 128 * 4096) * 2  # and routers, on every rank
    assert eight.weights - copied - norms == (four.weights - copied - norms) / 2
    latent = MODELS["deepseek-v3"].architecture
    predict.check_serving_plan(latent, predict.ServingPlan(gpus=16, tp=16))
    with pytest.raises(UsageError, match="--tp 6 does not divide 64 heads"):
        predict.check_serving_plan(qwen, predict.ServingPlan(gpus=6, tp=6))


def test_training_memory_adds_up() -> None:
    plan = TrainingPlan(gpus=16, tp=2, pp=2, zero=3, precision="fp32", seq_len=16, accumulation=4)
    memory = predict.training_memory(SMALL, plan)
    assert memory.stage == 0  # two micro-batches in flight weigh more here than the loss
    # stage 0: a layer's (480/2 + 16) and half the table, 40 parameters, over 4 data-parallel ranks
    assert memory.weights == memory.gradients == 4 * (256 + 40) / 4
    assert memory.optimizer == 8 * 296 / 4
    # gathered, in float32: a block of 256 and the embedding's 40; a block's gradient, and its copy
    assert memory.workspace == (256 + 40 + 256 + 256) * 4
    assert memory.total == 3 * 296 + 296 + memory.activations
    assert memory.needed == memory.total + memory.workspace


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ((3, 3, 1), "--tp 3 does not divide 4 heads; use 1 or 2"),
        ((4, 4, 1), "--tp 4 does not divide 2 key-value heads; use 1 or 2"),
        ((3, 1, 3), "--pp 3 is more than the model's 2 layers; use 2 or fewer"),
        ((6, 2, 2), "--gpus 6 is no multiple of --tp 2 x --pp 2 = 4; use --gpus 8 or smaller"),
    ],
)
def test_impossible_degrees_are_refused(degrees: tuple[int, int, int], message: str) -> None:
    gpus, tp, pp = degrees
    with pytest.raises(UsageError, match=message.replace("--", "-{2}")):
        predict.training_memory(SMALL, TrainingPlan(gpus=gpus, tp=tp, pp=pp))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba"}, "model type 'mamba' is not known; known are deepseek_v3, gpt2"),
        ({}, "model type None is not known"),
        ({"model_type": "llama", "hidden_size": "big"}, "hidden_size is 'big'"),
        ({"model_type": "llama"}, "hidden_size is None"),
    ],
)
def test_a_config_that_is_none_is_refused(config: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        predict.architecture_from_config(config)


def test_gpus_are_dense_and_found_by_their_driver_name() -> None:
    assert find_gpu("NVIDIA H200") is GPUS["h200"]
    assert find_gpu("NVIDIA H100 PCIe") is None  # the same chip with lower peaks
    for gpu in GPUS.values():
        assert gpu.source
        assert gpu.peak_flops["bf16"] <= 2250e12  # a dense peak; sparse ones are twice that
    assert predict.peak_for(GPUS["a100-80gb"].peak_flops, "fp8") == 312e12
    assert predict.peak_for(GPUS["h100"].peak_flops, "int4") == 989.4e12


def test_the_catalog_is_plain_data() -> None:
    sources = {name: spec.source for name, spec in MODELS.items()}
    assert json.loads(json.dumps(sources)) == sources and all(sources.values())


def test_expert_and_context_parallelism_divide_what_they_should() -> None:
    mixtral = MODELS["mixtral-8x7b"].architecture
    experts = 32 * 8 * 3 * 4096 * 14336  # layers, experts, matrices
    assert predict.expert_parameters(mixtral) == experts
    assert predict.expert_parameters(LLAMA_8B) == 0
    plan = TrainingPlan(gpus=8, seq_len=8192)
    whole, parted = (predict.training_memory(mixtral, replace(plan, ep=ep)) for ep in (1, 8))
    assert whole.weights - parted.weights == 2 * experts * 7 / 8
    # ZeRO-3 leaves 1/8 of all state on each GPU, with experts divided or not
    whole, parted = (
        predict.training_memory(mixtral, replace(plan, ep=ep, zero=3)) for ep in (1, 8)
    )
    assert parted.weights == pytest.approx(whole.weights)
    assert parted.workspace < whole.workspace / 4

    one, two = (predict.training_memory(LLAMA_8B, replace(plan, cp=cp, zero=1)) for cp in (1, 2))
    assert one.optimizer == two.optimizer  # context-parallel ranks are shards too
    assert two.activations == pytest.approx(one.activations / 2, rel=0.02)
    assert replace(plan, cp=2).data_parallel == 4


def test_sequence_parallelism_leaves_nothing_whole() -> None:
    plan = TrainingPlan(gpus=8, tp=8)
    alone, with_it = (
        predict.training_memory(LLAMA_8B, replace(plan, sequence_parallel=on))
        for on in (False, True)
    )
    none = predict.training_memory(LLAMA_8B, TrainingPlan())
    assert none.activations / 8 < with_it.activations < alone.activations
    # and 4·V/8 bytes per token, the vector more that the loss takes when it is divided
    divided = (none.activations + 4096 * 4 * 128256) / 8
    assert with_it.activations == pytest.approx(divided, rel=0.001)


def test_kernels_and_recomputation_by_hand() -> None:
    kept = {
        kernels: predict.layer_activations(SMALL, 0, "fp32", kernels).total
        for kernels in ("eager", "fused-norms", "compiled")
    }
    # eager: see above. A fused norm keeps input and output, 2·8·4, and a scale; a compiled SwiGLU
    # gate, up and their product, 3·12·4
    assert kept == {"eager": 504, "fused-norms": 2 * 68 + 112 + 192, "compiled": 2 * 68 + 112 + 144}
    # selective: the input 32, q and v 32 + 16, attention's output 32 and 4·4, gate 48, down 32
    saved = predict.saved_activations(SMALL, "fp32", 16, 2, "selective")
    assert saved == 32 * (2 * (32 + 48 + 48 + 48 + 32) + 140) + 256
    # keys 8·4, the output 8·8 and up 8·12, 2 FLOPs each in 2 layers, are done twice
    again = predict.training_flops_per_token(SMALL, 16, "selective")
    assert again - predict.training_flops_per_token(SMALL, 16) == 2 * 2 * (32 + 64 + 96)
    # a compiled loss in bf16: the logits and their gradient, 2·2·10, instead of 12·10
    assert predict.loss_peak(SMALL, "bf16").divided == 120
    assert predict.loss_peak(SMALL, "bf16", "compiled-loss").divided == 40


def test_offload_hybrid_sharding_and_kept_weights_by_hand() -> None:
    plan = TrainingPlan(gpus=8, zero=3, precision="autocast", seq_len=16)
    one = predict.training_memory(SMALL, plan)
    parameters = predict.total_parameters(SMALL)
    assert one.weights == 4 * parameters / 8
    hybrid = predict.training_memory(SMALL, replace(plan, replicate=4))
    assert hybrid.weights == 4 * parameters / 2
    step = predict.training_memory(SMALL, replace(plan, offload="optimizer"))
    assert (step.weights, step.optimizer, step.host) == (one.weights, 0, one.optimizer)
    away = predict.training_memory(SMALL, replace(plan, offload="all"))
    assert away.total == one.activations and away.host == 16 * parameters / 8
    # two blocks of 496 and the rest, 168, in bf16; a block's gradient in bf16 and in float32; the
    # allocator's block of the logits, 16 tokens of 10
    assert one.workspace == 2 * (2 * 496 + 168 + 496) + 4 * 496 + 16 * 10 * 2
    deep = replace(SMALL, num_hidden_layers=5)
    kept, freed = (
        predict.training_memory(deep, replace(plan, reshard_after_forward=on))
        for on in (False, True)
    )
    assert kept.workspace - freed.workspace == 2 * 3 * 496  # five blocks, not two
    whole = predict.training_memory(SMALL, replace(plan, reduce_each=False))
    assert whole.workspace - one.workspace == 4 * parameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunks": 2}, "--virtual-stages 2 needs a pipeline; use --pp 2 or more"),
        ({"chunks": 2, "pp": 2}, "2 x --pp 2 are more chunks than the model's 2 layers"),
        ({"cp": 8, "seq_len": 24}, "--seq-len 24 is no multiple of 2 x --cp 8; use --seq-len 32"),
        ({"sequence_parallel": True}, "--sequence-parallel divides over --tp, which is 1"),
        ({"sequence_parallel": True, "tp": 2, "seq_len": 15}, "does not divide the 15 tokens"),
        ({"replicate": 3}, "--replicate 3 does not divide 8 ranks with the same weights; use 1, 2"),
        ({"replicate": 2}, "--replicate 2 is about groups of shards; add --fsdp or --zero 1"),
        ({"offload": "all"}, "--offload all is about sharded weights; add --fsdp"),
        ({"reshard_after_forward": False}, "--no-reshard-after-forward is about sharded weights"),
    ],
)
def test_impossible_plans_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        predict.training_memory(SMALL, TrainingPlan(gpus=8, **{"seq_len": 16} | changes))
    assert words in str(refused.value)


def test_interleaving_needs_whole_rounds_of_micro_batches() -> None:
    with pytest.raises(UsageError, match="--accumulation 6 is no multiple of --pp 4; use .* 8"):
        predict.training_memory(LLAMA_8B, TrainingPlan(gpus=4, pp=4, chunks=2, accumulation=6))


def test_micro_batches_in_flight() -> None:
    assert [predict.micro_batches_in_flight(4, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert predict.micro_batches_in_flight(4, 0, 2) == 2
    # Korthikanti et al.: interleaving holds 1 + (p - 1)/(p·v) times as much on the first stage
    assert predict.micro_batches_in_flight(4, 0, 8, chunks=2) == 4 * (1 + 3 / 8)
    assert predict.micro_batches_in_flight(4, 0, 4, chunks=2) == 4  # there are no more


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"cp": 3}, "--gpus 8 is no multiple of --tp 1 x --pp 1 x --cp 3 = 3"),
        ({"ep": 3}, "--ep 3 does not divide 8 experts and 8 data-parallel ranks; use 1, 2, 4 or 8"),
    ],
)
def test_degrees_of_context_and_experts_are_checked(degrees: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        predict.training_memory(
            MODELS["mixtral-8x7b"].architecture, TrainingPlan(gpus=8, **degrees)
        )


def test_hierarchical_collectives() -> None:
    inner, outer = (1e-6, 1 / 400e9), (5e-6, 1 / 40e9)
    # 8 nodes of 8: each GPU carries an eighth of 1 GB between nodes, 7/8 of it inside
    gather = (7 * 5e-6 + 7 / 8 * 1e9 / 8 / 40e9) + (7 * 1e-6 + 7 / 8 * 1e9 / 400e9)
    assert predict.hierarchical_all_gather(1e9, 8, 8, inner, outer) == pytest.approx(gather)
    assert predict.hierarchical_all_reduce(1e9, 8, 8, inner, outer) == pytest.approx(2 * gather)
    assert predict.hierarchical_all_reduce(1e9, 1, 8, inner, outer) == pytest.approx(
        predict.ring_all_reduce(1e9, 8, *inner)
    )


@pytest.mark.parametrize(
    ("content", "bits", "ignored"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 16384, ""),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128, ""),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, ""),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, ""),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["q_proj"]}, 4.5, "q_proj"),
        (
            {
                "quant_method": "compressed-tensors",
                "ignore": ["lm_head", "re:.*mlp.*"],
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 64}}},
            },
            4.25,
            "mlp.up_proj",
        ),
    ],
)
def test_quantization_is_read(content: dict, bits: float, ignored: str) -> None:
    types = predict.read_quantization({"quantization_config": content})
    assert types is not None and types.bytes_per_element == bits / 8
    assert types.covers("model.layers.0.self_attn.o_proj")
    assert not ignored or not types.covers(f"model.layers.0.{ignored}")


def test_quantized_parameters_by_hand() -> None:
    # of each layer attention's 192 and SwiGLU's 288; norms, tables and the output stay as they are
    types = predict.Quantization(4)
    assert predict.quantized_parameters(SMALL, types) == 960
    assert predict.quantized_parameters(SMALL, types, tp=2) == 480
    assert predict.quantized_parameters(SMALL, types, pp=2, stage=1) == 480
    assert predict.quantized_parameters(SMALL, predict.Quantization(4, output=True)) == 1040
    sparse = replace(SMALL, experts=Experts(4, 2, 12))  # the router's 32 are left
    assert predict.quantized_parameters(sparse, types) == 2 * (192 + 4 * 288)
    assert predict.quantized_parameters(SMALL, None) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"quant_method": "quip"}, "quantization method 'quip' is not known; known are awq"),
        ({"quant_method": "gptq"}, "quantization_config of gptq cannot be read"),
        ([4], "quantization_config is no JSON object"),
    ],
)
def test_a_quantization_that_is_none_is_refused(content: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        predict.read_quantization({"quantization_config": content})


def test_an_engine_makes_room_for_its_largest_batch() -> None:
    plan = predict.ServingPlan(batched_tokens=4, max_sequences=3)
    # sampling: 3 sequences of 10 words at 2 + 4 + 32 bytes, beside 4 hidden vectors of 8 in bf16
    assert predict.reserved_activations(SMALL, plan) == 3 * 10 * 38 + 4 * 8 * 2
    # a forward pass of 100 tokens: two hidden vectors, gate, up and their product of 12
    wide = replace(plan, batched_tokens=100)
    assert predict.reserved_activations(SMALL, wide) == 100 * 2 * (2 * 8 + 3 * 12)
    first = replace(plan, gpus=2, pp=2)  # a stage without output does not sample
    assert predict.reserved_activations(SMALL, first, stage=0) == 4 * 2 * (2 * 8 + 3 * 12)
    held = 2 * predict.total_parameters(SMALL) + 3 * 10 * 38 + 64 + predict.engine_reserve(plan)
    # a token's cache: 2 layers · 2 · 4 · 2 bytes
    assert predict.cache_tokens(SMALL, plan, held + 32 * 7 + 31) == 7
    assert predict.cache_tokens(SMALL, plan, held - 1) == 0
