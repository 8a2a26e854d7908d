"""Real text for every chapter: corpus, byte-level BPE tokenizer, token shards, and a loader."""

from typing import TYPE_CHECKING, Any

from distlab.data.corpus import corpus_digest, read_corpus, split_documents
from distlab.data.dataset import add_data_flags, prepare, prepare_from_args
from distlab.data.shards import Written, write_shards
from distlab.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, train_tokenizer
from distlab.data.tokens import Tokens, open_tokens

if TYPE_CHECKING:
    from distlab.data.loader import Loader

__all__ = [
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "Loader",
    "Tokens",
    "Written",
    "add_data_flags",
    "corpus_digest",
    "open_tokens",
    "prepare",
    "prepare_from_args",
    "read_corpus",
    "split_documents",
    "train_tokenizer",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    """`Loader`, imported when it is used: it needs torch, which the shard workers do without."""
    if name == "Loader":
        from distlab.data.loader import Loader

        return Loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
