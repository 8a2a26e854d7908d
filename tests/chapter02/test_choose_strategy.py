"""choose_strategy.py: known cases, published ones, brute force, refusals; and measured orders."""

import json
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

import choose_strategy
import measure_strategies
from distlab import predict, script
from distlab.catalog import GPUS, MODELS
from distlab.predict import Architecture, TrainingPlan
from parallelism import plans
from parallelism.cost import Cluster, stage_flops, step_time
from parallelism.plans import Job, ranked, search

LLAMA_8B, LLAMA_70B = MODELS["llama-3-8b"].architecture, MODELS["llama-3-70b"].architecture


@pytest.fixture
def choose(tmp_path, capsys):
    """Runs a command line; its record and what it printed."""

    def run(command):
        file = tmp_path / "record.json"
        status = script.status_of(
            lambda: choose_strategy.main([*command.split(), "--json", str(file)])
        )
        printed = capsys.readouterr()
        assert status == 0, printed.err + printed.out
        return json.loads(file.read_text()), printed.out

    return run


def h100s(gpus, gbit=400, gpu="h100"):
    """choose_strategy.py's cluster with its default assumptions."""
    spec = GPUS[gpu]
    return Cluster(
        gpus=gpus,
        gpus_per_node=min(8, gpus),
        ports=min(8, gpus),
        flops=0.55 * spec.peak_flops["bf16"],
        memory_bandwidth=0.55 * spec.memory_bandwidth,
        memory=spec.memory_bytes - 1e9,
        inner=(3e-6, 2 / (0.8 * spec.nvlink_bandwidth)),
        outer=(5e-6, 8 / (0.8 * gbit * 1e9)),
    )


def job(model, gpus, seq_len=4096, global_batch=1024):
    return Job(model, gpus, min(8, gpus), seq_len, global_batch)


def test_a_small_model_on_few_gpus_gets_plain_data_parallelism(choose):
    record, text = choose("--model gpt2 --gpus 4 --seq-len 1024")
    first = record["plans"][0]
    assert (first["dp"], first["zero"], first["checkpointing"]) == (4, 0, False)
    assert "verdict: DP 4 is first" in text and "Computing decides" in text


def test_70b_gets_tensor_parallelism_inside_its_nodes(choose):
    record, text = choose("--model llama-3-70b --gpus 64 --gpu h100 --interconnect 400gbit")
    assert all(1 < plan["tp"] <= 8 for plan in record["plans"])
    assert record["plans"][0]["zero"] == 1 and record["plans"][0]["pp"] > 1
    assert "Memory decides: with more than 84 GB" in text  # 79.18 GiB less a reserve of 1 GB
    for plan in record["plans"]:
        degrees = [plan[kind] for kind in ("tp", "cp", "pp", "dp")]
        assert degrees[0] * degrees[1] * degrees[2] * degrees[3] == 64
        assert plan["memory_bytes"] <= 79.18 * 2**30 - 1e9
        parts = [plan[f"{kind}_seconds"] for kind in ("compute", "bubble", "tp", "cp", "ep")]
        assert sum(parts) + plan["pp_seconds"] + plan["dp_seconds"] == pytest.approx(
            plan["step_seconds"]
        )


def test_tensor_parallelism_stays_inside_a_node():
    """Two GPUs to a node: wider groups exist and fit, but must send over the network."""
    small_nodes = replace(h100s(16), gpus_per_node=2, ports=2)
    found = search(replace(job(LLAMA_8B, 16), gpus_per_node=2), small_nodes)
    assert any(one.plan.tp == 8 for one in found.fitting)
    assert all(one.plan.tp <= 2 for one in ranked(found.fitting)[:20])


def test_405b_on_eight_gpus_has_no_plan_and_says_why(choose):
    record, text = choose("--model llama-3-405b --gpus 8")
    assert not record["feasible"] and record["plans"] == []
    assert "verdict: no plan fits: the one that needs least" in text
    # 16 bytes for each of 406 G parameters, over 8 GPUs: 812 GB, some activations and logits
    assert "needs 81" in text and "84.0 GB can be used" in text
    assert "weights, gradients and optimizer alone are more than a GPU holds" in text


