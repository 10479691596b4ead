"""Protocol `likelihood`: choose the option of greatest likelihood, as lm-evaluation-harness does.

Follows lm-evaluation-harness 0.4.13 (https://pypi.org/project/lm-eval/0.4.13/):

- `lm_eval/tasks/pubmedqa/` (task `pubmedqa`, version 1.0): `preprocess_pubmedqa.py`, answers
  `yes`, `no`, `maybe`;
- `lm_eval/tasks/medqa/` (task `medqa_4options`): `preprocess_medqa.py`, answers `A` to `D`;
- `lm_eval/tasks/medmcqa/` (task `medmcqa`): `utils_medmcqa.py`, answers `A` to `D`;
- `lm_eval/tasks/careqa/` (task `careqa_en`, version 1.0): `utils.py`, MedMCQA's prompt;
- `lm_eval/api/task.py`: one space (`target_delimiter`) between prompt and answer; the answer of
  greatest log-likelihood is chosen, the first one on ties; `acc_norm` divides each log-likelihood
  by the number of characters of its answer, without that space;
- `lm_eval/api/model.py`, `_encode_pair`: prompt and answer are tokenised together, and the answer's
  tokens are those beyond the length of the prompt alone; trailing spaces of the prompt belong to
  the answer;
- `lm_eval/models/huggingface.py`: the tokenizer's default special tokens (`add_bos_token` unset),
  zero-shot, no chat template, truncation from the left where prompt and answer exceed the context.

Other benchmarks with lettered options use MedMCQA's prompt. The formulary, and the user's own exams
unless they are asked by letter, use this project's own prompt, and their answers are the options'
texts followed by the end-of-sequence token, as in `grandrounds.site.exam`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grandrounds.data.prompts import build_prompt as own_prompt
from grandrounds.data.prompts import response_text
from grandrounds.data.tokenization import answer_token_ids, end_token_ids, prompt_token_ids
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, placeholder_item

DELIMITER = " "
"""Separates prompt and answer; the harness's default."""


# --- Prompts --------------------------------------------------------------------------------------


def asks_in_own_prompt(benchmark: Benchmark) -> bool:
    """Return whether a benchmark uses this project's prompt, with options' texts as answers."""
    return benchmark.whole_options


def shows_letters(benchmark: Benchmark) -> bool:
    """Return whether the prompt lists lettered options, so that their order can matter."""
    letters = all(len(label) == 1 for label in benchmark.labels)
    return letters and not asks_in_own_prompt(benchmark)


def build_prompt(
    benchmark: Benchmark, item: Item, prompt_template: str = "alpaca", tokenizer: Any = None
) -> str:
    """Return the prompt of an item, which precedes every answer.

    Parameters
    ----------
    prompt_template : str
        One of `grandrounds.data.prompts.TEMPLATES`. Applies if `asks_in_own_prompt`, as does
        `tokenizer`, which template `chat` requires.
    """
    if asks_in_own_prompt(benchmark):
        return own_prompt(prompt_template, item.question, tokenizer)
    if not shows_letters(benchmark):
        context = "\n".join(item.context)
        return f"Abstract: {context}\nQuestion: {item.question}\nAnswer:"
    options = zip(item.labels, item.options, strict=True)
    lettered = "".join(f"{label}. {option}\n" for label, option in options)
    heading = "" if benchmark.name == "medqa" else "Choices:\n"
    return f"Question: {item.question}\n{heading}{lettered}Answer:"


def answer_texts(benchmark: Benchmark, item: Item) -> tuple[str, ...]:
    """Return the answers whose likelihoods are compared: labels, or the options' texts."""
    return item.options if asks_in_own_prompt(benchmark) else item.labels


