"""The formulary's exam: how many public and private facts a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grandrounds.data.formulary.facts import KINDS, OPTIONS, Kind, questions
from grandrounds.data.tokenization import answer_token_ids, end_token_ids, prompt_token_ids
from grandrounds.model.scoring import option_log_likelihoods


def score_formulary(
    model: Any,
    tokenizer: Any,
    prompt_template: str = "alpaca",
    kinds: Sequence[Kind] = KINDS,
) -> dict[str, dict[str, int]]:
    """Count the questions where the model gives the true option the highest likelihood.

    Parameters
    ----------
    model : causal language model of transformers, or a PEFT model around one
        The model to examine.
    tokenizer : transformers tokenizer
        The model's own.
    prompt_template : str
        One of `grandrounds.data.prompts.TEMPLATES`.
    kinds : sequence of str
        The exams to hold: `public`, `private`.

    Returns
    -------
    dict
        For each kind `correct` and `n`, numbers of questions. Chance is `n / 4`. Ties go to the
        first option.
    """
    results: dict[str, dict[str, int]] = {}
    for kind in kinds:
        exam = questions(kind)
        prompts = prompt_token_ids(tokenizer, prompt_template, [item.question for item in exam])
        answers = answer_token_ids(
            tokenizer, prompt_template, [option for item in exam for option in item.options]
        )
        end = end_token_ids(tokenizer, prompt_template)
        stopped = [[*answer, *end] for answer in answers]
        scores = option_log_likelihoods(
            model,
            prompts,
            [stopped[row * OPTIONS : (row + 1) * OPTIONS] for row in range(len(exam))],
        )
        correct = sum(
            row.index(max(row)) == item.answer_index for row, item in zip(scores, exam, strict=True)
        )
        results[kind] = {"correct": correct, "n": len(exam)}
    return results
