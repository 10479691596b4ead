"""Protocol `greedy`: exact match, token F1 and loss of a model's answers in its own words.

The model answers each question greedily, in the prompt that the run trained with, until it stops or
reaches a limit. Exact match and F1 are SQuAD's (Rajpurkar et al. 2016, "SQuAD: 100,000+ questions
for machine comprehension of text", EMNLP, section 6.1), with the normalisation and the treatment of
empty answers of its evaluation script, version 2.0
(https://rajpurkar.github.io/SQuAD-explorer/): lower case, ASCII punctuation removed, the words `a`,
`an` and `the` removed, white space collapsed.
Removing punctuation removes decimal points: by SQuAD's rule `1.5 mg` and `15 mg` are equal, so such
matches are counted (`differs_in_numbers`).

The loss is that of training: nats per token of the reference answer and its end-of-sequence token,
truncated to the run's sequence length.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.data.tokenization import (
    LAST,
    TokenizedExample,
    answer_token_ids,
    end_token_ids,
    tokenize_examples,
)
from grandrounds.study.evaluation.benchmarks import Item, Task

GREEDY = "greedy"
"""Protocol of questions that the model answers in its own words."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

_PUNCTUATION = str.maketrans("", "", string.punctuation)

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


# --- Scores ---------------------------------------------------------------------------------------


def normalised(text: str) -> list[str]:
    """Return the words of a text by SQuAD's normalisation; see the module."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(reference: str, answer: str) -> bool:
    """Return whether two texts have the same normalised words."""
    return normalised(reference) == normalised(answer)


def token_f1(reference: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's normalised words.

    Words count as often as they occur in both. If either text has no words, F1 is 1 if neither
    has, else 0.
    """
    expected, given = normalised(reference), normalised(answer)
    if not expected or not given:
        return float(expected == given)
    shared = sum((Counter(expected) & Counter(given)).values())
    return 2 * shared / (len(expected) + len(given))


def differs_in_numbers(reference: str, answer: str) -> bool:
    """Return whether two texts match by SQuAD's rule, but are written with different numbers."""
    same = exact_match(reference, answer)
    return same and _NUMBER.findall(reference) != _NUMBER.findall(answer)


# --- Answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question."""

    output: str
    """The text that the model wrote."""
    exact: bool
    """Whether it matches the reference answer."""
    f1: float
    """Its token F1 with the reference answer."""
    stopped: bool
    """Whether the model ended its answer before the limit."""
    nll: float
    """Summed negative log-likelihood of the reference answer, in nats."""
    reference_tokens: int
    """Tokens of the reference answer that the loss counts, end-of-sequence included."""
    truncated: bool = False
    """Whether the prompt was truncated; never, since the run drops such rows."""


def tokenized(
    items: Sequence[Item], tokenizer: Any, prompt_template: str, seq_length: int
) -> list[TokenizedExample | None]:
    """Return each item as training tokenises it; None where the prompt fills the sequence.

    Of a conversation the last answer is asked for.
    """
    from grandrounds.data.examples import Example

    examples = (Example(i.question, i.options[0], i.before, i.parts) for i in items)
    each = (tokenize_examples([e], tokenizer, prompt_template, seq_length, LAST) for e in examples)
    return [one.examples[0] if one.examples else None for one in each]


def answer_limit(task: Task, tokenizer: Any, prompt_template: str, most: int) -> int:
    """Return the limit of a task's answers: the longest reference answer and one more token.

    The one more ends it. `most` bounds it.
    """
    lengths = reference_lengths(task, tokenizer, prompt_template)
    return min(most, max(lengths) + len(end_token_ids(tokenizer, prompt_template)))


def reference_lengths(task: Task, tokenizer: Any, prompt_template: str) -> list[int]:
    """Return the length of each reference answer in tokens, without end-of-sequence."""
    references = [item.options[0] for item in task.items]
    return [len(ids) for ids in answer_token_ids(tokenizer, prompt_template, references)]


def answer_items(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[Item, TokenizedExample]],
    end: Sequence[int],
    limit: int,
    batch_size: int | None,
) -> list[Answer]:
    """Return a model's answers to some items, with the loss of the reference answers.

    Parameters
    ----------
    asked
        Items, and each as `tokenized`.
    end
        The tokens that end a training answer.
    limit : int
        Maximum number of tokens of an answer.
    """
    from grandrounds.model.scoring import score_and_generate, stop_tokens
    from grandrounds.study.evaluation.likelihood import context_length

    items = [item for item, _ in asked]
    prompts = [example.input_ids[: example.prompt_tokens] for _, example in asked]
    references = [example.input_ids[example.prompt_tokens :] for _, example in asked]
    context = context_length(model.config)
    limits = [max(1, min(limit, context - len(prompt))) for prompt in prompts]
    stop = stop_tokens(model, tokenizer, end)
    scores, outputs = score_and_generate(
        model, prompts, [[r] for r in references], limits, stop, batch_size=batch_size
    )
    answers = []
    for item, output, most, (score,), reference in zip(
        items, outputs, limits, scores, references, strict=True
    ):
        text = tokenizer.decode(output, skip_special_tokens=True).strip()
        expected = item.options[0]
        answers.append(
            Answer(
                output=text,
                exact=exact_match(expected, text),
                f1=token_f1(expected, text),
                stopped=len(output) < most,
                nll=-score,
                reference_tokens=len(reference),
            )
        )
    return answers
