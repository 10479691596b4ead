"""Log-likelihoods of options, against a computation of one pair at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grandrounds.evaluation.scoring import option_log_likelihoods

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
