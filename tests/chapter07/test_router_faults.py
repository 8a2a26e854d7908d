"""Workers that die, hang, refuse, or talk nonsense; and clients that leave or ask too much."""

import asyncio
import errno

import httpx
import pytest

from llm_router.health import models_of
from llm_router.http import LAST_CHUNK, chunk
from llm_router.worker import Worker
from router_helper import CHUNKED_SSE, Fake, Stream, piece, routed, run, scripted, until

BODY = {"model": "fake", "prompt": "w1 w2", "max_tokens": 4, "temperature": 0}


async def ask_many(it, count, **body):
    return await asyncio.gather(*(it.ask(**{**BODY, **body}) for _ in range(count)))


def test_a_killed_worker_costs_no_answer_and_is_used_again_when_it_returns():
    async def test():
        async with routed(2, decode_ms=30.0) as it:
            asking = asyncio.ensure_future(ask_many(it, 32))
            await until(lambda: it.fakes[0].engine.running > 4)
            it.fakes[0].kill()
            assert {answer.status_code for answer in await asking} == {200}
            assert {answer.status_code for answer in await ask_many(it, 8)} == {200}
            await it.fakes[0].start()
            assert await until(lambda: it.workers[0].usable) < 5
            await ask_many(it, 4)
            assert it.fakes[0].engine.requests > 1  # one was the probe's

    run(test)


def test_a_hanging_worker_is_noticed_though_its_health_is_well():
    async def test():
        async with routed(2) as it:
            it.fakes[0].engine.mode = "hang"
            answers = await ask_many(it, 8)  # half of them hang, and are asked again elsewhere
            assert {answer.status_code for answer in answers} == {200}
            assert max(answer.elapsed.total_seconds() for answer in answers) < 3
            assert it.workers[0].state == "hung"
            before = it.fakes[0].engine.requests
            await ask_many(it, 8)
            assert it.workers[0].requests <= before  # only probes go there
            it.fakes[0].engine.mode = "ok"
            await until(lambda: it.workers[0].usable)

    run(test)


def test_a_worker_that_falls_silent_in_its_streams_is_left():
    async def test():
        async with routed(2) as it:
            whole = await it.stream(**{**BODY, "max_tokens": 12})
            it.fakes[0].engine.mode = "silent"
            streams = await asyncio.gather(
                *(it.stream(**{**BODY, "max_tokens": 12}) for _ in range(4))
            )
            assert {stream.text for stream in streams} == {whole.text}

    run(test)


def test_a_slow_worker_that_answers_probes_is_not_thought_to_hang():
    async def test():
        async with routed(2, decode_ms=800.0, per_token=False) as it:
            it.fakes[1].args.decode_ms = 1.0
            answers = await ask_many(it, 2, max_tokens=1)
            assert {answer.status_code for answer in answers} == {200}
            assert it.workers[0].state == "up" and it.router.retries == 0

    run(test)


def test_a_long_prompt_is_no_hang():
    async def test():
        settings = {"hang_after": 0.2, "probe_timeout": 0.2}
        async with routed(2, settings=settings, prefill_us=200.0) as it:
            prompt = " ".join(f"w{i}" for i in range(5000))  # a second
            answer = await it.ask(**{**BODY, "prompt": prompt})
            assert answer.status_code == 200
            assert it.router.retries == 0 and [w.failures for w in it.workers] == [0, 0]

    run(test)


def test_a_request_that_was_moved_from_all_stays_where_it_is():
    async def test():
        settings = {"hang_after": 0.1, "probe_timeout": 0.1}
        async with routed(3, settings=settings, prefill_us=20_000.0) as it:
            prompt = " ".join(f"w{i}" for i in range(60))  # a second on so slow an engine
            answer = await it.ask(**{**BODY, "prompt": prompt})
            assert answer.status_code == 200 and it.router.retries == 2

    run(test)


def test_a_request_that_kills_its_worker_kills_two():
    async def test():
        async with scripted(*[[None]] * 4) as it:
            answer = await it.ask(**BODY)
            assert answer.status_code == 502 and len(it.asked) == 2

    run(test)


