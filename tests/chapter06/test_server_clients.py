"""What real clients send and read: values that ask for nothing, templates, browsers, logprobs."""

import json

import openai.types.chat as chat_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from distlab.errors import UsageError
from fake_engine import fake_engine
from paged_engine.detokenizer import IncrementalDetokenizer, TokenTexts
from paged_engine.llm import LLM
from paged_engine.protocol import ChatRequest, CompletionRequest, Message, StreamOptions, TextPart
from paged_engine.sampler import SampledToken
from paged_engine.sampling_params import SamplingParams
from paged_engine.streaming import _by_text
from server_helper import CHAT, COMPLETIONS, ask
from test_detokenizer import TOKENIZERS, byte_level, choices, decode, names

HELLO = [{"role": "user", "content": "hello"}]
REFUSED_UNLESS_NULL = {  # fields of OpenAI's that have no value which asks for nothing
    "audio", "prediction", "web_search_options", "moderation",
}  # fmt: skip


def fields_of(kind: type) -> set[str]:
    """Of a TypedDict of the official client, with those that it inherits."""
    bases = getattr(kind, "__orig_bases__", ())
    inherited = (fields_of(base) for base in bases if hasattr(base, "__annotations__"))
    return set(kind.__annotations__).union(*inherited)


@pytest.mark.parametrize(
    ("theirs", "ours", "without"),
    [
        (chat_create_params.CompletionCreateParamsNonStreaming, ChatRequest, REFUSED_UNLESS_NULL),
        (completion_create_params.CompletionCreateParamsNonStreaming, CompletionRequest, set()),
        (chat_types.ChatCompletionStreamOptionsParam, StreamOptions, set()),
        (chat_types.ChatCompletionUserMessageParam, Message, set()),
        (chat_types.ChatCompletionAssistantMessageParam, Message, set()),
        (chat_types.ChatCompletionSystemMessageParam, Message, set()),
        (chat_types.ChatCompletionContentPartTextParam, TextPart, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_field_of_the_official_client_is_known(theirs, ours, without):
    """Taken, or named with the values that ask for nothing; a new one of theirs fails here."""
    assert fields_of(theirs) - set(ours.model_fields) - set(ours.neutral) == without


EMPTY = [
    {"tools": None}, {"tools": []}, {"tool_choice": "auto"}, {"response_format": {"type": "text"}},
    {"logit_bias": {}}, {"logit_bias": None}, {"functions": []}, {"modalities": ["text"]},
    {"store": False}, {"metadata": {"team": "a"}}, {"service_tier": "auto"}, {"audio": None},
    {"stop": ""}, {"stop": []}, {"stop": None}, {"top_logprobs": 0}, {"stream_options": {}},
    {"stream_options": {"include_usage": False}}, {"stream_options": {"include_obfuscation": None}},
    {"prompt_cache_key": "k"}, {"some_vendors_field": None}, {"n": None}, {"temperature": None},
]  # fmt: skip


@pytest.mark.parametrize("field", EMPTY, ids=str)
def test_what_asks_for_nothing_is_as_if_it_were_not_there(field):
    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0}
    plain, given = ask(CHAT, body), ask(CHAT, body | field)
    assert given.status_code == 200, given.text
    if "temperature" not in field:
        assert given.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("field", ["suffix", "best_of", "echo", "logit_bias"])
def test_so_it_is_in_a_completion(field):
    neutral = {"suffix": "", "best_of": 1, "echo": False, "logit_bias": {}}[field]
    for value in (None, neutral):
        assert ask(COMPLETIONS, {"prompt": "a", field: value}).status_code == 200


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 100}},
        {"modalities": ["audio"]},
        {"stream_options": {"include_obfuscation": True}},
        {"prediction": {}},
    ],
    ids=str,
)
def test_what_asks_for_something_that_is_not_here_is_named(field):
    refused = ask(CHAT, {"messages": HELLO, **field})
    (name,) = field
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert "include_obfuscation" in error["message"] or (error["param"] == name)


