"""A program in SGLang's language, fork, gen, join and select, and what the radix cache saves in it.

A document is read once; for each question the state forks, and all branches are answered at once,
each under a constraint (a regular expression). After the join the verdict is one of two strings,
chosen by their probability (select), and a last answer must be JSON of a schema. Every call sends
the whole text so far. Without a cache of prefixes the document would be computed for each branch;
with it, once. How many tokens that saves follows from the token counts alone.

Run in the environment sglang, with its server (`bash chapter07-sglang/code/sglang_server.sh`):
    python chapter07-sglang/code/sglang_frontend.py
    python chapter07-sglang/code/sglang_frontend.py --branches 8 --document-tokens 1500

You should see: cached tokens as predicted, to the token; answers that keep to their constraints;
and branches that come sooner than as many at once that have nothing in common.
"""

import importlib.util
import json
import os
import re
import statistics
import time
import warnings
from argparse import Namespace
from typing import Any
from urllib.error import URLError

from distlab import script
from distlab.data.corpus import read_corpus
from distlab.errors import RunError, UsageError
from distlab.run import Run

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"branches": 3, "document_tokens": 300, "rounds": 3},
    "laptop": {"branches": 6, "document_tokens": 1500, "rounds": 5},
    "gpu": {"branches": 16, "document_tokens": 1500, "rounds": 5},
}
URL = "http://127.0.0.1:8200"
QUESTION = "\n{letter}) How many lines matter, from 1 to 999? "  # apart from its first letter on
NUMBER = r"[1-9][0-9]{0,2}"
CHOICES = ["good", "bad"]
SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": CHOICES}, "certain": {"type": "boolean"}},
    "required": ["verdict", "certain"],
    "additionalProperties": False,
}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    refuse(args)
    os.environ["no_proxy"] = "*"  # SGLang's client asks by urllib, which would ask a proxy
    with script.run(args) as run:
        endpoint = connect(args.base_url)
        tokenize = tokenizer_of(endpoint)
        document = first_tokens(tokenize, args.document_tokens)
        questions = questions_of(args.branches)
        survey, review, apart = programs()
        state, _ = run_program(review, endpoint, document=document, questions=questions)
        check_constraints(run, state)
        forked, parted = [], []
        for _ in range(args.rounds):  # in turns, as the machine may be slower for a while
            forked.append(run_program(survey, endpoint, document=document, questions=questions))
            parted.append(run_program(apart, endpoint, document=document, questions=questions))
        report(run, predict(tokenize, document, questions), forked, parted)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add = parser.add_argument
    add("--base-url", default=URL, metavar="URL", help="of SGLang's server, without /v1")
    add("--branches", type=script.positive_int, metavar="N", help="questions to one document")
    add("--document-tokens", type=script.positive_int, metavar="N")
    add("--rounds", type=script.positive_int, metavar="N", help="with and without, in turns")
    return parser.parse_args(argv)


def refuse(args: Namespace) -> None:
    script.refuse_no_median(args, "rounds")
    if not 2 <= args.branches <= 26:
        raise UsageError(f"--branches {args.branches} is no fork with a letter each; use 2 to 26")
    if importlib.util.find_spec("sglang") is None:
        raise UsageError(
            "this Python has no SGLang; run it with the one that "
            "`python3 scripts/lab.py env sglang` builds and prints"
        )


def connect(url: str) -> Any:
    warnings.filterwarnings("ignore")
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    try:
        return RuntimeEndpoint(url.rstrip("/").removesuffix("/v1"))
    except (URLError, OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"no SGLang server answers at {url} ({error}); start one, or name another by --base-url"
        ) from error


def tokenizer_of(endpoint: Any) -> Any:
    """The tokenizer of the model that the server has, from its folder."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # it warns that the text is longer than the model's context
    return AutoTokenizer.from_pretrained(endpoint.get_model_name())


def first_tokens(tokenize: Any, count: int) -> str:
    """A beginning of the standard library's sources with about `count` tokens."""
    text = "\n".join(read_corpus("stdlib", 40 * count))
    return tokenize.decode(tokenize(text)["input_ids"][:count])