def test_requests_that_all_workers_answer_with_500_open_no_breaker():
    async def test():
        async with routed(3) as it:
            for fake in it.fakes:
                fake.engine.mode, fake.engine.status = "status", 500
            assert {a.status_code for a in await ask_many(it, 3)} == {500}
            assert [worker.state for worker in it.workers] == ["up"] * 3
            await ask_many(it, 30)
            assert len(it.router.usable) >= 1  # the last one is asked, whatever it answers

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_the_routers_own_lack_is_no_workers_fault(monkeypatch, stream):
    async def lacking(worker, made):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("llm_router.balancer.connect", lacking)

    async def test():
        async with scripted([]) as it:
            answer = await it.ask(**BODY, stream=stream)
            assert answer.status_code == 503 and "too many open files" in answer.text
            assert it.workers[0].state == "up" and it.workers[0].failures == 0

    run(test)


def test_a_model_of_a_worker_that_is_not_up_yet_may_come():
    async def test():
        async with routed(1) as it:
            it.router.add(Worker("http://127.0.0.1:9"))
            answer = await it.ask(**{**BODY, "model": "large"})
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"

    run(test)


def test_models_are_told_in_chunks_too():
    async def test():
        chunked = chunk(b'{"data": [{"id"') + chunk(b': "0\\r\\n"}]}') + LAST_CHUNK
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        async with scripted([head + chunked[:9], chunked[9:]]) as it:
            assert await models_of(it.workers[0], 1.0) == ("0\r\n",)

    run(test)


def test_streams_that_run_when_the_router_stops_are_told():
    async def test():
        async with scripted([CHUNKED_SSE + chunk(piece("a"))]) as it:
            asking = asyncio.ensure_future(it.stream(**BODY))
            await until(lambda: it.asked and not it.workers[0].idle)
            await asyncio.sleep(0.1)
            await it.router.stop(0.0)
            stream = await asking
            assert stream.text == "a" and "stopped" in stream.errors[0]["message"]

    run(test)


def test_clients_own_mistakes_open_no_breaker():
    async def test():
        async with routed(2) as it:
            for fake in it.fakes:
                fake.engine.mode = "status"
            assert {a.status_code for a in await ask_many(it, 50)} == {400}
            assert it.router.retries == 0 and [w.state for w in it.workers] == ["up", "up"]
            for fake in it.fakes:
                fake.engine.mode = "ok"
            assert {a.status_code for a in await ask_many(it, 8)} == {200}

    run(test)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_worker_is_no_faulty_one(status):
    async def test():
        async with routed(2) as it:
            it.fakes[0].engine.mode, it.fakes[0].engine.status = "status", status
            assert {a.status_code for a in await ask_many(it, 20)} == {200}
            assert it.workers[0].state == "up" and it.workers[0].failures == 0

    run(test)


def test_faults_open_the_breaker_and_a_probe_closes_it():
    async def test():
        async with routed(2, settings={"breaker_open": 0.3}) as it:
            it.fakes[0].engine.mode, it.fakes[0].engine.status = "status", 500
            assert {a.status_code for a in await ask_many(it, 20)} == {200}
            assert it.workers[0].state == "open"
            sent = it.workers[0].requests
            await ask_many(it, 10)
            assert it.workers[0].requests == sent
            it.fakes[0].engine.mode = "ok"
            await until(lambda: it.workers[0].usable)

    run(test)


@pytest.mark.parametrize("mode", ["nonsense", "hang"])
def test_where_all_fail_the_status_says_so_and_the_router_lives(mode):
    async def test():
        settings = {"request_timeout": 1.0, "hang_after": 30.0, "breaker_open": 0.2}
        async with routed(2, settings=settings) as it:
            for fake in it.fakes:
                fake.engine.mode = mode
            answer = await it.ask(**BODY)
            assert answer.status_code == {"nonsense": 502, "hang": 504}[mode]
            assert answer.json()["error"]["message"]
            for fake in it.fakes:
                fake.engine.mode = "ok"
            await until(lambda: len(it.router.usable) == 2)
            assert (await it.ask(**BODY)).status_code == 200

    run(test)


def test_without_workers():
    async def test():
        async with routed(0) as it:
            answer = await it.ask(**BODY)
            assert answer.status_code == 503 and "POST /workers" in answer.text
            assert (await it.client.get("/health")).status_code == 503
            it.router.add(Worker("http://127.0.0.1:9"))
            answer = await it.ask(**BODY)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"

    run(test)


