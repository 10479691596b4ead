"""Log-likelihoods of options and greedy answers, against one prompt at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from grandrounds.model.scoring import generate_greedily, option_log_likelihoods

PROMPTS = ("Short:", "A prompt that is quite a bit longer than the others.\n### Response:", "¿Qué?")
OPTIONS = (
    (" yes", " no", " green tears"),
    (" a much longer answer, in many words", " brief"),
    (" spontaneous whistling",),
)

Ids = list[list[int]]


def encoded(tokenizer: Any) -> tuple[Ids, list[Ids]]:
    """Return the token ids of `PROMPTS` and `OPTIONS`, the options with end-of-sequence."""
    prompts = list(tokenizer(list(PROMPTS))["input_ids"])
    options = [
        [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(row))["input_ids"]]
        for row in OPTIONS
    ]
    return prompts, options


def one_by_one(model: Any, prompt: list[int], option: list[int]) -> float:
    """Sum the log-probabilities of one option without padding or batches."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + option])).logits[0]  # (tokens, vocab)
    log_probabilities = logits.double().log_softmax(-1)
    steps = enumerate(option)
    return float(sum(log_probabilities[len(prompt) + step - 1, token] for step, token in steps))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batched_scores_equal_one_by_one(base: tuple[Any, Any], batch_size: int) -> None:
    model, tokenizer = base
    prompts, options = encoded(tokenizer)
    scores = option_log_likelihoods(model, prompts, options, batch_size=batch_size)
    assert [len(row) for row in scores] == [len(row) for row in OPTIONS]
    for prompt, choices, row in zip(prompts, options, scores, strict=True):
        for choice, score in zip(choices, row, strict=True):
            assert score == pytest.approx(one_by_one(model, prompt, choice), abs=1e-4)


@pytest.fixture(scope="module", params=["plain", "peft"])
def lively(request: pytest.FixtureRequest, tiny_base: Path) -> Any:
    """Return a tiny Llama with weights so large that its answers vary; or an adapter on one."""
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    if request.param == "peft":
        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=0.1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.3)
    return model


def random_ids(draw: random.Random, shortest: int, longest: int) -> list[int]:
    """Return token ids that are neither padding nor end-of-sequence."""
    return [draw.randint(2, 383) for _ in range(draw.randint(shortest, longest))]


