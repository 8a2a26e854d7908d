"""The model as a Hugging Face folder, and the proof that transformers computes what we do."""

from typing import Any

import torch

from distlab.data import Tokens
from distlab.model import Llama, save
from distlab.run import Run

WINDOW = 48  # held-out tokens that both models read
NEW_TOKENS = 24
TOLERANCE = 1e-3  # of a logit, in float32: their kernels add up in another order than ours


@torch.inference_mode()
def export(run: Run, model: Llama, directory: str, tokens: Tokens) -> None:
    """Write `model`, on the CPU, to `directory`, load it with transformers, and compare."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = save(model, directory, tokens.tokenizer)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    run.metric("export", sum(file.stat().st_size for file in folder.iterdir()), "B")

    ids = torch.from_numpy(tokens.validation.windows([0], WINDOW))
    run.check_close(
        "transformers computes the same logits", theirs(ids).logits, model(ids), TOLERANCE
    )
    text = tokens.tokenizer.decode(ids[0].tolist())
    run.check_equal(
        "its tokenizer gives the same tokens",
        tokenizer(text)["input_ids"], tokens.tokenizer.encode(text).ids,
    )  # fmt: skip
    written = theirs.generate(
        ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    run.check_below(
        "each token that it generates is our likeliest too: logits below our best",
        regret(model, written, ids.shape[1]), TOLERANCE,
    )  # fmt: skip


def regret(model: Llama, written: torch.Tensor, prompt: int) -> float:
    """By how much the logit of a generated token is below `model`'s best, at most.

    Where two tokens are equally likely to the last bit but one, either may be chosen.
    """
    logits = model(written[:, :-1])[:, prompt - 1 :]  # [1, new, vocab]
    chosen = logits.gather(-1, written[:, prompt:, None]).squeeze(-1)
    return float((logits.max(-1).values - chosen).max())
