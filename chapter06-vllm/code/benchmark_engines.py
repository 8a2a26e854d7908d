"""transformers, paged_engine and vLLM side by side: the same model, prompts and lengths.

Each engine has a process and the settings that are best for it here. A load goes to one after the
other, in turns, while the others are stopped; the next round has new prompts, so that no cache
knows them. Prompts are pieces of real text, their lengths mixed around --prompt-tokens. A second
part gives all prompts one long beginning, which has been seen before.

Prediction: a step reads the weights once, and each request's keys and values; it takes those bytes
over the measured bandwidth, or the FLOPs over the measured peak, whichever is more. Beside it
stands what the fastest engine reached. In float32 every engine must give the same greedy tokens.

Run (in the environment vllm, which has all three):
    python chapter06-vllm/code/benchmark_engines.py
    python chapter06-vllm/code/benchmark_engines.py --model DIR --dtype float32 --requests 1 8

You should see: tokens/s, TTFT and TPOT of each engine at 1, 8 and 64 requests, and the ratio to
vLLM; a paged engine ahead of transformers wherever lengths differ or beginnings are shared.
"""

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from distlab import script
from distlab.errors import UsageError
from distlab.hardware import has_cuda
from distlab.model import ModelConfig, read_config
from distlab.run import Run
from distlab.serving.tiny_model import add_model_flags, model_directory
from inference.engine_process import EngineProcess, Load, Prompts, engine_process
from inference.roofline import Roofline, measured_roofline
from inference.vllm_settings import CPU_CACHE_BYTES, refuse

ENGINES = ["transformers", "paged_engine", "vllm"]
PRESETS = {
    "smoke": {
        "size": "smoke", "dtype": ["float32"], "requests": [1, 4], "new_tokens": 8, "repeats": 1,
        "shared_tokens": 64,
    },
    "laptop": {
        "size": "laptop", "dtype": ["float32", "bfloat16"], "requests": [1, 8, 64],
        "new_tokens": 64, "repeats": 3, "shared_tokens": 256,
    },
    "gpu": {
        "size": "gpu", "dtype": ["bfloat16"], "requests": [1, 8, 64, 256], "new_tokens": 128,
        "repeats": 5, "shared_tokens": 1024,
    },
}  # fmt: skip
OWN_TOKENS = 24  # of a prompt after the shared beginning
COLUMNS = [
    "engine", "dtype", "requests", "output tok/s", "TTFT p50, ms", "TPOT p50, ms", "times vLLM",
    "% of limit",
]  # fmt: skip
SHARED_COLUMNS = ["engine", "dtype", "requests", "output tok/s", "TTFT p50, ms", "from cache, %"]
Loads = dict[str, list[Load]]  # of each engine, a load a round


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        model = model_directory(args)
        for dtype in args.dtype:
            benchmark(run, args, model, dtype)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add = parser.add_argument
    add_model_flags(parser)
    add("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    add("--dtype", nargs="+", choices=["float32", "bfloat16"])
    add("--requests", nargs="+", type=script.positive_int, metavar="N", help="at once")
    add("--prompt-tokens", type=script.positive_int, default=41, metavar="N", help="on average")
    add("--new-tokens", type=script.positive_int, metavar="N", help="of each answer")
    add("--shared-tokens", type=script.positive_int, metavar="N", help="of the shared beginning")
    add("--repeats", type=script.positive_int, help="rounds, each with new prompts")
    add("--seed", type=script.seed, default=0)
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        raise UsageError(f"--new-tokens {args.new_tokens} has no time per token; use 2 or more")
    return args


def benchmark(run: Run, args: Namespace, model: Path, dtype: str) -> None:
    """Both parts in one dtype, the engines started once for all of it."""
    config, limit = read_config(model), measured_roofline(dtype)
    prompts = Prompts(model, config.vocab_size, args.seed)
    longest = max(2 * args.prompt_tokens, args.shared_tokens + OWN_TOKENS) + args.new_tokens
    if "vllm" in args.engines:
        refuse(model, longest)
    run.metric(f"read_bandwidth_{dtype}", limit.bandwidth, "B/s")
    run.metric(f"matmul_peak_{dtype}", limit.peak_flops, "FLOP/s")
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                engine_process(name, model, dtype, settings(name, args, longest))
            )
            for name in args.engines
        }
        for engine in engines.values():
            run.print(f"job: {engine.description}")
        rows = [
            row
            for count in run.progress(args.requests, f"{dtype} loads")
            for row in one_load(run, args, config, engines, prompts, count, dtype, limit)
        ]
        run.table(f"engines_{dtype}", COLUMNS, rows, caption=f"{args.new_tokens} new tokens each")
        shared = shared_part(run, args, engines, prompts, dtype)
        run.table(f"shared_{dtype}", SHARED_COLUMNS, shared, caption="prompts that begin alike")
    draw(run, rows, dtype)


