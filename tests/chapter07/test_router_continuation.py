"""A worker breaks off in the middle of a stream: another one goes on, and the client sees one."""

import asyncio

import orjson
import pytest

from llm_router.continuation import Transcript, plan
from llm_router.http import chunk
from router_helper import (
    CHAT,
    CHUNKED_SSE,
    COMPLETIONS,
    Stream,
    piece,
    routed,
    run,
    scripted,
    until,
)

GREEDY = {"model": "fake", "temperature": 0, "max_tokens": 24}
SEEDED = {"model": "fake", "temperature": 1, "seed": 7, "max_tokens": 24}
TEXT = {"prompt": "w1 w2 w3"}
IDS = {"prompt": [1, 2, 3]}
MESSAGES = {"messages": [{"role": "user", "content": "w1 w2 w3"}]}


async def unbroken_and_broken(mode, path, body, after=9, **routing):
    """The same request to a well router, and while the first worker breaks off."""
    async with routed(2, **routing) as it:
        whole = await it.stream(path, **body)
        for fake in it.fakes:
            fake.engine.mode, fake.engine.after = mode, after
        asking = asyncio.ensure_future(it.stream(path, **body))
        while not it.router.cuts and not asking.done():
            await asyncio.sleep(0.001)
        for fake in it.fakes:
            fake.engine.mode = "ok"
        broken = await asking
        assert it.router.cuts >= 1
        return whole, broken, it


@pytest.mark.parametrize("mode", ["cut", "half-event"])
@pytest.mark.parametrize("asked", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    ("path", "prompt"), [(COMPLETIONS, TEXT), (COMPLETIONS, IDS), (CHAT, MESSAGES)],
    ids=["text", "token-ids", "chat"],
)  # fmt: skip
def test_a_stream_goes_on_with_the_same_text(mode, asked, path, prompt):
    async def test():
        body = {**asked, **prompt, "stream_options": {"include_usage": True}}
        whole, broken, it = await unbroken_and_broken(mode, path, body)
        assert broken.text == whole.text and len(broken.text.split()) == 24
        assert broken.reasons == ["length"] and len(broken.ids) == 1 and not broken.errors
        assert broken.usage == whole.usage
        assert it.router.lost == 0

    run(test)


@pytest.mark.parametrize("after", [0, 1, 23])
def test_wherever_it_breaks_off(after):
    async def test():
        whole, broken, _ = await unbroken_and_broken("cut", CHAT, {**GREEDY, **MESSAGES}, after)
        assert broken.text == whole.text and broken.reasons == ["length"]

    run(test)


def test_where_a_message_cannot_be_continued_it_is_asked_again():
    async def test():
        async with routed(3) as it:
            whole = await it.stream(CHAT, **GREEDY, **MESSAGES)
            it.fakes[0].engine.mode = "cut"
            for fake in it.fakes[1:]:
                fake.engine.mode = "no-continue"
            streams = [await it.stream(CHAT, **GREEDY, **MESSAGES) for _ in range(3)]
            assert it.router.cuts >= 1
            assert {stream.text for stream in streams} == {whole.text}
            assert it.router.lost == 0

    run(test)


def test_what_cannot_be_continued_ends_with_an_error_that_a_client_sees():
    async def test():
        body = {**TEXT, "model": "fake", "max_tokens": 24, "logprobs": 1, "n": 2}
        async with routed(1) as it:
            it.fakes[0].engine.mode = "cut"
            stream = await it.stream(**body)
            assert [error["code"] for error in stream.errors] == [502]
            assert it.router.lost == 1

    run(test)


def test_all_streams_survive_a_kill():
    async def test():
        async with routed(2, decode_ms=20.0) as it:
            asked = [
                it.stream(CHAT, **GREEDY, messages=[{"role": "user", "content": f"w{i}"}])
                for i in range(32)
            ]
            streaming = asyncio.gather(*asked)
            await until(lambda: it.fakes[0].engine.running == 16)
            await asyncio.sleep(0.1)
            it.fakes[0].kill()
            streams = await streaming
            assert all(len(s.text.split()) == 24 and not s.errors for s in streams)
            assert it.router.cuts > 8 and it.router.lost == 0
            it.fakes[1].args.decode_ms = 1.0
            again = [
                await it.stream(CHAT, **GREEDY, messages=[{"role": "user", "content": f"w{i}"}])
                for i in range(32)
            ]
            assert [s.text for s in again] == [s.text for s in streams]

    run(test)


