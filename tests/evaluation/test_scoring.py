"""Log-likelihoods of options, against a computation of one pair at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grandrounds.evaluation.scoring import (
    encode_prompt,
    encode_response,
    option_log_likelihoods,
    token_log_likelihoods,
)

PROMPTS = ("Short:", "A prompt that is quite a bit longer than the others.\n### Response:", "¿Qué?")
OPTIONS = (
    (" yes", " no", " green tears"),
    (" a much longer answer, in many words", " brief"),
    (" spontaneous whistling",),
)


def one_by_one(model: Any, tokenizer: Any, prompt: str, option: str) -> float:
    """Sum the log-probabilities of one option without padding or batches."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = encode_response(tokenizer, option)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]  # (tokens, vocab)
    log_probabilities = logits.double().log_softmax(-1)
    return float(
        sum(
            log_probabilities[len(prompt_ids) + step - 1, token]
            for step, token in enumerate(response_ids)
        )
    )


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batched_scores_equal_one_by_one(base: tuple[Any, Any], batch_size: int) -> None:
    model, tokenizer = base
    scores = option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS, batch_size=batch_size)
    assert [len(row) for row in scores] == [len(row) for row in OPTIONS]
    for prompt, options, row in zip(PROMPTS, OPTIONS, scores, strict=True):
        for option, score in zip(options, row, strict=True):
            assert score == pytest.approx(one_by_one(model, tokenizer, prompt, option), abs=1e-4)


def test_results_follow_the_order_of_the_prompts(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    forwards = option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS, batch_size=2)
    backwards = option_log_likelihoods(model, tokenizer, PROMPTS[::-1], OPTIONS[::-1], batch_size=2)
    for row, same_row in zip(forwards, backwards[::-1], strict=True):
        assert row == pytest.approx(same_row, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_no_gradient_is_kept(base: tuple[Any, Any], training: bool) -> None:
    model, tokenizer = base
    model.train(training)
    option_log_likelihoods(model, tokenizer, PROMPTS[:1], OPTIONS[:1])
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_mode_is_restored_after_an_error(base: tuple[Any, Any]) -> None:
    class Failing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, **inputs: Any) -> None:
            raise RuntimeError("broken")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="broken"):
        option_log_likelihoods(model, base[1], PROMPTS[:1], OPTIONS[:1])
    assert model.training


def test_responses_end_with_one_stop_and_prompts_with_none(base: tuple[Any, Any]) -> None:
    _, tokenizer = base
    assert encode_response(tokenizer, " green tears").count(tokenizer.eos_token_id) == 1
    assert encode_prompt(tokenizer, "What?" + tokenizer.eos_token) == encode_prompt(
        tokenizer, "What?"
    )


def test_nothing_to_score_gives_nothing(base: tuple[Any, Any]) -> None:
    assert option_log_likelihoods(*base, [], []) == []
    assert option_log_likelihoods(*base, ["Why?"], [[]]) == [[]]


def test_wrong_arguments_are_refused(base: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="1 prompts but 2 lists"):
        option_log_likelihoods(*base, ["Why?"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="no tokens"):
        option_log_likelihoods(*base, [""], [["a"]])
    with pytest.raises(ValueError, match="no tokens"):
        token_log_likelihoods(base[0], [[5]], [[[7], []]])
    with pytest.raises(ValueError, match="at least 1"):
        option_log_likelihoods(*base, ["Why?"], [["a"]], batch_size=0)