def test_a_mixture_of_experts_gets_expert_parallelism(choose):
    record, _ = choose("--model mixtral-8x7b --gpus 16 --global-batch 64")
    assert record["plans"][0]["ep"] > 1 and record["plans"][0]["ep_seconds"] > 0
    dense, _ = choose("--model llama-3-8b --gpus 16 --global-batch 64")
    assert all(plan["ep"] == 1 for plan in dense["plans"])


def test_a_slower_network_is_used_less():
    """The slower it is, the fewer bytes the first plan sends between nodes: DP yields to PP."""
    data_parallel = []
    for gbit in (400, 1):
        cluster = h100s(64, gbit)
        found = search(job(LLAMA_70B, 64), cluster)
        data_parallel.append(ranked(found.fitting)[0].plan.data_parallel)
    assert data_parallel[1] < data_parallel[0]


def test_a_long_sequence_gets_context_parallelism():
    long = job(LLAMA_8B, 64, seq_len=131072, global_batch=16)
    best = ranked(search(long, h100s(64)).fitting)[0]
    assert best.plan.cp > 1  # only 16 sequences for 64 GPUs, each too long for one


def gpt(hidden, heads, layers):
    """A model of Megatron-LM's table: 51,200 words, 2,048 positions."""
    return Architecture(
        51200, hidden, 4 * hidden, layers, heads, heads, hidden // heads, 2048,
        tie_word_embeddings=True, qkv_bias=True, output_bias=True, mlp_bias=True,
        layer_norm=True, learned_positions=True, gated_mlp=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tp", "pp", "gpus", "batch"),
    [
        (gpt(6144, 48, 40), 8, 1, 256, 1024),  # 18.4 billion parameters
        (gpt(8192, 64, 48), 8, 2, 512, 1536),  # 39.1
        (gpt(12288, 96, 80), 8, 8, 1536, 2304),  # 145.6
    ],
)
def test_the_published_plans_of_megatron_are_near_the_best(model, tp, pp, gpus, batch):
    """Narayanan et al. (arXiv 2104.04473), table 1: A100s, 8 ports of 200 Gbit/s a node.

    Compared with plans of what that system had: all activations recomputed, no ZeRO, no chunks. Of
    those theirs is within 10 % of the first: the model leaves out that narrow products are slower,
    so it may prefer TP 4 to 8 or half the stages, by less than it can be trusted. With ZeRO and
    sequence parallelism, which came later, it finds plans that need no recomputation at all.
    """
    cluster = h100s(gpus, 200, "a100-80gb")
    found = search(job(model, gpus, 2048, batch), cluster)
    like_theirs = [
        one
        for one in found.fitting
        if one.plan.zero == 0 and one.plan.checkpointing and one.plan.chunks == 1
    ]
    best = min(one.time.total for one in like_theirs)
    theirs = [
        one.time.total
        for one in like_theirs
        if (one.plan.tp, one.plan.pp, one.plan.cp) == (tp, pp, 1)
    ]
    assert min(theirs) <= 1.1 * best
    assert min(one.time.total for one in found.fitting) < best


@pytest.mark.slow
def test_the_published_plan_of_llama_3_405b():
    """Llama 3 (arXiv 2407.21783), table 4: TP 8, CP 1, PP 16, DP 128 on 16,384 H100s.

    Meta's kernels save less than autograd does (section 3.3.2), so what a compiler saves is
    counted. The first plan then has their TP and CP. Theirs fits, and is 11 % slower here, for its
    bubble; at 400 TFLOP/s per GPU it was measured at, it is within 15 %.
    """
    model = MODELS["llama-3-405b"].architecture
    task = replace(job(model, 16384, 8192, 2048), kernels="compiled")
    found = search(task, h100s(16384))
    first = ranked(found.fitting)[0]
    assert (first.plan.tp, first.plan.cp) == (8, 1)
    theirs = min(
        one.time.total
        for one in found.fitting
        if (one.plan.tp, one.plan.cp, one.plan.pp) == (8, 1, 16) and not one.plan.checkpointing
    )
    assert theirs < 1.12 * first.time.total
    tokens_per_second = first.plan.tokens_per_step / theirs / 16384
    flops = tokens_per_second * predict.training_flops_per_token(model, 8192)
    assert flops == pytest.approx(400e12, rel=0.15)