def test_a_whole_answer_that_breaks_off_is_asked_again():
    async def test():
        async with routed(2) as it:
            body = {**TEXT, **GREEDY, "max_tokens": 2000}
            whole = (await it.ask(**body)).json()
            for fake in it.fakes:
                fake.args.decode_ms = 100
            asking = [asyncio.ensure_future(it.ask(**body)) for _ in range(8)]
            await asyncio.sleep(0.05)
            it.fakes[1].kill()
            for answer in await asyncio.gather(*asking):
                assert answer.status_code == 200
                assert answer.json()["choices"] == whole["choices"]

    run(test)


def test_a_long_transcript_keeps_its_text_only(monkeypatch):
    monkeypatch.setattr("llm_router.continuation.FOLD_BYTES", 1000)
    transcript = Transcript()
    for i in range(100):
        event = b'data: {"id": "a", "choices": [{"index": 0, "text": " w%d"}]}\n\n' % i
        transcript.append(chunk(event))
        assert sum(map(len, transcript._raw)) <= 1000
    transcript.fold()
    assert transcript.text.split() == [f"w{i}" for i in range(100)]
    assert transcript.tokens == 100 and transcript.first == {"id": "a"}


def transcript_of(*events):
    transcript = Transcript()
    transcript.append(b"".join(map(chunk, events)))
    return transcript


@pytest.mark.parametrize(
    ("more", "how"),
    [
        ({}, "continued"),
        ({"max_tokens": "8"}, "replayed"),
        ({"min_tokens": "6"}, "replayed"),
        ({"response_format": {"type": "json_object"}}, "replayed"),
        ({"response_format": None, "logprobs": False, "tools": []}, "continued"),
        ({"guided_json": {}, "guided_regex": "a*"}, "replayed"),
        ({"regex": "a*", "temperature": 1}, "given up"),
        ({"regex": "a*", "temperature": 1, "seed": 1}, "replayed"),
        ({"frequency_penalty": 0.5}, "replayed"),
        ({"frequency_penalty": 0, "repetition_penalty": 1.0}, "continued"),
        ({"max_completion_tokens": None, "max_tokens": 9}, "continued"),
    ],
)
def test_only_what_is_known_to_be_safe_is_continued(more, how):
    so_far = transcript_of(piece("w1"), piece(" w2"))
    splice = plan(CHAT, {"model": "fake", "temperature": 0, **MESSAGES, **more}, so_far, None)
    assert how == ("given up" if splice is None else ["continued", "replayed"][splice.replay])
    if how == "continued" and "max_tokens" in more:
        assert orjson.loads(splice.body)["max_tokens"] == 7


@pytest.mark.parametrize(
    ("content", "flag", "texts"),
    [
        ("x", True, ["x w1"]),
        ("x", False, ["x", " w1"]),
        ([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}], True, ["xy w1"]),
        ([{"type": "image_url", "image_url": {}}], True, None),
        ([], None, [[], " w1"]),
    ],
)
def test_the_clients_own_last_message(content, flag, texts):
    messages = [{"role": "assistant", "content": content}]
    request = {"messages": messages, "temperature": 0, "continue_final_message": flag}
    splice = plan(CHAT, request, transcript_of(piece(" w1")), None)
    if texts is None:
        assert splice.replay
    else:
        body = orjson.loads(splice.body)
        assert [message["content"] for message in body["messages"]] == texts
        assert body["continue_final_message"] is True


def test_where_the_engine_counts_its_tokens_it_is_believed():
    usage = {"usage": {"completion_tokens": 4}}
    assert plan(COMPLETIONS, {**GREEDY, **TEXT}, transcript_of(piece("a b c d", **usage)), None)
    so_far = transcript_of(piece("a b c d", **usage))
    so_far.fold()
    assert so_far.tokens == 4


@pytest.mark.parametrize(
    "event", [b'{"choices": ["x"]}', b'{"choices": 3}', b'{"choices": [{"delta": [1]}]}',
              b'{"choices": [], "usage": 5}', b'{"choices": [{"text": 5}]}'],
)  # fmt: skip
def test_json_of_another_shape_ends_in_an_error_at_once(event):
    async def test():
        events = [CHUNKED_SSE, chunk(piece("w1")), chunk(b"data: " + event + b"\n\n"), None]
        async with scripted(events, events) as it:
            text = (await it.ask(**GREEDY, **TEXT, stream=True)).text
            assert '"code":502' in text and text.endswith("data: [DONE]\n\n")
            assert it.router.lost == 1

        async with scripted([*events[:2], None], events) as it:  # in what goes on from it
            text = (await it.ask(**GREEDY, **TEXT, stream=True)).text
            assert '"code":502' in text and text.endswith("data: [DONE]\n\n")

    run(test)


def test_the_strict_reader_of_these_tests_sees_half_an_event():
    with pytest.raises(AssertionError):
        Stream('data: {"a": 1}\n\ndata: {"b"')
