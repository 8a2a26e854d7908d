"""The model that scripts serve, and what transformers says with it.

It is the folder of --model, else a tiny one trained here.

As a program it prints that folder, for shells: python -m distlab.serving.tiny_model [--model DIR].
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from distlab import script
from distlab.data import split_documents, train_tokenizer
from distlab.data.corpus import read_corpus
from distlab.errors import UsageError
from distlab.files import cache_dir
from distlab.hardware import default_device
from distlab.model import SIZES, Llama, read_config, save

CORPUS_BYTES, DOCUMENT_CHARS = 2_000_000, 4_000
STEPS = {"smoke": 80, "laptop": 60, "gpu": 60}
BATCH, SEQ = 8, 64
# The smoke size's heads are 16 wide, and vLLM's attention on CPUs begins with 32.
SHAPES = {**SIZES, "smoke": replace(SIZES["smoke"], head_dim=32)}
PRESETS = {name: {"size": name} for name in SHAPES}


def main(argv: list[str] | None = None) -> int:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    print(model_directory(parser.parse_args(argv)))
    return 0


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model DIR, and the --size of the one that is trained here where there is no --model."""
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face folder (default: tiny)")
    parser.add_argument("--size", choices=list(SHAPES), help="of the model that is trained here")


def model_directory(args: argparse.Namespace) -> Path:
    """The folder of --model, checked, or that of the tiny model, made now if it is not there."""
    if args.model is None:
        return tiny_model(args.size)
    folder = Path(args.model)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--model {args.model} is no model folder, as it holds no config.json; "
            "use the folder of a Hugging Face model, such as train_ddp.py --export writes"
        )
    read_config(folder)  # another architecture is named now, not after vLLM's minute of start-up
    return folder.resolve()


@torch.inference_mode(False)  # also in a script that only infers
@torch.enable_grad()
def tiny_model(size: str) -> Path:
    """A model of one of the SHAPES, trained for a moment on the standard library's sources.

    Enough that its answers look like Python and its greedy choices are no coin tosses. It is kept
    in the cache under a name that tells how it was made.
    """
    shape = SHAPES[size]
    recipe = json.dumps([asdict(shape), CORPUS_BYTES, STEPS[size], BATCH, SEQ])
    name = f"tiny-{size}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    folder = cache_dir() / "models" / name
    if not (folder / "config.json").is_file():
        training, _ = split_documents(read_corpus("stdlib", CORPUS_BYTES))
        tokenizer = train_tokenizer(training, shape.vocab_size)
        begins = "\n".join(document[:DOCUMENT_CHARS] for document in training)
        tokens = torch.tensor(tokenizer.encode(begins).ids)
        torch.manual_seed(0)
        model = _train(Llama(shape).to(default_device()), tokens, STEPS[size])
        save(model, folder, tokenizer, overwrite=True)
    return folder


def transformers_greedy(
    model: str | Path, prompts: Sequence[str], new_tokens: int, dtype: str
) -> list[list[int]]:
    """The token ids that transformers adds to each prompt, the end of text included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    network.to(default_device())
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(default_device())
        made = network.generate(**ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        answers.append(made[0, ids["input_ids"].shape[1] :].tolist())
    return answers


def _train(model: Llama, tokens: torch.Tensor, steps: int) -> Llama:
    """Some steps of Adam on random windows of `tokens` [length]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - SEQ, (BATCH,))
        window = torch.stack([tokens[start : start + SEQ + 1] for start in starts])
        window = window.to(default_device())
        optimizer.zero_grad()
        model.loss(window[:, :-1], window[:, 1:]).backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    script.exit(main)