def test_a_history_of_the_clients_own_messages_is_taken():
    """`model_dump()` of what the server said: refusal, annotations, tool_calls, all null."""
    said = chat_types.ChatCompletionMessage(role="assistant", content="hi").model_dump()
    assert said["refusal"] is None and said["tool_calls"] is None
    assert ask(CHAT, {"messages": [*HELLO, said, *HELLO]}).status_code == 200


def test_of_several_chat_templates_the_default_one_is_used_online_and_offline():
    def engine():
        made = fake_engine()
        template = made.tokenizer.chat_template
        made.tokenizer.chat_template = {"tool_use": "{{ 1 }}", "default": template}
        return made

    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0}
    online = ask(CHAT, body, {"engine": engine()})
    assert online.status_code == 200, online.text
    greedy = SamplingParams(max_tokens=4, temperature=0)
    offline = LLM(engine=engine()).chat(HELLO, greedy)[0]
    assert online.json()["choices"][0]["message"]["content"] == offline.outputs[0].text


def test_half_of_a_surrogate_pair_is_one_line_offline_too():
    llm = LLM(engine=fake_engine())
    with pytest.raises(UsageError, match=r"half of a surrogate pair, U\+D83D, as its character 1"):
        llm.generate("a\ud83d")
    with pytest.raises(UsageError, match="surrogate"):
        llm.chat([{"role": "user", "content": "\udc00"}])


def test_a_browsers_page_may_ask_where_its_origin_is_allowed():
    key = {"api_key": "sesame", "cors_origins": ["https://a.example"]}
    headers = {"origin": "https://a.example", "authorization": "Bearer sesame"}
    allowed = ask(COMPLETIONS, {"prompt": "a"}, key, headers=headers)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    refused = ask(COMPLETIONS, {"prompt": "a"}, key, headers={"origin": "https://a.example"})
    assert refused.status_code == 401  # and the page can read why
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = ask(
        COMPLETIONS, {"prompt": "a"}, key, headers=headers | {"origin": "https://b.example"}
    )
    assert "access-control-allow-origin" not in other.headers
    none = ask(COMPLETIONS, {"prompt": "a"}, headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in none.headers


def test_a_stop_string_that_is_a_special_token_stops():
    engine = fake_engine(eos_bias=4.0)  # <|endoftext|> is likely
    greedy = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    (ran,) = LLM(engine=engine).generate("hello", greedy)
    assert 0 in ran.outputs[0].token_ids[:-1]
    stopping = SamplingParams(
        max_tokens=200, temperature=0, ignore_eos=True, stop=["<|endoftext|>", "zzzzzz"]
    )
    (stopped,) = LLM(engine=engine).generate("hello", stopping)
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].token_ids == ran.outputs[0].token_ids[
        : ran.outputs[0].token_ids.index(0) + 1
    ]  # fmt: skip


def test_the_tokenizers_end_ends_an_answer_too():
    """A fine-tuned model's tokenizer ends turns by a token that its config.json does not name."""
    engine = fake_engine()
    assert engine.eos_token_ids >= {engine.tokenizer.eos_token_id}
    engine.tokenizer.eos_token = "e"
    del engine.eos_token_ids
    assert engine.eos_token_ids == engine.runner.eos_token_ids | {
        engine.tokenizer.convert_tokens_to_ids("e")
    }


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([1.5, 2], "token id 1.5 is no integer"),
        ([1, True], "token id True is no integer"),
        ([1, "a"], "token id 'a' is no integer"),
        ([1, None], "token id None is no integer"),
        ([1.0], "is no text and no list"),
        (5, "5"),
    ],
)
def test_ids_that_are_no_integers_are_one_line(prompt, words):
    with pytest.raises(UsageError, match=words):
        fake_engine().encode(prompt) if prompt != [1.0] else LLM(engine=fake_engine()).generate(
            prompt
        )


def test_ids_in_arrays_are_ids():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    engine = fake_engine()
    assert engine.encode(numpy.array([1, 2])) == engine.encode(torch.tensor([1, 2])) == [1, 2]
    assert {type(token) for token in engine.encode(numpy.array([1, 2]))} == {int}
    for wrong in (numpy.array([1.0, 2.0]), numpy.array([[1, 2], [3, 4]])):
        with pytest.raises(UsageError, match="is no integer"):
            engine.encode(wrong)
    two = LLM(engine=engine).generate(numpy.array([5, 6]), SamplingParams(max_tokens=2))
    assert len(two) == 1 and two[0].prompt_token_ids == [5, 6]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(name=names, prompt=choices, output=choices)
