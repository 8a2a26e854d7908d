"""A target and a draft that partly agree: the draft is the target's first layers, trained as one.

Both read and write the same tokens. The draft shares the embedding, its layers, the last norm and
the output matrix with the target, and the sum of both losses is trained: early exit, as in
LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710).
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distlab import data
from distlab.model import KVCache, Llama, ModelConfig
from distlab.script import Run

VOCABULARY, SEQUENCE, PROMPT = 512, 64, 32  # tokens
CORPUS_BYTES = 2_000_000
STEPS = 8
LEARNING_RATE = 3e-3


class Decoder:
    """A model with its cache: probabilities of what follows, and a way back."""

    def __init__(self, model: Llama, rows: int, room: int, temperature: float) -> None:
        weight = model.lm_head.weight
        self.model, self.temperature = model, temperature
        self.cache = KVCache(model.config, rows, room, weight.device, weight.dtype)

    @torch.inference_mode()
    def probabilities(self, tokens: Tensor) -> Tensor:
        """[rows, new, vocab] after each of those of `tokens` [rows, seq] not yet in the cache."""
        logits = self.model(tokens[:, self.cache.length :], self.cache)
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.softmax(logits / self.temperature, dim=-1)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.cache.length = min(self.cache.length, length)


@dataclass(frozen=True)
class Pair:
    """The two models, and the prompt [1, PROMPT] from text that neither was trained on."""

    target: Llama
    draft: Llama
    prompt: Tensor
    room: int  # tokens of a cache

    def decoder(self, model: Llama, temperature: float, rows: int = 1) -> Decoder:
        return Decoder(model, rows, self.room, temperature)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.prompt.device).manual_seed(seed)

    @torch.inference_mode()
    def mean_overlap(self, args: Namespace, generator: torch.Generator) -> float:
        """The mean of sum min(p, q) along texts that the target wrote: two passes, no guessing.

        Chen et al. call it 1 - the total variation distance; it is the chance that a guess holds.
        """
        rows = self.prompt.expand(8, -1)
        texts = self.target.generate(rows, args.tokens, args.temperature, generator)
        p, q = (
            torch.softmax(model(texts)[:, PROMPT - 1 :] / args.temperature, dim=-1)
            for model in (self.target, self.draft)
        )
        return float(torch.minimum(p, q).sum(-1).mean())

    def steps(self, args: Namespace) -> dict[str, Callable[[], object]]:
        """A draft step, a target step, and passes that check k guesses, in the middle of a text.

        Each call does it STEPS times, so that it is long enough to be timed.
        """
        middle = PROMPT + args.tokens // 2
        tokens = torch.ones(1, middle + args.most + 1, dtype=torch.long, device=self.prompt.device)
        target, draft = (self.decoder(model, 1.0) for model in (self.target, self.draft))

        def step(decoder: Decoder, new: int) -> Callable[[], object]:
            def steps() -> None:
                for _ in range(STEPS):
                    decoder.rewind(middle)
                    decoder.probabilities(tokens[:, : middle + new])

            return steps

        for decoder in (target, draft):
            decoder.probabilities(tokens[:, :middle])

        checks = {f"check {k}": step(target, k + 1) for k in range(1, args.most + 1)}
        return {"draft": step(draft, 1), "target": step(target, 1), **checks}


def train_pair(run: Run, args: Namespace) -> Pair:
    """Train both on `--corpus`; the same seed gives the same pair."""
    torch.manual_seed(args.seed)
    tokens = data.prepare(args.corpus, VOCABULARY, CORPUS_BYTES)
    config = ModelConfig(
        VOCABULARY, args.hidden, 8 * args.hidden // 3, args.layers, args.hidden // 32,
        args.hidden // 32,
    )  # fmt: skip
    with torch.device(args.device):
        target = Llama(config)
    draft = first_layers(target, args.draft_layers)
    optimizer = torch.optim.AdamW(target.parameters(), LEARNING_RATE)
    order = torch.randperm(tokens.num_windows(SEQUENCE)).tolist()
    losses = []
    for step in run.progress(range(args.steps), "training"):
        first = step * args.batch_size
        places = [order[(first + i) % len(order)] for i in range(args.batch_size)]
        windows = torch.from_numpy(tokens.windows(places, SEQUENCE)).to(args.device)
        both = [model.loss(windows[:, :-1], windows[:, 1:]) for model in (target, draft)]
        optimizer.zero_grad()
        sum(both).backward()
        optimizer.step()
        losses.append([loss.item() for loss in both])
    run.metric("loss_of_the_target_after_training", losses[-1][0], "nats")
    run.metric("loss_of_the_draft_after_training", losses[-1][1], "nats")
    prompt = torch.from_numpy(tokens.validation.windows([0], PROMPT))[:, :-1].to(args.device)
    return Pair(target.eval(), draft.eval(), prompt, PROMPT + args.tokens + args.most + 2)


def first_layers(target: Llama, count: int) -> Llama:
    """A model whose parameters are the target's own: embedding, first layers, norm and head."""
    with torch.device("meta"):
        draft = Llama(replace(target.config, num_hidden_layers=count))
    draft.model.embed_tokens, draft.model.norm = target.model.embed_tokens, target.model.norm
    draft.model.layers = target.model.layers[:count]
    draft.lm_head = target.lm_head
    return draft