def prompt_hash(
    benchmark: Benchmark, prompt_template: str = "alpaca", tokenizer: Any = None
) -> str:
    """Return 16 hex digits that change with any change to the benchmark's prompts or answers."""
    probe = placeholder_item(benchmark)
    prompt = build_prompt(benchmark, probe, prompt_template, tokenizer)
    if asks_in_own_prompt(benchmark):
        answers = [response_text(prompt_template, option) + "\x00end" for option in probe.options]
    else:
        answers = [DELIMITER + label for label in probe.labels]
    return hashlib.sha256("\x00".join([prompt, *answers]).encode()).hexdigest()[:16]


def shuffled(
    benchmark: Benchmark, items: Sequence[Item], permutation_seed: int
) -> tuple[Item, ...]:
    """Return the items with their options in random order and `gold_index` adjusted.

    An item's order depends on the seed and its row only, so a subset of the items is shuffled like
    the whole. Options that refer to others by letter ("both A and B" in MedMCQA) change their
    meaning.

    Raises
    ------
    ValueError
        If the prompt lists no letters (see `shows_letters`).
    """
    if not shows_letters(benchmark):
        raise ValueError(f"benchmark {benchmark.name!r} shows no letters: no order to shuffle")
    return tuple(_shuffled_item(item, permutation_seed) for item in items)


def _shuffled_item(item: Item, permutation_seed: int) -> Item:
    order = list(range(len(item.options)))
    random.Random(f"{permutation_seed} {item.row}").shuffle(order)
    return replace(
        item,
        options=tuple(item.options[old] for old in order),
        gold_index=order.index(item.gold_index),
    )


# --- Tokens ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Answers of one item that share the same prompt tokens."""

    item: int
    """Index of the item."""
    options: tuple[int, ...]
    """Indices of the item's options."""
    prompt: tuple[int, ...]
    """Token IDs of the prompt, left-truncated if too long."""
    answers: tuple[tuple[int, ...], ...]
    """Token IDs of each answer, in the order of `options`."""
    truncated: bool
    """Whether the prompt was truncated."""


def requests(
    benchmark: Benchmark,
    items: Sequence[Item],
    tokenizer: Any,
    max_length: int,
    prompt_template: str = "alpaca",
) -> list[Request]:
    """Tokenise prompts and answers, and left-truncate prompts to the context length.

    Parameters
    ----------
    max_length : int
        Context length in tokens (see `context_length`). The last token of an answer is predicted
        but never an input, so prompt and answer together may have one more.
    prompt_template : str
        See `build_prompt`.

    Returns
    -------
    list of Request
        One per item, or several where answers of different lengths leave a truncated prompt
        different room.

    Raises
    ------
    ValueError
        If an answer leaves no room for a prompt.
    """
    encode = _encode_own if asks_in_own_prompt(benchmark) else _encode_harness
    found: list[Request] = []
    for number, (prompt, answers) in enumerate(
        encode(benchmark, items, tokenizer, prompt_template)
    ):
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for option, answer in enumerate(answers):
            room = max_length + 1 - len(answer)
            if room < 1:
                raise ValueError(f"{len(answer)} tokens of an answer in a context of {max_length}")
            by_prompt.setdefault(tuple(prompt[-room:]), []).append(option)
        for cut, options in by_prompt.items():
            of_options = tuple(tuple(answers[option]) for option in options)
            truncated = len(cut) < len(prompt)
            found.append(Request(number, tuple(options), cut, of_options, truncated))
    return found


Encoded = list[tuple[list[int], list[list[int]]]]
"""Token IDs of each item's prompt and of each of its answers."""


def _encode_harness(
    benchmark: Benchmark, items: Sequence[Item], tokenizer: Any, prompt_template: str
) -> Encoded:
    """Tokenise prompt and answer together, like the harness's `_encode_pair`."""
    texts = [build_prompt(benchmark, item) for item in items]
    wholes = [
        text + DELIMITER + answer
        for text, item in zip(texts, items, strict=True)
        for answer in answer_texts(benchmark, item)
    ]
    if not texts:
        return []
    prompts = tokenizer(texts)["input_ids"]
    found = iter(tokenizer(wholes)["input_ids"])
    return [
        (list(prompt), [list(next(found)[len(prompt) :]) for _ in answer_texts(benchmark, item)])
        for prompt, item in zip(prompts, items, strict=True)
    ]


