"""vLLM offline: one call for many prompts, equal to transformers, faster with every request.

`LLM.generate` takes any number of prompts. Its scheduler puts as many of them into each forward
pass as the cache has room for, and a pass reads the weights once for all. So output tokens/s grow
with the requests until the arithmetic, not the memory, is the limit; one request alone cannot be
faster than the memory's bandwidth over the bytes that a token reads.

Greedy decoding has one right answer. The same prompts go through transformers' `generate`, one at
a time, and in float32 every token must be equal. Narrower types round, and two tokens that are
about as likely may change places: there the share of equal answers is measured.

Run (in the environment vllm: `python3 scripts/lab.py env vllm` builds it and prints its python):
    python chapter06-vllm/code/vllm_offline.py
    python chapter06-vllm/code/vllm_offline.py --model DIR --dtype bfloat16 --no-eager

You should see: a sample that looks like Python, every greedy token equal to transformers', and a
throughput that grows with the number of requests.
"""

import statistics
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distlab import script
from distlab.model import read_config
from distlab.run import Run
from distlab.serving.tiny_model import add_model_flags, model_directory, transformers_greedy
from inference.roofline import measured_roofline
from inference.vllm_settings import add_engine_flags, running

if TYPE_CHECKING:
    from vllm import LLM

PROMPTS = [
    "def read(self, size=-1):\n",
    "import os\nimport sys\n\n",
    "class Queue:\n    def __init__(self):\n",
    "    raise ValueError(",
    "for name, value in items:\n    if name",
    "# The following",
    "    return self._",
    "try:\n    value = int(text)\nexcept",
]
REQUESTS = (1, 8, 64)
PRESETS = {
    "smoke": {"size": "smoke", "dtype": "float32", "new_tokens": 16, "repeats": 1, "eager": True},
    "laptop": {"size": "laptop", "dtype": "float32", "new_tokens": 64, "repeats": 3, "eager": True},
    "gpu": {"size": "gpu", "dtype": "bfloat16", "new_tokens": 128, "repeats": 5, "eager": False},
}
PROMPT_TOKENS = 41


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        model = model_directory(args)
        with running(model, args) as llm:
            answers = greedy(llm, args.new_tokens)
            measure_throughput(run, llm, args, model)
        run.print(f"sample: {PROMPTS[0] + answers[0].text!r}")
        check_parity(run, [list(answer.token_ids) for answer in answers], args, model)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    add_engine_flags(parser)
    parser.add_argument("--new-tokens", type=script.positive_int, metavar="N", help="a request")
    parser.add_argument("--repeats", type=script.positive_int, help="of each number of requests")
    args = parser.parse_args(argv)
    if PROMPT_TOKENS + args.new_tokens > args.max_model_len:
        raise script.UsageError(
            f"--new-tokens {args.new_tokens} after {PROMPT_TOKENS} do not fit into "
            f"--max-model-len {args.max_model_len}; use fewer, or a longer context"
        )
    return args


def greedy(llm: "LLM", new_tokens: int) -> list:
    """vLLM's answer to each of the PROMPTS, all in one call."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    return [result.outputs[0] for result in llm.generate(PROMPTS, params, use_tqdm=False)]


def measure_throughput(run: Run, llm: "LLM", args: Namespace, model: Path) -> None:
    """Output tokens/s of 1, 8 and 64 requests; those of 8 and 64 are predicted from that of 1.

    What a request alone takes longer than bandwidth and arithmetic explain is the engine's own
    time: scheduling, Python, starting kernels. It is spent once a step, however many share it.
    """
    config, limit = read_config(model), measured_roofline(args.dtype)
    run.metric("read_bandwidth", limit.bandwidth, "B/s")
    run.metric("matmul_peak", limit.peak_flops, "FLOP/s")
    lengths = (PROMPT_TOKENS, args.new_tokens)
    took = {}
    for requests in REQUESTS:
        times = [
            seconds(llm, requests, args.new_tokens, config.vocab_size)
            for _ in range(1 + args.repeats)
        ]
        took[requests] = statistics.median(times[1:])  # the first one warmed up
    least = {n: limit.generate_seconds(config, args.dtype, n, *lengths) for n in REQUESTS}
    fixed = max(0.0, (took[1] - least[1]) / args.new_tokens)
    run.metric("output_tokens_1_request", args.new_tokens / took[1], "tok/s")
    run.metric("limit_1_request", args.new_tokens / least[1], "tok/s")
    run.metric("own_time_of_a_step", fixed, "s")
    for n in REQUESTS[1:]:
        tokens = n * args.new_tokens
        predicted = tokens / (least[n] + fixed * args.new_tokens)
        run.compare(f"output tokens/s, {n} requests", predicted, tokens / took[n], "tok/s")
    gain = REQUESTS[-1] * took[1] / took[REQUESTS[-1]]
    run.metric("gain_from_batching", gain, "x", f"{REQUESTS[-1]} requests over 1")


def seconds(llm: "LLM", requests: int, new_tokens: int, vocab_size: int) -> float:
    """The time of `requests` random prompts, new ones each time: nothing is found in the cache."""
    from vllm import SamplingParams

    prompts = torch.randint(1, vocab_size, (requests, PROMPT_TOKENS)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return time.perf_counter() - started


def check_parity(run: Run, answers: list[list[int]], args: Namespace, model: Path) -> None:
    """Compare with what transformers generates, from the same text and the same weights."""
    expected = transformers_greedy(model, PROMPTS, args.new_tokens, args.dtype)
    equal = sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True))
    run.metric("answers_equal_to_transformers", 100 * equal / len(PROMPTS), "%")
    if args.dtype == "float32":
        run.check_equal("every greedy token equals transformers'", answers, expected)


if __name__ == "__main__":
    script.exit(main)