@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b"])
@pytest.mark.parametrize("gpus", [1, 6, 12, 16])
def test_brute_force_finds_the_same_degrees(model, gpus):
    problem = job(MODELS[model].architecture, gpus, global_batch=48)
    most_experts = gpus if problem.model.experts else 1
    numbers = range(1, gpus + 1)
    brute = {
        (tp, cp, ep, dp, pp)
        for tp, cp, dp, pp in product(numbers, repeat=4)
        for ep in range(1, most_experts + 1)
        if tp * cp * ep * dp * pp == gpus
    }
    found = [(d.tp, d.cp, d.ep, d.dp, d.pp) for d in plans.all_degrees(problem)]
    assert len(found) == len(set(found)) == plans.count_degrees(problem)
    assert set(found) == brute


def test_the_short_cuts_change_nothing():
    """Every plan's memory and FLOPs, stage by stage, and the first plan by a plain minimum."""
    problem = job(LLAMA_8B, 16, global_batch=32)
    cluster = h100s(16)
    found = search(problem, cluster)
    assert len(found.fitting) + sum(found.too_large().values()) == len(found.candidates)
    for one in found.candidates[:: len(found.candidates) // 60]:
        plan = one.plan
        assert one.memory.needed == predict.training_memory(LLAMA_8B, plan).needed
        flops = sum(sum(stage_flops(LLAMA_8B, plan, s)[:2]) for s in range(plan.pp))
        wanted = predict.training_flops_per_token(LLAMA_8B, 4096, plan.recompute)
        times = plan.accumulation * plan.data_parallel * plan.cp
        assert flops * times == pytest.approx(wanted * plan.tokens_per_step)
    fastest = min(one.time.total for one in found.fitting)
    order = ranked(found.fitting)
    assert order[0].time.total <= fastest * 1.02
    rest = [one.time.total for one in order[1:]]
    assert rest == pytest.approx(sorted(rest), rel=1e-3)


def schedule_seconds(stages, micro_batches, compute, link):
    """1F1B simulated event by event: a third of `compute` forward, the rest backward."""
    orders = []
    for stage in range(stages):
        warm_up = min(micro_batches, stages - stage - 1)
        order = [("F", n) for n in range(warm_up)]
        for n in range(micro_batches - warm_up):
            order += [("F", warm_up + n), ("B", n)]
        orders.append(order + [("B", n) for n in range(micro_batches - warm_up, micro_batches)])
    done, free = {}, [0.0] * stages
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, n = order[0]
            before = stage - 1 if kind == "F" else stage + 1
            ready = 0.0
            if 0 <= before < stages:
                if (kind, n, before) not in done:
                    continue
                ready = done[kind, n, before] + link
            share = compute / 3 if kind == "F" else 2 * compute / 3
            free[stage] = done[kind, n, stage] = max(free[stage], ready) + share
            order.pop(0)
    return max(free)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 8])
@pytest.mark.parametrize("slowness", [0.0, 0.05, 0.5, 2.0])
def test_the_pipelines_formula_is_the_schedules_time(stages, rounds, slowness):
    """The bubble, and links that show, since 1F1B waits for each micro-batch's round trip."""
    m = stages * rounds
    model = Architecture(1, 64, 64, stages, 1, 1, 64, 64)  # a vocabulary of next to nothing
    plan = TrainingPlan(stages, pp=stages, micro_batch=1, accumulation=m, seq_len=64)
    hidden = 2 * 64 * 64
    flops = sum(stage_flops(model, plan, 0)[:2])
    cluster = Cluster(
        gpus=stages, gpus_per_node=1, ports=1, flops=flops, memory_bandwidth=float("inf"),
        memory=float("inf"), inner=(0.0, 0.0), outer=(0.0, slowness / hidden),
    )  # fmt: skip
    time = step_time(model, plan, cluster)
    simulated = schedule_seconds(stages, m, 1.0, slowness)
    assert time.total == pytest.approx(simulated, rel=0.01)


