"""What the model writes, and how much of it Python's own parser reads.

A loss says how well the next token is guessed, not whether the whole holds together. So lines that
the model wrote go to the parser, and beside them lines of the held-out text, which is the best that
can be, and lines of the same tokens in random order, which is what frequencies alone give.
"""

import ast
import keyword
import re
import warnings

import numpy as np
import torch

from distlab.data import Tokens
from distlab.model import Llama
from distlab.run import Run

PROMPT = "def"
SAMPLES, NEW_TOKENS, TEMPERATURE = 16, 128, 0.7
SHOWN_LINES = 10
COMPARED_TOKENS, WINDOW = 20_000, 128
PYTHON = {*keyword.kwlist, "self"}
# What is asked of the samples: smoke's run is long enough for words, and too short for syntax.
KEYWORDS = {"smoke": 1, "laptop": 10, "gpu": 10}  # different ones, in all samples together
TIMES_CHANCE = {"smoke": 0.0, "laptop": 2.0, "gpu": 2.0}
BEFORE_AND_AFTER = [  # of a line, so that the header of any block can be read
    ("", ""),
    ("", "\n  pass"),
    ("if 0:\n  pass\n", "\n  pass"),
    ("try:\n  pass\n", "\n  pass"),
]


def report_sample(run: Run, preset: str, model: Llama, tokens: Tokens) -> None:
    """Show what the model writes, and check that it is more than words by their frequency."""
    written = write(model, tokens)
    for line in written[0].splitlines()[:SHOWN_LINES]:
        run.print(f"sample: | {line}")
    held_out = held_out_ids(tokens)
    shuffled = np.random.default_rng(0).permutation(held_out)
    shares = {
        "held-out text": readable_share(tokens.tokenizer.decode(held_out.tolist())),
        "what the model writes": readable_share("\n".join(written)),
        "shuffled held-out tokens": readable_share(tokens.tokenizer.decode(shuffled.tolist())),
    }
    run.table(
        "python", ["lines of", "% that Python reads"],
        [[name, 100 * share] for name, share in shares.items()],
        caption="lines of two words or more, comments left out",
    )  # fmt: skip
    found = PYTHON.intersection(re.findall(r"\w+", "\n".join(written)))
    run.check_above("different keywords of Python that it writes", len(found), KEYWORDS[preset])
    run.check_above(
        "it writes lines of Python more often than chance does",
        shares["what the model writes"],
        TIMES_CHANCE[preset] * shares["shuffled held-out tokens"],
    )


def write(model: Llama, tokens: Tokens) -> list[str]:
    """Texts that begin with the prompt; the same for the same weights."""
    device = model.lm_head.weight.device
    prompt = torch.tensor([tokens.tokenizer.encode(PROMPT).ids] * SAMPLES, device=device)
    generator = torch.Generator(device).manual_seed(0)
    ids = model.generate(prompt, NEW_TOKENS, TEMPERATURE, generator)
    return [tokens.tokenizer.decode(row) for row in ids.tolist()]


def held_out_ids(tokens: Tokens) -> np.ndarray:
    """Tokens from all over the validation split, int64 [n]."""
    split = tokens.validation
    there = split.num_windows(WINDOW)
    windows = np.linspace(0, there, min(there, COMPARED_TOKENS // WINDOW), endpoint=False)
    return split.windows(windows.astype(np.int64), WINDOW)[:, 1:].flatten()


def readable_share(text: str) -> float:
    """The share of lines that Python's parser reads, each by itself.

    A line's indentation is left out, and the header of a block gets a body. Lines of a single word
    would be read nearly always, and comments always: they are not counted.
    """
    lines = [line for line in map(str.strip, text.splitlines()) if len(line.split()) > 1]
    counted = [line for line in lines if not line.startswith("#")]
    return sum(map(is_readable, counted)) / max(1, len(counted))


def is_readable(line: str) -> bool:
    return any(parses(before + line + after) for before, after in BEFORE_AND_AFTER)


def parses(source: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # such as a wrong escape in a string
            ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
