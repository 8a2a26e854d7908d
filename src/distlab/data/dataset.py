"""From a corpus's name to opened tokens, and the flags that name one."""

import argparse
import hashlib
from pathlib import Path

from distlab.data.corpus import corpus_digest, read_corpus, split_documents
from distlab.data.shards import SHARD_BYTES, write_shards
from distlab.data.tokenizer import train_tokenizer
from distlab.data.tokens import Tokens, open_tokens
from distlab.files import cache_dir


def prepare(
    corpus: str = "stdlib",
    vocab_size: int = 512,
    max_bytes: int | None = None,
    workers: int = 1,
    cache: str | Path | None = None,
) -> Tokens:
    """Tokenize `corpus` (see `read_corpus`) into shards in the cache; its training split, opened.

    `.validation` of the result is the other split, on which the tokenizer was not trained. The
    second call with the same text finds everything there. Any number of processes may call it at
    once: one writes, the others wait.
    """
    cache = Path(cache or cache_dir())
    documents = read_corpus(corpus, max_bytes)
    tokenizer = train_tokenizer(split_documents(documents)[0], vocab_size, cache)
    identity = f"{corpus_digest(documents)} {vocab_size} {SHARD_BYTES} {tokenizer.to_str()}"
    directory = cache / "tokens" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    write_shards(documents, tokenizer, vocab_size, directory, workers)
    return open_tokens(directory)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """--corpus, --corpus-mb, --seq-len and --batch-size; a script's preset gives the sizes."""
    from distlab.script import positive_float, positive_int

    group = parser.add_argument_group("data")
    group.add_argument("--corpus", default="stdlib", help="stdlib, a folder of text, or hf:NAME")
    group.add_argument(
        "--corpus-mb", type=positive_float, metavar="MB", help="read the first MB megabytes of it"
    )
    group.add_argument("--seq-len", type=positive_int, metavar="T", help="tokens of a sequence")
    group.add_argument(
        "--batch-size", type=positive_int, metavar="B", help="sequences of all ranks together"
    )


def prepare_from_args(args: argparse.Namespace, vocab_size: int, workers: int = 1) -> Tokens:
    """`prepare` as the flags of `add_data_flags` say."""
    max_bytes = None if args.corpus_mb is None else int(args.corpus_mb * 1e6)
    return prepare(args.corpus, vocab_size, max_bytes, workers)
