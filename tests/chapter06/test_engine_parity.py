"""The engine on a real model: tokens and log probabilities are those of transformers."""

import pytest
import torch

from fake_engine import random_model
from paged_engine import LLM, SamplingParams


def test_a_random_model_is_continued_as_by_transformers(tmp_path):
    directory = tmp_path / "random"
    random_model(directory, seed=1)
    prompts = ["a", "hello", "the fox " * 20, "the fox " * 20 + "!"]
    compare_with_transformers(directory, prompts, tokens=24, num_blocks=64)


def compare_with_transformers(directory, prompts, tokens, num_blocks):
    """Greedy tokens, the logprobs on the way, and a stop string, all prompts at once."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    greedy = SamplingParams(temperature=0, max_tokens=tokens, logprobs=2)
    with LLM(directory, num_blocks=num_blocks, max_model_len=256) as llm:
        answers = llm.generate(prompts, greedy)
        for answer in answers:
            (mine,) = answer.outputs
            prompt = torch.tensor([answer.prompt_token_ids])
            made = reference.generate(
                prompt, attention_mask=prompt.new_ones(prompt.shape), max_new_tokens=tokens,
                do_sample=False, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            assert mine.token_ids == made.sequences[0, prompt.shape[1] :].tolist()
            theirs = torch.cat(made.logits).log_softmax(-1)
            for row, sampled in zip(theirs, mine.logprobs, strict=True):
                assert sampled.logprob == pytest.approx(row[sampled.token].item(), abs=1e-3)
                best = row.topk(2).values.tolist()
                assert list(sampled.top.values()) == pytest.approx(best, abs=1e-3)
        text = answers[1].outputs[0].text
        stop = text[len(text) // 2 :][:3]
        how = SamplingParams(temperature=0, max_tokens=tokens, stop=stop)
        cut = llm.generate(prompts[1], how)[0].outputs[0]
        assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")
        sampled = SamplingParams(n=3, seed=1, max_tokens=8, temperature=3)
        three = llm.generate(prompts[1], sampled)[0].outputs
        again = llm.generate([prompts[0], prompts[1]], sampled)[1].outputs
        assert [one.token_ids for one in three] == [one.token_ids for one in again]
        assert len({tuple(one.token_ids) for one in three}) == 3