def test_groups_know_which_of_their_ranks_share_a_node():
    cluster = h100s(64)
    local = {
        (8, 1): 8, (4, 2): 4, (16, 1): 8, (8, 8): 1, (16, 4): 2, (2, 4): 2, (4, 3): 1, (2, 32): 1,
    }  # fmt: skip
    assert {(k, stride): cluster.group(k, stride).local for k, stride in local} == local
    gigabyte = 1e9
    inside, across = cluster.group(8, 1), cluster.group(8, 8)
    assert inside.all_reduce(gigabyte) == pytest.approx(
        predict.ring_all_reduce(gigabyte, 8, *cluster.inner)
    )
    assert across.all_reduce(gigabyte) == pytest.approx(
        predict.ring_all_reduce(gigabyte, 8, *cluster.outer)
    )
    both = cluster.group(64, 1)
    levels = predict.hierarchical_all_reduce(gigabyte, 8, 8, cluster.inner, cluster.outer)
    assert both.all_reduce(gigabyte) <= levels * (1 + 1e-9)
    one_port = replace(cluster, ports=1)
    slower = one_port.group(8, 8).all_reduce(gigabyte) / across.all_reduce(gigabyte)
    assert slower == pytest.approx(8, rel=0.01)  # eight groups share the node's port


def test_uneven_layers_are_a_few_or_refused():
    why = plans.why_not
    llama = MODELS["llama-3-405b"].architecture  # 126 layers
    assert why(job(llama, 16), plans.Degrees(pp=16)) == ""
    assert "PP does not divide" in why(job(LLAMA_8B, 24), plans.Degrees(pp=24))
    assert "TP does not divide" in why(job(LLAMA_8B, 3), plans.Degrees(tp=3))
    nodes_of_six = replace(job(LLAMA_8B, 12), gpus_per_node=6)
    assert "straddle" in why(nodes_of_six, plans.Degrees(tp=4, dp=3))
    dropped = Counter()
    assert not list(plans.plans(job(LLAMA_8B, 13, global_batch=5), dropped))
    assert sum(dropped.values()) == 4


def test_where_no_degrees_divide_it_says_which(choose):
    record, text = choose("--gpus 13 --gpus-per-node 13 --global-batch 5")
    assert not record["feasible"] and "no degrees divide" in text


def test_a_config_file_and_its_tokens(choose, tmp_path):
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = "--gpus 2 --seq-len 128 --global-batch-tokens 2048 --intra-node pcie --gpu l4"
    record, text = choose(f"--config {tmp_path} {flags} --no-overlap --top 3")
    assert len(record["plans"]) == 3 and "16 sequences of 128 tokens" in text
    assert record["plans"][0]["micro_batch"] * record["plans"][0]["accumulation"] <= 16


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--gpus 20", "--gpus 20 is no multiple of --gpus-per-node 8; use --gpus 24"),
        ("--gpus 0", "at least 1"),
        ("--model llama-4", "invalid choice: 'llama-4'"),
        ("--gpu tpu", "invalid choice: 'tpu'"),
        ("--interconnect 400gbps", "--interconnect 400gbps is wrong because gbps is no known unit"),
        ("--interconnect fast", "--interconnect fast is wrong because it is no rate"),
        ("--intra-node fast", "--intra-node fast is no link; use nvlink, pcie or GB/s"),
        ("--latency 5us", "'5us' is not a number above 0"),
        ("--efficiency 0", "--efficiency 0 would never finish"),
        ("--global-batch-tokens 1000", "is no multiple of --seq-len 4096; use 4096"),
        ("--global-batch 8 --global-batch-tokens 4096", "not allowed with argument"),
        ("--model gpt2", "--seq-len 4096 is more than the model's 1024 learned positions"),
        ("--config nowhere.json", "--config nowhere.json cannot be read"),
    ],
)
def test_mistakes_are_refused(capsys, command, words):
    try:
        status = script.status_of(lambda: choose_strategy.main(command.split()))
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and printed.err.count("\n") == 1 and not printed.out
    assert words in printed.err


def test_measuring_refuses_an_unknown_rate(capsys):
    assert script.status_of(lambda: measure_strategies.main(["--rates", "1gbps"])) == 2
    assert "--rates 1gbps is wrong because gbps is no known unit" in capsys.readouterr().err
