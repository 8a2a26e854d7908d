r"""One engine in a process of its own, at the other end of a socket: the child of engine_process.

    python -m inference.engine_worker SOCKET \
        '{"engine": "vllm", "model": DIR, "dtype": "float32", "options": {}}'

It says a line of JSON when the engine is ready, then answers each line with one: prompts as token
ids go in; the greedy tokens, their times and the seconds in all come out. It ends with the socket.
"""

import json
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from distlab.hardware import default_device
from inference.vllm_settings import set_environment

Event = tuple[int, list[int], float, bool]  # request, its new tokens, when, and whether it ended


@dataclass
class Progress:
    """One request on its way; the times are `time.perf_counter()`."""

    sent: float
    tokens: list[int] = field(default_factory=list)
    first: float | None = None
    last: float = 0.0

    def add(self, tokens: list[int], now: float) -> None:
        self.tokens += tokens
        self.last = now
        if self.first is None and tokens:
            self.first = now

    def as_json(self) -> dict[str, Any]:
        first = self.last if self.first is None else self.first
        gaps = max(1, len(self.tokens) - 1)
        return {
            "tokens": self.tokens,
            "ttft": first - self.sent,
            "tpot": (self.last - first) / gaps,
            "seconds": self.last - self.sent,
        }


def main() -> int:
    path, asked = sys.argv[1], json.loads(sys.argv[2])
    engine = ENGINES[asked["engine"]](asked["model"], asked["dtype"], **asked["options"])
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        with link.makefile("rw", encoding="utf-8") as lines:
            tell(lines, {"ready": engine.description})
            for line in lines:
                tell(lines, run(engine, **json.loads(line)))
    engine.close()
    return 0


def tell(lines: Any, answer: dict[str, Any]) -> None:
    lines.write(json.dumps(answer) + "\n")
    lines.flush()


def run(engine: Any, prompts: list[list[int]], new_tokens: int, concurrency: int) -> dict[str, Any]:
    """Answer `prompts`, `concurrency` at a time: as soon as one ends, the next is sent."""
    waiting = list(enumerate(prompts))[::-1]
    requests: dict[int, Progress] = {}
    unfinished = 0
    before = engine.cached_tokens
    started = time.perf_counter()
    while waiting or unfinished:
        while waiting and unfinished < concurrency:
            index, prompt = waiting.pop()
            requests[index] = Progress(time.perf_counter())
            engine.add(index, prompt, new_tokens)
            unfinished += 1
        for index, tokens, now, ended in engine.step():
            requests[index].add(tokens, now)
            unfinished -= ended
    seconds = time.perf_counter() - started
    answers = [requests[index].as_json() for index in range(len(prompts))]
    return {"answers": answers, "seconds": seconds, "cached": engine.cached_tokens - before}


class Vllm:
    """vLLM's engine core, stepped by hand; `options` are arguments of `vllm.LLM`.

    `multiprocessing` puts the engine into processes of its own, where its threads can be bound to
    cores, which is how it is fastest on a CPU.
    """

    def __init__(
        self, model: str, dtype: str, multiprocessing: bool = False, **options: Any
    ) -> None:
        set_environment(multiprocessing)
        import vllm

        self._llm = vllm.LLM(model, dtype=dtype, seed=0, **options)
        self.description = f"vLLM {vllm.__version__}"
        self.cached_tokens = 0

    def add(self, index: int, prompt: list[int], new_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        self._llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)

    def step(self) -> list[Event]:
        outputs = self._llm.llm_engine.step()
        now = time.perf_counter()
        self.cached_tokens += sum(o.num_cached_tokens or 0 for o in outputs if o.finished)
        # The id that comes back may have a suffix of vLLM's own.
        return [
            (int(o.request_id.split("-")[0]), list(o.outputs[0].token_ids), now, o.finished)
            for o in outputs
        ]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class Paged:
    """This chapter's engine; `options` are those of `paged_engine.EngineConfig`."""

    def __init__(self, model: str, dtype: str, **options: Any) -> None:
        from paged_engine.config import EngineConfig, dedicate_process
        from paged_engine.engine import Engine

        self._engine = Engine(EngineConfig(model, dtype=dtype, **options))
        dedicate_process()  # as its server does
        self.description = f"paged_engine, {self._engine.runner.description}"
        self.cached_tokens = 0

    def add(self, index: int, prompt: list[int], new_tokens: int) -> None:
        from paged_engine.sampling_params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        self._engine.add_request(prompt, params, str(index))

    def step(self) -> list[Event]:
        outputs = self._engine.step()
        now = time.perf_counter()
        ended = [output for output in outputs if output.finish_reason is not None]
        self.cached_tokens += sum(output.cached_tokens for output in ended)
        return [
            (int(o.request_id), list(o.token_ids), now, o.finish_reason is not None)
            for o in outputs
        ]

    def close(self) -> None:
        self._engine.close()


class Transformers:
    """transformers' `generate`: a batch is padded to its longest; it begins and ends together."""

    cached_tokens = 0

    def __init__(self, model: str, dtype: str) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._device = default_device()
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype)
        )
        self._model = network.to(self._device).eval()
        # A request ends with its last token, not with an end of text: the others do the same.
        self._model.generation_config.eos_token_id = None
        self.description = f"transformers {transformers.__version__}"
        self._waiting: list[tuple[int, list[int], int]] = []

    def add(self, index: int, prompt: list[int], new_tokens: int) -> None:
        self._waiting.append((index, prompt, new_tokens))

    def step(self) -> list[Event]:
        """All the batch's tokens at once; each has the time at which it was chosen."""
        batch, self._waiting = self._waiting, []
        longest = max(len(prompt) for _, prompt, _ in batch)
        ids = torch.tensor([[0] * (longest - len(p)) + p for _, p, _ in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for _, p, _ in batch])
        clock = Clock()
        made = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=batch[0][2],
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )[:, longest:].tolist()
        return [
            (index, [made[row][place]], now, place == len(made[row]) - 1)
            for row, (index, _, _) in enumerate(batch)
            for place, now in enumerate(clock.times[1:])  # the first one is the prompt's
        ]

    def close(self) -> None:
        pass


class Clock:
    """A streamer, which `generate` tells of each token, that notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


ENGINES = {"transformers": Transformers, "paged_engine": Paged, "vllm": Vllm}

if __name__ == "__main__":
    sys.exit(main())