def test_two_models():
    async def test():
        fakes = [Fake(model="small"), Fake(model="large")]
        async with routed(fakes=fakes) as it:
            for name in ("small", "large") * 4:
                answer = await it.ask(**{**BODY, "model": name})
                assert answer.json()["model"] == name
            answer = await it.ask(**{**BODY, "model": "other"})
            assert answer.status_code == 404 and "['large', 'small']" in answer.text
            data = (await it.client.get("/v1/models")).json()["data"]
            assert [card["id"] for card in data] == ["large", "small"]

    run(test)


def test_the_limit_is_strict_and_the_queue_bounded():
    async def test():
        settings = {"max_concurrent": 8, "queue_size": 8}
        async with routed(1, settings=settings, decode_ms=50.0) as it:
            answers = await ask_many(it, 64)
            statuses = sorted(answer.status_code for answer in answers)
            assert statuses == [200] * 16 + [429] * 48
            refused = next(answer for answer in answers if answer.status_code == 429)
            assert int(refused.headers["retry-after"]) >= 1
            assert it.fakes[0].engine.peak == 8
            assert {a.status_code for a in await ask_many(it, 8)} == {200}  # none is leaked

    run(test)


def test_who_waits_too_long_in_the_queue_is_told():
    async def test():
        settings = {"max_concurrent": 1, "queue_timeout": 0.2}
        async with routed(1, settings=settings, decode_ms=800.0, per_token=False) as it:
            answers = await ask_many(it, 3)
            assert sorted(answer.status_code for answer in answers) == [200, 503, 503]

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_work_and_its_load_along(stream):
    async def test():
        async with routed(1, decode_ms=500.0) as it:
            for _ in range(5):
                with pytest.raises(httpx.ReadTimeout):
                    await it.client.post(
                        "/v1/completions", json={**BODY, "stream": stream}, timeout=0.1
                    )
            await until(lambda: it.fakes[0].engine.aborted == 5, 2)
            assert it.workers[0].load == 0 and it.router.running == 0

    run(test)


def test_a_client_that_leaves_the_queue():
    async def test():
        settings = {"max_concurrent": 1}
        async with routed(1, settings=settings, decode_ms=300.0, per_token=False) as it:
            first = asyncio.ensure_future(it.ask(**BODY))
            await until(lambda: it.router.running == 1)
            with pytest.raises(httpx.ReadTimeout):
                await it.client.post("/v1/completions", json=BODY, timeout=0.1)
            await until(lambda: not it.router.queue)
            assert (await first).status_code == 200

    run(test)


def test_a_worker_is_drained_and_added_while_requests_run():
    async def test():
        async with routed(1, decode_ms=300.0, per_token=False) as it:
            asking = asyncio.ensure_future(ask_many(it, 4))
            await until(lambda: it.fakes[0].engine.running == 4)
            removing = asyncio.ensure_future(it.router.remove(it.workers[0], 5.0))
            await asyncio.sleep(0.05)
            assert (await it.ask(**BODY)).status_code == 503
            assert {a.status_code for a in await asking} == {200}
            await removing
            assert not it.router.workers
            it.router.add(Worker(it.fakes[0].url))
            await until(lambda: it.router.usable)
            assert (await it.ask(**BODY)).status_code == 200

    run(test)


def test_a_slow_client_holds_the_worker_back_not_the_routers_memory():
    async def test():
        async with routed(2, decode_ms=2.0) as it:
            asking = asyncio.ensure_future(it.stream(**{**BODY, "max_tokens": 100}))
            await until(lambda: any(c.exchange and c.exchange.streams for c in it.router.clients))
            [client] = [client for client in it.router.clients if client.exchange]
            reading = client.exchange.upstream.transport.is_reading
            client.pause_writing()  # as the loop does when the client's buffer is full
            assert not reading()
            client.exchange.move("to see whether the next connection waits too")
            await until(lambda: client.exchange.upstream)
            reading = client.exchange.upstream.transport.is_reading
            assert not reading()
            client.resume_writing()
            assert reading() and len((await asking).text.split()) == 100

    run(test)


def test_the_strict_reader():
    assert Stream('data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n').text == "a"