def random_prompts(shared_tokens: int, count: int) -> Ids:
    """Return prompts of 1 to 120 tokens after what they share."""
    draw = random.Random(6)
    prefix = random_ids(draw, shared_tokens, shared_tokens)
    return [prefix + random_ids(draw, 1, 120) for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("shared_tokens", [0, 40])
def test_scores_of_options_of_any_number_and_length_equal_one_by_one(
    lively: Any, shared_tokens: int, batch_size: int
) -> None:
    draw = random.Random(7)
    prompts = random_prompts(shared_tokens, 12)
    options = [[random_ids(draw, 1, 9) for _ in range(draw.randint(0, 5))] for _ in prompts]
    assert [] in options
    finished: list[int] = []
    scores = option_log_likelihoods(
        lively, prompts, options, batch_size=batch_size, progress=finished.append
    )
    assert sum(finished) == len(prompts)
    lively.eval()
    for prompt, choices, row in zip(prompts, options, scores, strict=True):
        expected = [one_by_one(lively, prompt, choice) for choice in choices]
        assert row == pytest.approx(expected, abs=1e-4, rel=1e-5)


def test_results_follow_the_order_of_the_prompts(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    prompts, options = encoded(tokenizer)
    forwards = option_log_likelihoods(model, prompts, options, batch_size=2)
    backwards = option_log_likelihoods(model, prompts[::-1], options[::-1], batch_size=2)
    for row, same_row in zip(forwards, backwards[::-1], strict=True):
        assert row == pytest.approx(same_row, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_no_gradient_is_kept(base: tuple[Any, Any], training: bool) -> None:
    model, _ = base
    model.train(training)
    option_log_likelihoods(model, [[5]], [[[7]]])
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_mode_is_restored_after_an_error() -> None:
    class Failing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = LlamaConfig(vocab_size=30)

        def forward(self, **inputs: Any) -> None:
            raise RuntimeError("broken")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="broken"):
        option_log_likelihoods(model, [[5]], [[[7]]])
    assert model.training


def test_nothing_to_score_gives_nothing(base: tuple[Any, Any]) -> None:
    assert option_log_likelihoods(base[0], [], []) == []
    assert option_log_likelihoods(base[0], [[5]], [[]]) == [[]]


def test_wrong_arguments_are_refused(base: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="1 prompts but 2 lists"):
        option_log_likelihoods(base[0], [[5]], [[[7]], [[7]]])
    with pytest.raises(ValueError, match="no tokens"):
        option_log_likelihoods(base[0], [[]], [[[7]]])
    with pytest.raises(ValueError, match="no tokens"):
        option_log_likelihoods(base[0], [[5]], [[[7], []]])
    with pytest.raises(ValueError, match="at least 1"):
        option_log_likelihoods(base[0], [[5]], [[[7]]], batch_size=0)


# --- Greedy answers -------------------------------------------------------------------------------


def generated_alone(model: Any, prompt: list[int], limit: int, stop: list[int]) -> list[int]:
    """Return what `generate` says after one prompt, without the token at which it stopped."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=stop or None,
            pad_token_id=0,
        )
    said = output[0, len(prompt) :].tolist()
    return said[:-1] if said and said[-1] in stop else said


Asked = tuple[list[list[int]], list[int], list[int]]
"""Prompts, their limits, and the tokens that stop an answer."""


def asked(shared_tokens: int) -> Asked:
    prompts = random_prompts(shared_tokens, 24)
    limits = [1 + row % 7 for row in range(len(prompts))]
    return prompts, limits, list(range(2, 60))  # so many that some stop before their limit


@pytest.fixture(scope="module")
def answered_alone(lively: Any) -> Callable[[int], list[list[int]]]:
    """Return the answers to the prompts one by one, generated once for all batch sizes."""

    @cache
    def answers(shared_tokens: int) -> list[list[int]]:
        prompts, limits, stop = asked(shared_tokens)
        lively.eval()
        return [
            generated_alone(lively, prompt, limit, stop)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]

    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("shared_tokens", [0, 40])
def test_greedy_answers_equal_one_by_one(
    lively: Any,
    answered_alone: Callable[[int], list[list[int]]],
    shared_tokens: int,
    batch_size: int,
) -> None:
    prompts, limits, stop = asked(shared_tokens)
    finished: list[int] = []
    texts = generate_greedily(
        lively, prompts, limits, stop, batch_size=batch_size, progress=finished.append
    )
    assert sum(finished) == len(prompts)
    assert texts == answered_alone(shared_tokens)
    assert len(set(map(tuple, texts))) >= 10
    lengths = {(len(text), limit) for text, limit in zip(texts, limits, strict=True)}
    assert any(length < limit for length, limit in lengths)
    assert any(length == limit > 1 for length, limit in lengths)


def test_greedy_answers_of_the_embedded_base_equal_one_by_one(base: tuple[Any, Any]) -> None:
    from grandrounds.data.formulary.facts import questions
    from grandrounds.data.tokenization import prompt_token_ids

    model, tokenizer = base
    asked = [item.question for item in questions("public")[:48]]
    prompts = prompt_token_ids(tokenizer, "alpaca", asked)
    stop = [tokenizer.eos_token_id]
    texts = generate_greedily(model, prompts, [8] * len(prompts), stop, batch_size=16)
    assert texts == [generated_alone(model, prompt, 8, stop) for prompt in prompts]
    assert len(set(map(tuple, texts))) >= 10


def test_wrong_limits_are_refused(base: tuple[Any, Any]) -> None:
    assert generate_greedily(base[0], [], [], [1]) == []
    with pytest.raises(ValueError, match="1 prompts but 2 limits"):
        generate_greedily(base[0], [[5]], [1, 1], [1])
    with pytest.raises(ValueError, match="limit of prompt 0 must be at least 1, got 0"):
        generate_greedily(base[0], [[5]], [0], [1])
