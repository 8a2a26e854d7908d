"""Text from tokens, as they come: never a part of a character, and never a part of a stop string.

A character may be spread over several tokens, and what a token looks like may depend on its
neighbours, so that decoding tokens one by one gives a wrong text. Decoding all of them again for
each new one gives the right text, in time that grows with the square of its length. Both classes
of decoders here need a constant time for each token:

- A byte-level tokenizer (GPT-2, Llama 3, SmolLM, Qwen) is a table of byte strings, and the text is
  their concatenation read as UTF-8.
- For any other (such as Llama 2's, in the manner of SentencePiece) the latest tokens are decoded
  together with the one before them, which settles whether a leading space belongs there.
"""

import codecs
import json
from collections.abc import Sequence as List
from functools import lru_cache
from typing import Any

INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no character
MOST_BYTES = 8  # tokens of single bytes before a token that are enough to read it


class IncrementalDetokenizer:
    """The text of one sequence's output.

    All that `append` and `finish` return makes `tokenizer.decode(ids, skip_special_tokens=True)`,
    cut before the stop string that is complete first; no clean-up of spaces is done. With
    `prompt_ids` it is the text by which the output continues the prompt's, which matters for
    tokenizers that give a text's first word no leading space. `tokenizer`: transformers', of any
    kind, or a `tokenizers.Tokenizer`. Stop strings are not looked for in the text of the first
    `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: List[str] = (),
        prompt_ids: List[int] = (),
        min_tokens: int = 0,
    ) -> None:
        vocabulary = _vocabulary(tokenizer)
        self._decoder: _ByteDecoder | _WindowDecoder
        if vocabulary.byte_level:
            self._decoder = _ByteDecoder(vocabulary)
        else:
            self._decoder = _WindowDecoder(vocabulary, prompt_ids)
        self._stops = tuple(stop)
        self._unchecked = min_tokens
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self.stopped: str | None = None  # the stop string that ended the text

    def append(self, token_id: int) -> str:
        """The text that is certain now, and was not before; "" once it has `stopped`."""
        if self.stopped is not None:
            return ""
        piece = self._decoder.push(token_id)
        if self._unchecked:
            self._unchecked -= 1
            return piece
        return self._without_stop(piece) if self._stops and piece else piece

    def finish(self) -> str:
        """What was held back, now that no token follows; may find a stop string too."""
        if self.stopped is not None:
            return ""
        text = self._without_stop(self._decoder.flush())
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _without_stop(self, piece: str) -> str:
        text = self._held + piece
        ends = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, start, self.stopped = min(ends)
            return text[:start]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]


class TokenTexts:
    """What the tokens of one output add to its text, each in its place.

    A token is not its lone decoding: SentencePiece's " the" would lose its space, and a part of a
    character would become U+FFFD. So a token is read after those before it. The bytes of all tokens
    that were `taken`, joined, are the output's text in UTF-8 (where that text is valid: a decoder
    writes U+FFFD for bytes that are no character).
    """

    def __init__(self, tokenizer: Any, prompt_ids: List[int] = ()) -> None:
        self._vocabulary = _vocabulary(tokenizer)
        self._before = _WindowDecoder(self._vocabulary, prompt_ids).context
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.characters = 0  # of the tokens taken so far

    def read(self, token_id: int) -> tuple[str, bytes | None]:
        """How the token reads, were it the next one, and its bytes.

        A special token has its name and no bytes; for a part of a character the API's reading is
        `bytes:` and the bytes in hexadecimal digits, as `bytes:\\xe2\\x82`.
        """
        made = self._bytes_of(token_id)
        if made is None:
            return self._vocabulary.decode([token_id]), None
        try:
            return made.decode(), made
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in made), made

    def take(self, token_id: int) -> None:
        """The output has this token now."""
        made = self._bytes_of(token_id)
        if made is None:
            return
        whole = made and token_id not in self._vocabulary.byte_tokens
        self._before = [token_id] if whole else [*self._before[-MOST_BYTES:], token_id]
        self.characters += len(self._utf8.decode(made))

    def _bytes_of(self, token_id: int) -> bytes | None:
        vocabulary = self._vocabulary
        if token_id in vocabulary.special:
            return None
        if vocabulary.byte_level:
            return vocabulary.bytes_of(token_id)
        if token_id in vocabulary.byte_tokens:
            return bytes([vocabulary.byte_tokens[token_id]])
        known = vocabulary.decode(self._before)
        return vocabulary.decode([*self._before, token_id])[len(known) :].encode()


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Vocabulary:
    """What the decoders need to know of a tokenizer, looked up once and shared."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.tokenizer = tokenizer
        self.is_fast = hasattr(self.backend, "id_to_token")
        kinds = _decoder_kinds(self.backend.decoder) if self.is_fast else set()
        self.byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self.special = self._special_ids()
        self.byte_tokens = self._byte_tokens() if "ByteFallback" in kinds else {}
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a byte-level token; none for an id that the tokenizer does not have."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_bytes(token_id)
        return found

    def decode(self, ids: list[int]) -> str:
        if self.is_fast:
            return self.backend.decode(ids, skip_special_tokens=False)
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _read_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None or token_id in self.special:
            return b""
        try:
            return bytes(_byte_of_character()[character] for character in token)
        except KeyError:  # an added token, which stands for itself
            return token.encode()

    def _special_ids(self) -> frozenset[int]:
        if not self.is_fast:
            return frozenset(self.tokenizer.all_special_ids)
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def _byte_tokens(self) -> dict[int, int]:
        """Token id -> its byte."""
        found = {self.backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return {token_id: byte for token_id, byte in found.items() if token_id is not None}


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> _Vocabulary:
    return _Vocabulary(tokenizer)


def _decoder_kinds(decoder: Any) -> set[str]:
    """The types of the steps by which a tokenizer of `tokenizers` decodes."""
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The printable character by which a byte-level tokenizer writes each byte (GPT-2's table).

    Bytes that are printable in Latin-1 stand for themselves; the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class _ByteDecoder:
    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._bytes_of = vocabulary.bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Decodes the `pending` tokens after the last one whose text is out, the `context`."""

    def __init__(self, vocabulary: _Vocabulary, prompt_ids: List[int]) -> None:
        self._vocabulary = vocabulary
        self._pending: list[int] = []
        last = next((i for i in reversed(prompt_ids) if i not in vocabulary.special), None)
        self.context = [] if last is None or last in vocabulary.byte_tokens else [last]

    def push(self, token_id: int) -> str:
        if token_id in self._vocabulary.special:
            return ""
        self._pending.append(token_id)
        if token_id in self._vocabulary.byte_tokens:
            return ""  # the next byte decides whether all of this run are characters
        text = self._text_of_pending()
        return "" if text.endswith(INCOMPLETE) else self._release(text)

    def flush(self) -> str:
        return self._release(self._text_of_pending())

    def _text_of_pending(self) -> str:
        known = self._vocabulary.decode(self.context)
        return self._vocabulary.decode(self.context + self._pending)[len(known) :]

    def _release(self, text: str) -> str:
        if text:
            self.context, self._pending = [self._pending[-1]], []
        return text