def test_the_tokens_bytes_joined_are_the_text(name, prompt, output):
    tokenizer = TOKENIZERS[name]
    ids = [[i % len(tokenizer) for i in row] for row in (prompt, output)]
    place, detokenizer = TokenTexts(tokenizer, ids[0]), IncrementalDetokenizer(
        tokenizer, (), ids[0]
    )  # fmt: skip
    text, joined = "", b""
    for token in ids[1]:
        joined += place.read(token)[1] or b""
        place.take(token)
        text += detokenizer.append(token)
    text += detokenizer.finish()
    try:
        assert joined.decode() == text
    except UnicodeDecodeError:  # bytes that are no character: how many U+FFFD is the decoder's
        assert "\ufffd" in text


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(text=st.text(max_size=30), name=st.sampled_from(["byte_level", "sentencepiece_like"]))
def test_so_are_those_of_any_text(text, name):
    tokenizer = TOKENIZERS[name]
    text = text.encode(errors="ignore").decode()
    ids = tokenizer.encode(text, add_special_tokens=False)
    place, joined = TokenTexts(tokenizer), b""
    for token in ids:
        joined += place.read(token)[1] or b""
        place.take(token)
    assert joined.decode() == decode(tokenizer, ids)
    assert place.characters == len(joined.decode())


def test_a_part_of_a_character_has_its_own_bytes_and_a_space_is_kept():
    tokenizer = byte_level()
    place = TokenTexts(tokenizer)
    first = tokenizer.encode("\U0001f980", add_special_tokens=False)[0]  # a crab, not in the merges
    assert place.read(first)[0].startswith("bytes:\\xf0") and place.read(first)[1][:1] == b"\xf0"
    pieces = TOKENIZERS["sentencepiece_like"]
    the, fox = pieces.convert_tokens_to_ids(["▁the", "▁fox"])
    place = TokenTexts(pieces, [the])
    assert place.read(fox) == (" fox", b" fox")
    assert TokenTexts(pieces).read(fox) == ("fox", b"fox")  # a text's first space is dropped
    assert place.read(pieces.eos_token_id) == ("</s>", None)


def test_alternatives_that_read_alike_keep_their_values():
    tokenizer = byte_level()
    added = tokenizer.convert_tokens_to_ids("plain")
    place = TokenTexts(tokenizer)

    class Alike:
        characters = 0

        def read(self, token):
            return ("same", b"same") if token in (1, 2) else place.read(token)

        def take(self, token):
            pass

    sampled = SampledToken(2, -2.0, {1: -1.0, added: -1.5})
    assert _by_text(sampled, Alike()) == {"token_id:1": -1.0, "plain": -1.5, "same": -2.0}


def test_logprobs_of_a_chat_are_its_contents_bytes():
    body = {"messages": HELLO, "max_tokens": 40, "logprobs": True, "top_logprobs": 2, "seed": 1}
    choice = ask(CHAT, body | {"temperature": 2}).json()["choices"][0]
    joined = b"".join(bytes(one["bytes"] or ()) for one in choice["logprobs"]["content"])
    assert joined.decode(errors="replace") == choice["message"]["content"]


def test_offsets_of_a_completion_count_its_characters():
    body = {"prompt": "a", "max_tokens": 60, "logprobs": 1, "seed": 1, "temperature": 2}
    choice = ask(COMPLETIONS, body).json()["choices"][0]
    told, text = choice["logprobs"], choice["text"]
    for offset, token in zip(told["text_offset"], told["tokens"], strict=True):
        if not token.startswith("bytes:") and len(token.encode()) == len(token):
            assert text[offset : offset + len(token)] == token


def test_a_schema_says_what_is_taken():
    properties = ChatRequest.model_json_schema()["properties"]
    assert properties["tools"] == {"enum": [[], None]}
    json.dumps(properties)