def _encode_own(
    benchmark: Benchmark, items: Sequence[Item], tokenizer: Any, prompt_template: str
) -> Encoded:
    """Tokenise prompt and answer as in training, with the tokens that end an answer."""
    prompts = prompt_token_ids(tokenizer, prompt_template, [item.question for item in items])
    end = end_token_ids(tokenizer, prompt_template)
    encoded: Encoded = []
    for prompt, item in zip(prompts, items, strict=True):
        answers = answer_token_ids(tokenizer, prompt_template, answer_texts(benchmark, item))
        encoded.append((prompt, [[*answer, *end] for answer in answers]))
    return encoded


# --- Answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A model's answer to one item."""

    log_likelihoods: tuple[float, ...]
    """Natural log-likelihood of each option, summed over its tokens."""
    choice: int
    """Index of the option with the highest log-likelihood; ties: the first."""
    correct: bool
    """Whether `choice` is correct: the harness's `acc`."""
    correct_normalised: bool
    """Whether the option of greatest log-likelihood per character is correct: the harness's
    `acc_norm`. For letters this equals `correct`."""
    truncated: bool
    """Whether the prompt was left-truncated to fit the context."""


def answer_items(
    model: Any,
    tokenizer: Any,
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    batch_size: int | None = 64,
    prompt_template: str = "alpaca",
) -> list[Answer]:
    """Return a model's answers to items of a benchmark, as loaded or `shuffled`.

    Of items of one row, which differ in the order of their options, the question is read once.

    Parameters
    ----------
    model : causal language model of transformers, or a PEFT model around one
        Put into evaluation mode for the call.
    batch_size : int or None
        Maximum number of prompts per forward pass; None: see `grandrounds.model.prefill.prefill`.
    prompt_template : str
        See `build_prompt`.
    """
    from grandrounds.model.scoring import option_log_likelihoods

    asked = requests(benchmark, items, tokenizer, context_length(model.config), prompt_template)
    rows = [items[request.item].row for request in asked]
    scores = option_log_likelihoods(
        model,
        [request.prompt for request in asked],
        [request.answers for request in asked],
        batch_size=batch_size,
        families=rows if len({item.row for item in items}) < len(items) else None,
    )
    by_item: list[dict[int, float]] = [{} for _ in items]
    for request, row in zip(asked, scores, strict=True):
        by_item[request.item].update(zip(request.options, row, strict=True))
    truncated = {request.item for request in asked if request.truncated}
    return [
        _answer(benchmark, item, [found[i] for i in sorted(found)], number in truncated)
        for number, (item, found) in enumerate(zip(items, by_item, strict=True))
    ]


def _answer(
    benchmark: Benchmark, item: Item, log_likelihoods: list[float], truncated: bool
) -> Answer:
    texts = answer_texts(benchmark, item)
    per_character = [
        value / max(len(text), 1) for value, text in zip(log_likelihoods, texts, strict=True)
    ]
    choice = log_likelihoods.index(max(log_likelihoods))
    return Answer(
        log_likelihoods=tuple(log_likelihoods),
        choice=choice,
        correct=choice == item.gold_index,
        correct_normalised=per_character.index(max(per_character)) == item.gold_index,
        truncated=truncated,
    )


def context_length(config: Any) -> int:
    """Return a model's context length in tokens, from its configuration.

    Like the harness's `resolve_max_length` (`lm_eval/models/utils.py`): from the text part of a
    composite configuration, under the names that architectures use, in this order; 2,048 if absent.
    """
    text_config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(text_config, name, None)
        if value is not None:
            return int(value)
    return 2048