def programs() -> tuple[Any, Any, Any]:
    """Three functions in SGLang's language; made late, as the import of sglang takes seconds."""
    import sglang as sgl

    def ask(question: str) -> Any:
        return question + sgl.gen("lines", max_tokens=4, temperature=0, regex=NUMBER)

    def ask_all(s: Any, document: str, questions: list[str]) -> None:
        s += document
        s.sync()  # else fork looks at the text before it is there, and has nothing computed ahead
        branches = s.fork(len(questions))  # the document is computed here, once
        branches += [ask(question) for question in questions]
        branches.join()  # s["lines"] is from here on the list of their answers
        s["used"] = [branch.get_meta_info("lines") for branch in branches.states]

    @sgl.function
    def survey(s: Any, document: str, questions: list[str]) -> None:
        ask_all(s, document, questions)

    @sgl.function
    def review(s: Any, document: str, questions: list[str]) -> None:
        ask_all(s, document, questions)
        s += "\n# This code is " + sgl.select("verdict", CHOICES)
        s += "\n# As JSON: "
        s += sgl.gen("record", max_tokens=48, temperature=0, json_schema=json.dumps(SCHEMA))

    @sgl.function
    def apart(s: Any, document: str, questions: list[str]) -> None:
        """As many at once, but each begins with a letter of its own, so that none finds another."""
        branches = s.fork(len(questions))
        for branch, question in zip(branches, questions, strict=True):
            branch += question[1] + document + ask(question)
        branches.join()
        s["used"] = [branch.get_meta_info("lines") for branch in branches.states]

    return survey, review, apart


def questions_of(count: int) -> list[str]:
    return [QUESTION.format(letter=chr(ord("A") + number)) for number in range(count)]


def run_program(function: Any, endpoint: Any, **arguments: Any) -> tuple[Any, float]:
    """Its end state, from an empty cache, and the seconds until it was there."""
    endpoint.flush_cache()
    started = time.perf_counter()
    state = function.run(**arguments, backend=endpoint)
    state.sync()
    if (error := state.error()) is not None:
        raise RunError(f"SGLang did not answer: {error}")
    return state, time.perf_counter() - started


def check_constraints(run: Run, state: Any) -> None:
    lines, verdict, record = state["lines"], state["verdict"], state["record"]
    run.print(f"answers: {lines}, {verdict}, {record}")
    run.check_equal("every branch says a number", [bool(re.fullmatch(NUMBER, n)) for n in lines],
                    [True] * len(lines))  # fmt: skip
    run.check_equal("the verdict is one of the choices", verdict in CHOICES, True)
    said = json.loads(record)
    kept = set(said) == {"verdict", "certain"} and said["verdict"] in CHOICES
    run.check_equal("the record is JSON of the schema", kept, True)


def predict(tokenize: Any, document: str, questions: list[str]) -> list[tuple[int, int]]:
    """For each branch: the tokens of its prompt, and how many of them the document's are."""
    own = tokenize(document)["input_ids"]
    prompts = [tokenize(document + question)["input_ids"] for question in questions]
    # Its last token and the question's first may have become one: what is cached ends before.
    return [(len(ids), len(os.path.commonprefix([own, ids]))) for ids in prompts]


def report(
    run: Run,
    predicted: list[tuple[int, int]],
    forked: list[tuple[Any, float]],
    parted: list[tuple[Any, float]],
) -> None:
    used = [(i["prompt_tokens"], i["cached_tokens"]) for i in forked[0][0]["used"]]
    run.check_equal("each branch finds the document in the cache", used, predicted)
    found = [info["cached_tokens"] for info in parted[0][0]["used"]]
    run.check_equal("branches with nothing in common find nothing", found, [0] * len(found))
    whole = sum(length for length, _ in predicted)
    once = whole - sum(cached for _, cached in predicted) + max(cached for _, cached in predicted)
    seconds = statistics.median(taken for _, taken in forked)
    seconds_apart = statistics.median(taken for _, taken in parted)
    columns = ["branches", "prompt tokens", "computed, predicted", "seconds, median"]
    rows = [
        ["nothing in common", whole, whole, seconds_apart],
        ["forked from one state", whole, once, seconds],
    ]
    run.table("fork", columns, rows, caption=f"{len(predicted)} branches, {len(forked)} rounds")
    computed = sum(length - cached for length, cached in used) + max(c for _, c in used)
    run.compare("computed_tokens", once, computed)
    run.metric("tokens_saved", 1 - once / whole)
    run.metric("speedup", seconds_apart / seconds)


if __name__ == "__main__":
    script.exit(main)
