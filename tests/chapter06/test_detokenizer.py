"""Text in pieces is the text: for any tokens, any kind of tokenizer, and around stop strings."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from paged_engine.detokenizer import IncrementalDetokenizer

TEXT = "Straße 中文字符，和标点。 😀👩‍👩‍👧 café naïve — the quick brown fox don't  two  spaces\n\n"
WORDS = ["▁", "▁the", "▁fox", "s", "th", "e", "é", "中", "▁中文", "\n", "▁▁", ",", "字"]


def byte_level():
    """BPE on bytes, with merges across characters, one special and two added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool 中>"), AddedToken("plain")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sentencepiece_like():
    """As Llama 2's: spaces are ▁, a text's first one is dropped, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>")
    model.byte_fallback = True
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace():
    """Without bytes: a character that the vocabulary lacks is unknown."""
    pieces = ["<unk>", "</s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {make.__name__: make() for make in (byte_level, sentencepiece_like, metaspace)}
names = st.sampled_from(sorted(TOKENIZERS))
choices = st.lists(st.integers(0, 10**6), max_size=40)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*(detokenizer.append(token) for token in ids), detokenizer.finish()], detokenizer


def tokens_of(tokenizer, numbers):
    return [number % len(tokenizer) for number in numbers]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(names, choices)
@example("byte_level", [0, 401, 400, 200, 402, 150])
@example("sentencepiece_like", [3 + 0xE4, 3 + 0xB8, 3 + 0xAD, 3 + 0xE4, 260, 3 + 0xF0, 1, 3 + 0x9F])
@example("sentencepiece_like", [259, 260, 1, 260])
def test_the_pieces_of_any_tokens_make_the_decoded_text(name, numbers):
    tokenizer = TOKENIZERS[name]
    ids = tokens_of(tokenizer, numbers)
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(["byte_level", "sentencepiece_like"]), st.text(max_size=20))
@example("byte_level", "😀👩‍👩‍👧 中文，é")
@example("sentencepiece_like", "😀👩‍👩‍👧 中文，é the fox")
def test_no_piece_of_a_text_has_a_part_of_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    pieces, _ = pieces_of(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(names, choices, choices)
def test_an_output_continues_its_prompt(name, prompt, numbers):
    tokenizer = TOKENIZERS[name]
    prompt, ids = tokens_of(tokenizer, prompt), tokens_of(tokenizer, numbers)
    if name == "sentencepiece_like":  # a character half of which is the prompt's has no place
        prompt = [token for token in prompt if not 3 <= token < 259]
    if name == "byte_level":
        prompt = []
    pieces, _ = pieces_of(tokenizer, ids, prompt_ids=prompt)
    assert decode(tokenizer, prompt) + "".join(pieces) == decode(tokenizer, prompt + ids)


def test_a_words_leading_space_depends_on_what_is_before_it():
    tokenizer = TOKENIZERS["sentencepiece_like"]
    fox = tokenizer.convert_tokens_to_ids("▁fox")
    assert pieces_of(tokenizer, [fox, 1, fox])[0] == ["fox", "", " fox", ""]
    assert pieces_of(tokenizer, [fox], prompt_ids=[1, fox])[0] == [" fox", ""]
    assert pieces_of(tokenizer, [fox], prompt_ids=[1])[0] == ["fox", ""]


def cut(text, stops):
    """`text` up to the stop string that is complete first; read letter by letter."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], max(done, key=len)
    return text, None


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.text("ab😀", max_size=30),
    st.lists(st.text("ab😀", min_size=1, max_size=5), min_size=1, max_size=3),
)
@example("aaab", ["aab"])
@example("a😀b", ["😀"])
@example("abab", ["babb", "abab"])
def test_stop_strings_over_several_tokens_are_held_back_and_cut(text, stops):
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer, shown = IncrementalDetokenizer(tokenizer, stops), ""
    expected, stop = cut(text, stops)
    ids = tokenizer.encode(text)
    for count, token in enumerate(ids, 1):
        shown += detokenizer.append(token)
        assert expected.startswith(shown), "more was shown than may be"
        certain = decode(tokenizer, ids[:count]).rstrip("\ufffd")
        held = expected.startswith(certain) and certain[len(shown) :]
        assert not held or any(s.startswith(held) for s in stops), "held back without a reason"
    shown += detokenizer.finish()
    assert (shown, detokenizer.stopped) == (expected, stop)
    assert stop is None or detokenizer.append(5) == detokenizer.finish() == ""


def test_a_stop_string_in_bytes_held_to_the_end_is_found():
    tokenizer = TOKENIZERS["sentencepiece_like"]
    emoji = [3 + byte for byte in "a😀".encode()]
    pieces, detokenizer = pieces_of(tokenizer, emoji, stop=["😀"])
    assert ("".join(pieces), detokenizer.stopped) == ("a", "😀")


def test_stop_strings_wait_for_min_tokens():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcabcab"]
    pieces, detokenizer = pieces_of(tokenizer, ids, stop=["bc"], min_tokens=2)
    assert ("".join(pieces), detokenizer.stopped) == ("abca", "bc")


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_token_costs_the_same_at_any_length(name, monkeypatch):
    """Counts the tokens that the library decodes, where it is asked at all."""
    tokenizer, decoded = TOKENIZERS[name], []
    detokenizer = IncrementalDetokenizer(tokenizer)
    vocabulary = getattr(detokenizer._decoder, "_vocabulary", None)
    if vocabulary is not None:
        own = vocabulary.decode
        monkeypatch.setattr(vocabulary, "decode", lambda ids: decoded.append(len(ids)) or own(ids))
    ids = tokens_of(tokenizer, range(0, 7 * 3000, 7))
    for token in ids:
        detokenizer.append(token)
    assert sum(decoded) <= 6 * len(ids)


def test_a_tokenizer_of_the_tokenizers_library_will_do():
    tokenizer = TOKENIZERS["byte_level"].backend_tokenizer
    ids = tokenizer.encode("café 中").ids
    assert "".join(pieces_of(tokenizer, ids)[0]) == "café 中"