def settings(engine: str, args: Namespace, longest: int) -> dict:
    """What is best for `engine` on this machine; smoke starts sooner instead."""
    smoke = args.preset == "smoke"
    cache = CPU_CACHE_BYTES[args.preset]
    if engine == "transformers":
        return {}
    if engine == "paged_engine":
        gpu = {"kv_cache_bytes": 8 * 2**30, "max_batch_tokens": 8192}
        own = gpu if has_cuda() else {"kv_cache_bytes": cache}
        many = max(args.requests)
        return {**own, "max_model_len": longest, "max_sequences": many, "compile": not smoke}
    common = {"max_model_len": longest, "enforce_eager": smoke}
    if has_cuda():  # the engines share its memory
        return {**common, "gpu_memory_utilization": 0.4, "multiprocessing": True}
    # Bound threads and the compiled graph need vLLM's worker to be a process of its own. Blocks of
    # 32 tokens: by itself it takes 128 on a CPU, and shares no beginning shorter than that.
    cpu = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache, "block_size": 32}
    return {**common, **cpu, "multiprocessing": not smoke}


def one_load(
    run: Run,
    args: Namespace,
    config: ModelConfig,
    engines: dict[str, EngineProcess],
    prompts: Prompts,
    count: int,
    dtype: str,
    limit: Roofline,
) -> list[list]:
    """`count` requests at once: a row for each engine, and the limit beside the best of them."""
    loads: Loads = {name: [] for name in engines}
    for round_ in range(-1, args.repeats):  # the first one warms up
        batch = prompts.mixed(count, args.prompt_tokens, f"{dtype} {count} {round_}")
        for name, engine in engines.items():
            loads[name].append(engine.generate(batch, args.new_tokens))
    check_same_tokens(run, loads, dtype, f"{count} request(s)")
    rates = {name: rate(made) for name, made in loads.items()}
    least = limit.generate_seconds(config, dtype, count, args.prompt_tokens, args.new_tokens)
    most = count * args.new_tokens / least
    best = max(rates, key=lambda name: rates[name])
    run.compare(f"{dtype}, {count} request(s), limit and best", most, rates[best], "tok/s")
    for name in engines:
        run.metric(f"{name}_{dtype}_{count}", rates[name], "tok/s")
    return [
        [
            name, dtype, count, rates[name], 1000 * typical(made, "ttft"),
            1000 * typical(made, "tpot"), ratio(rates, name), 100 * rates[name] / most,
        ]
        for name, made in loads.items()
    ]  # fmt: skip


def shared_part(
    run: Run, args: Namespace, engines: dict[str, EngineProcess], prompts: Prompts, dtype: str
) -> list[list]:
    """Prompts with one long beginning, after a first request that had it too."""
    count = sorted(args.requests)[len(args.requests) // 2]
    loads: Loads = {name: [] for name in engines}
    for round_ in range(-1, args.repeats):
        first, *batch = prompts.shared(
            count + 1, args.shared_tokens, OWN_TOKENS, f"{dtype} shared {round_}"
        )
        for name, engine in engines.items():
            engine.generate([first], args.new_tokens)
            loads[name].append(engine.generate(batch, args.new_tokens))
    check_same_tokens(run, loads, dtype, "a shared beginning")
    asked = count * (args.shared_tokens + OWN_TOKENS)
    return [
        [
            name, dtype, count, rate(made), 1000 * typical(made, "ttft"),
            100 * made[-1].cached / asked,
        ]
        for name, made in loads.items()
    ]  # fmt: skip


def rate(loads: list[Load]) -> float:
    """Output tokens/s, the median of the rounds after the first."""
    return median(load.tokens_per_second for load in loads[1:])


def typical(loads: list[Load], name: str) -> float:
    """The median request's `ttft` or `tpot` in seconds, the median of the rounds."""
    return median(load.percentile(name, 50) for load in loads[1:])


def ratio(rates: dict[str, float], name: str) -> float | None:
    return rates[name] / rates["vllm"] if "vllm" in rates else None


def check_same_tokens(run: Run, loads: Loads, dtype: str, what: str) -> None:
    """Every round's answers, engine against engine; in a narrower type only their share."""
    names = list(loads)
    reference = [load.tokens for load in loads[names[0]]]
    for name in names[1:]:
        made = [load.tokens for load in loads[name]]
        if dtype == "float32":
            run.check_equal(f"{name} and {names[0]} give the same tokens, {what}", made, reference)
        else:
            pairs = list(zip(sum(made, []), sum(reference, []), strict=True))
            same = 100 * sum(answer == other for answer, other in pairs) / len(pairs)
            run.metric(f"answers_of_{name}_equal_{dtype}_{what}", same, "%")


def draw(run: Run, rows: list[list], dtype: str) -> None:
    names = list(dict.fromkeys(row[0] for row in rows))
    run.figure(
        f"engines_{dtype}",
        kind="bar",
        title=f"The same requests through each engine, {dtype}",
        x_label="requests at once",
        y_label="output tokens/s",
        series=[
            {
                "label": name,
                "x": [str(row[2]) for row in rows if row[0] == name],
                "y": [row[3] for row in rows if row[0] == name],
            }
            for name in names
        ],
    )


if __name__ == "__main__":
    script.exit(main)
