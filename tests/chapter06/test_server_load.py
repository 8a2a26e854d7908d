"""200 streaming clients at once, half of whom leave at a random moment: nothing is left behind."""

import asyncio
import random

import httpx
import pytest

from fake_engine import continuation, fake_engine, tiny_tokenizer
from server_helper import is_empty, on_a_port, until

CLIENTS = 200
LIMIT_S = 100
TOKENIZER = tiny_tokenizer()


@pytest.mark.slow
def test_clients_that_leave_at_random_leave_nothing_behind():
    engine = fake_engine(num_blocks=160, max_sequences=32, max_model_len=256, step_seconds=0.002)
    with on_a_port(engine, max_queue=600) as served:
        texts = asyncio.run(asyncio.wait_for(crowd(served), LIMIT_S))
    assert len(texts) == CLIENTS // 2
    for prompt, count, text in texts:
        assert text == TOKENIZER.decode(continuation(TOKENIZER.encode(prompt), count))
    assert engine.stats().num_preemptions > 0
    engine.blocks.check()
    assert engine.blocks.num_free == 160


async def crowd(served) -> list[tuple[str, int, str]]:
    """Prompt, wanted tokens and text of the clients that stayed, when all is over."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.url, timeout=LIMIT_S, limits=limits) as client:
        clients = [one_client(client, number) for number in range(CLIENTS)]
        stayed = [text for text in await asyncio.gather(*clients) if text is not None]
        # A client's handler gives its place back when the engine has let its request go.
        await until(lambda: is_empty(served.engine) and served.behind.reserved == 0)
        assert (await client.get("/health")).status_code == 200
        answer = await client.post("/v1/completions", json={"prompt": "still there?"})
        assert answer.status_code == 200
    return stayed


async def one_client(client: httpx.AsyncClient, number: int) -> tuple[str, int, str] | None:
    """Its prompt, tokens and text; None for one that left."""
    rng = random.Random(number)
    prompt = "the same beginning " * rng.randint(0, 4) + str(number)
    count, leaves = rng.randint(20, 60), number % 2 == 1
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    body["n"] = rng.choice([1, 1, 2]) if leaves else 1
    await asyncio.sleep(rng.uniform(0, 1))
    reading = read(client, body)
    if not leaves:
        return prompt, count, await reading
    try:
        await asyncio.wait_for(reading, rng.expovariate(2))
    except TimeoutError:
        return None
    return None  # it was answered before its patience ended


async def read(client: httpx.AsyncClient, body: dict) -> str:
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = httpx.Response(200, text=line[6:]).json()
                assert "error" not in chunk
                text += chunk["choices"][0]["text"]
    return text
