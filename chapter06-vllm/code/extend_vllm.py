"""Extend vLLM without a fork: a logits processor of our own, through its extension point.

Between the model and the sampler stands a list of logits processors. vLLM's own are min-p, logit
bias and min-tokens; `LLM(..., logits_processors=[Class])`, `vllm serve --logits-processors
module:Class`, or a package's entry point `vllm.logits_processors` adds others. vLLM makes one
instance for the engine, not one for each request. It works on the whole batch: `apply` gets logits
[requests, vocab], and `update_state` tells how the rows have changed since the last step: requests
that left, came, or moved to another row. Whoever overlooks a move bends another request's answer.

The processor here, ForbidAndForce, reads two lists of token ids from a request's `extra_args`: the
forbidden ones never appear, and the forced ones begin the answer, in their order. Requests that do
not ask for it stay as they were, though they share the batch.

Run (in the environment vllm):
    python chapter06-vllm/code/extend_vllm.py
    python chapter06-vllm/code/extend_vllm.py --model DIR --requests 32

You should see: the same prompt answered freely, with its favourite token forbidden, and with a
forced beginning; and every check hold while requests come, leave, and move between rows.
"""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from distlab import script
from distlab.run import Run
from distlab.serving.tiny_model import add_model_flags, model_directory
from inference.vllm_settings import add_engine_flags, running

if TYPE_CHECKING:
    from vllm import LLM

PROMPT = "def read(self, size=-1):\n"
BEGINNING = "    return None"
PRESETS = {
    "smoke": {"size": "smoke", "dtype": "float32", "requests": 12, "eager": True},
    "laptop": {"size": "laptop", "dtype": "float32", "requests": 32, "eager": True},
    "gpu": {"size": "gpu", "dtype": "bfloat16", "requests": 128, "eager": False},
}
NEW_TOKENS = 16
ROWS = 4  # requests in one batch: fewer than there are, so that they come and leave at any step


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        running(
            model_directory(args),
            args,
            logits_processors=["inference.logits_processor:ForbidAndForce"],
            max_num_seqs=ROWS,
        ) as llm,
    ):
        show_three_answers(run, llm)
        check_mixed_batch(run, llm, args.requests)
        check_refusal(run, llm)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    add_engine_flags(parser)
    parser.add_argument(
        "--requests", type=script.positive_int, help="in the mixed batch, a third of each kind"
    )
    return parser.parse_args(argv)


def show_three_answers(run: Run, llm: "LLM") -> None:
    """One prompt, answered freely, without its favourite token, and with a given beginning."""
    free = answer(llm, {})
    favourite = max(set(free), key=free.count)
    wanted = llm.get_tokenizer().encode(BEGINNING)
    without, forced = answer(llm, {"forbid": [favourite]}), answer(llm, {"force": wanted})
    decode = llm.get_tokenizer().decode
    run.print(f"sample: free: {decode(free)!r}")
    run.print(f"sample: without {decode([favourite])!r}: {decode(without)!r}")
    run.print(f"sample: begun with {BEGINNING!r}: {decode(forced)!r}")
    run.metric("favourite_token_when_free", free.count(favourite), "times")
    run.check_equal("a forbidden token appears", without.count(favourite), 0)
    run.check_equal("forced tokens begin the answer", forced[: len(wanted)], wanted)


def check_mixed_batch(run: Run, llm: "LLM", count: int) -> None:
    """Free, forbidding and forcing requests of different lengths share the batch's few rows.

    Each must get what it gets alone, where there is no other row to be confused with.
    """
    free = answer(llm, {})
    kinds = [{}, {"forbid": [free[0]]}, {"forbid": [free[-1]], "force": [7, 5]}]
    asked = [(kinds[i % 3], 1 + 5 * i % NEW_TOKENS) for i in range(count)]
    alone = {str(kind): answer(llm, kind) for kind in kinds}
    together = answers(llm, asked)
    expected = [alone[str(kind)][:length] for kind, length in asked]
    run.check_equal(
        f"{count} requests over {ROWS} rows answer as they do alone", together, expected
    )


def check_refusal(run: Run, llm: "LLM") -> None:
    """A request that asks for nonsense is refused before it reaches the batch."""
    from vllm.exceptions import VLLMValidationError

    try:
        answer(llm, {"forbid": "everything"})
        refused = "it was not"
    except (ValueError, VLLMValidationError) as error:
        refused = str(error)
    run.check_true("a wrong argument is refused", "list of token ids" in refused, refused)


def answer(llm: "LLM", extra: dict[str, Any]) -> list[int]:
    return answers(llm, [(extra, NEW_TOKENS)])[0]


def answers(llm: "LLM", asked: list[tuple[dict[str, Any], int]]) -> list[list[int]]:
    """The greedy token ids for PROMPT of requests with these extra arguments and lengths."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, extra_args=extra)
        for extra, length in asked
    ]
    results = llm.generate([PROMPT] * len(asked), params, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


if __name__ == "__main__":
    script.exit(main)
