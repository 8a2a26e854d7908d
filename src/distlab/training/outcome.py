"""What became of a training run: its losses, its speed, what the model writes, and its export.

A loss says how well the next token is guessed, not whether the whole holds together. So lines that
the model wrote go to Python's own parser; beside them lines of the held-out text, which is the best
that can be, and lines of the same tokens in random order, which is what frequencies alone give.
"""

import ast
import keyword
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distlab import hardware, predict
from distlab.data import Tokens
from distlab.model import Llama, save
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.training.held_out import DTYPES, HeldOut
from distlab.training.progress import Progress

BELOW_UNIGRAM = 0.1  # nats: a margin that chance does not give
PROMPT = "def"
SAMPLES, NEW_TOKENS, TEMPERATURE = 16, 128, 0.7
SHOWN_LINES = 10
COMPARED_TOKENS, WINDOW = 20_000, 128
PYTHON = {*keyword.kwlist, "self"}
BEFORE_AND_AFTER = [  # of a line, so that the header of any block can be read
    ("", ""),
    ("", "\n  pass"),
    ("if 0:\n  pass\n", "\n  pass"),
    ("try:\n  pass\n", "\n  pass"),
]
FEW_STEPS = 20  # after fewer no model has learnt to use context
EXPORT_WINDOW = 48  # held-out tokens that both models read
EXPORT_NEW_TOKENS = 24
LOGIT_TOLERANCE = 1e-3  # of a logit, in float32: their kernels add up in another order than ours


def report_losses(
    run: Run, progress: Progress, held_out: HeldOut, model: Llama, tokens: Tokens
) -> None:
    """Training and held-out losses, and whether the model uses context at all."""
    losses, unigram = progress.losses(), tokens.unigram_entropy()
    reached = progress.last_held_out
    if losses and progress.first_step == 0:
        untrained = math.log(model.config.vocab_size)
        run.compare("first loss: ln(vocabulary)", untrained, losses[0], "nats")
    run.metric("last_loss", losses[-1] if losses else None, "nats")
    run.metric("unigram_entropy", unigram, "nats", "the best loss without context")
    run.metric("held_out_loss", reached, "nats")
    bits = reached / math.log(2) / held_out.bytes_per_token()
    run.metric("bits_per_byte", bits, "", "of held-out text, comparable between vocabularies")
    first = progress.first_step
    run.figure(
        "losses", kind="line", title="The loss falls below the unigram entropy",
        x_label="step", y_label="loss (nats per token)",
        series=[
            {"label": "training", "x": [first + i + 1 for i in range(len(losses))], "y": losses},
            {"label": "held-out", "x": list(progress.held_out),
             "y": list(progress.held_out.values())},
        ],
        lines=[{"label": "unigram entropy", "y": unigram}],
    )  # fmt: skip
    name = f"the held-out loss is {BELOW_UNIGRAM} nats below the unigram entropy"
    if first + len(losses) < FEW_STEPS:
        run.print(f"not judged after {first + len(losses)} step(s), fewer than {FEW_STEPS}: {name}")
    else:
        run.check_below(name, reached, unigram - BELOW_UNIGRAM, "nats")


def report_speed(
    run: Run, model: Llama, seq_len: int, progress: Progress, peak: float | None
) -> None:
    """Tokens/s, and MFU where the peak of the devices is known."""
    speed = progress.tokens_per_second()
    run.metric("tokens_per_second", speed, "tok/s", "of all ranks together, in the median step")
    flops = predict.training_flops_per_token(model.config.architecture, seq_len)
    run.metric("model_flops", flops, "FLOP", "for each token, forward and backward")
    run.metric("peak_of_matrix_products", peak, "FLOP/s", "of all devices together")
    if speed is None or peak is None:
        run.print("MFU: unknown, without a step that was measured and a peak that is known")
        return
    run.metric("mfu", 100 * predict.mfu(speed, flops, peak), "%")


def peak_of_all(job: Runtime, dtype: str, limit_s: float) -> float | None:
    """The peak of the job's devices in FLOP/s: GPUs' specified one, CPUs' as they measure it now.

    `limit_s` is for measuring one size of product. None where a GPU's data sheet is not known.
    Every rank calls it.
    """
    arithmetic = DTYPES[dtype]
    if job.device.type == "cuda":
        one = hardware.peak_flops(job.device, arithmetic)
        return None if one is None else one * job.gpus  # ranks may share one
    job.barrier()  # the ranks' cores are busy at the same time, as they are in a step
    own = hardware.measured_peak_flops(job.device, arithmetic, limit_s)
    peak = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(peak)
    return peak.item()


def report_sample(
    run: Run, model: Llama, tokens: Tokens, keywords: int, times_chance: float | None
) -> None:
    """Show what the model writes, and check that it is more than words by their frequency.

    It must have `keywords` different ones in all samples together, and `times_chance` as many
    readable lines as chance gives, if this is asked for: a short run learns words, and no syntax.
    """
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
    run.check_above("different keywords of Python that it writes", len(found), keywords)
    if times_chance is not None:
        run.check_above(
            "it writes lines of Python more often than chance does",
            shares["what the model writes"],
            times_chance * shares["shuffled held-out tokens"],
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


def export_window(tokens: Tokens) -> torch.Tensor:
    """Held-out ids [1, n] that a model and its export read."""
    return torch.from_numpy(tokens.validation.windows([0], EXPORT_WINDOW))


@torch.inference_mode()
def compare_with_transformers(
    run: Run, directory: str | Path, tokens: Tokens, logits: torch.Tensor
) -> Any:
    """Load an exported folder with transformers, which must compute the model's `logits` of
    `export_window`; its model.

    The folder is an ordinary one of Hugging Face: this is the proof.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    run.metric("export", sum(file.stat().st_size for file in Path(directory).iterdir()), "B")
    ids = export_window(tokens)
    run.check_close(
        "transformers computes the same logits", theirs(ids).logits, logits, LOGIT_TOLERANCE
    )
    text = tokens.tokenizer.decode(ids[0].tolist())
    run.check_equal(
        "its tokenizer gives the same tokens",
        tokenizer(text)["input_ids"], tokens.tokenizer.encode(text).ids,
    )  # fmt: skip
    return theirs


@torch.inference_mode()
def export(run: Run, model: Llama, directory: str, tokens: Tokens) -> None:
    """Write `model`, on the CPU, to `directory`, load it with transformers, and compare."""
    folder = save(model, directory, tokens.tokenizer)
    ids = export_window(tokens)
    theirs = compare_with_transformers(run, folder, tokens, model(ids))
    written = theirs.generate(
        ids, max_new_tokens=EXPORT_NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    run.check_below(
        "each token that it generates is our likeliest too: logits below our best",
        regret(model, written, ids.shape[1]), LOGIT_TOLERANCE,
    )  # fmt: skip


def regret(model: Llama, written: torch.Tensor, prompt: int) -> float:
    """By how much the logit of a generated token is below `model`'s best, at most.

    Where two tokens are equally likely to the last bit but one, either may be chosen.
    """
    logits = model(written[:, :-1])[:, prompt - 1 :]  # [1, new, vocab]
    chosen = logits.gather(-1, written[:, prompt:, None]).squeeze(-1)
    return float((logits.max(-1).values - chosen).max())
