"""A byte-level BPE tokenizer, trained once for a text and a vocabulary size."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from distlab.data.corpus import corpus_digest
from distlab.errors import RunError, UsageError
from distlab.files import atomic_write, cache_dir

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
SMALLEST_VOCABULARY = 257  # every byte, and the end-of-text token
_FORMAT = 1  # raised when the same text would give another tokenizer
_TRAINING_BYTES = 16_000_000  # more text hardly changes the merges, and takes longer


def train_tokenizer(
    documents: Sequence[str], vocab_size: int, cache: str | Path | None = None
) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2) on `documents`.

    Every text can be encoded, and decoding gives it back exactly. Token 0 is `<|endoftext|>`; a
    text that spells it out is encoded letter by letter. A short text may have fewer merges than
    `vocab_size` wants; the ids above are unused then. Kept in `cache` (default: the user's cache)
    under the hash of text and size; two processes at once write the same file.

    Raises `UsageError` for a vocabulary below 257, `RunError` for an unreadable cached file.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"--vocab-size {vocab_size} leaves no room for 256 bytes and the end-of-text token; "
            f"use {SMALLEST_VOCABULARY} or more"
        )
    text = _first_documents(documents, _TRAINING_BYTES)
    key = hashlib.sha256(f"{_FORMAT} {vocab_size} {corpus_digest(text)}".encode()).hexdigest()
    path = Path(cache or cache_dir()) / "tokenizers" / f"{key[:32]}.json"
    if not path.exists():
        trained = _train(text, vocab_size)
        with atomic_write(path) as temporary:
            trained.save(str(temporary))
    return load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json. Raises `RunError` when it is missing or damaged."""
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"the tokenizer {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the library raises Exception itself
        raise RunError(f"the tokenizer {path} is damaged; delete it and run again") from error
    tokenizer.encode_special_tokens = True  # a text that spells out a special token stays text
    return tokenizer


def _first_documents(documents: Sequence[str], max_bytes: int) -> list[str]:
    kept: list[str] = []
    total = 0
    for document in documents:
        if kept and total >= max_bytes:
            break
        kept.append(document)
        total += len(document.encode())
    return kept


def _train(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
