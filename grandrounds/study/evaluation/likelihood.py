"""Protocol `likelihood`: which answer a model finds likeliest, as lm-evaluation-harness asks.

The facts are those of lm-evaluation-harness 0.4.13 (https://pypi.org/project/lm-eval/0.4.13/):

- `lm_eval/tasks/pubmedqa/` (task `pubmedqa`, version 1.0): `preprocess_pubmedqa.py`, answers
  `yes`, `no`, `maybe`;
- `lm_eval/tasks/medqa/` (task `medqa_4options`): `preprocess_medqa.py`, answers `A` to `D`;
- `lm_eval/tasks/medmcqa/` (task `medmcqa`): `utils_medmcqa.py`, answers `A` to `D`;
- `lm_eval/tasks/careqa/` (task `careqa_en`, version 1.0): `utils.py`, MedMCQA's text;
- `lm_eval/api/task.py`: a blank (`target_delimiter`) stands between prompt and answer, the answer
  with the greatest log-likelihood is chosen, the first on ties; `acc_norm` divides each by the
  characters of its answer, without that blank;
- `lm_eval/api/model.py`, `_encode_pair`: prompt and answer are tokenised together, and the answer's
  tokens are those beyond the prompt's own length; blanks at the end of the prompt belong to the
  answer;
- `lm_eval/models/huggingface.py`: special tokens as the tokenizer adds them by itself
  (`add_bos_token` not given), no examples before the question, no chat template, and where prompt
  and answer are longer than the context, tokens are cut from the left.

A benchmark with letters that is not named there is asked in MedMCQA's words. The formulary is asked
in this project's own prompt, and its answers are what the options say, with the end of sequence:
the exam of `grandrounds.site.exam`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grandrounds.data.prompts import build_prompt as own_prompt
from grandrounds.data.prompts import response_text
from grandrounds.data.tokenization import answer_token_ids, prompt_token_ids
from grandrounds.study.evaluation.benchmarks import Benchmark, Item

DELIMITER = " "
"""What stands between a prompt and an answer; the harness's default."""


# --- Prompts --------------------------------------------------------------------------------------


def _abstract(item: Item) -> str:
    context = "\n".join(item.context)
    return f"Abstract: {context}\nQuestion: {item.question}\nAnswer:"


def _lettered(item: Item) -> str:
    return "".join(
        f"{label}. {option}\n" for label, option in zip(item.labels, item.options, strict=True)
    )


def _choices(item: Item) -> str:
    return f"Question: {item.question}\nChoices:\n{_lettered(item)}Answer:"


def _medqa(item: Item) -> str:
    return f"Question: {item.question}\n{_lettered(item)}Answer:"


def asks_in_own_prompt(benchmark: Benchmark) -> bool:
    """Say whether a benchmark is asked in this project's prompt, and answered without letters."""
    return benchmark.built_in is not None


def shows_letters(benchmark: Benchmark) -> bool:
    """Say whether options stand in the prompt under letters, so that their order can matter."""
    letters = all(len(label) == 1 for label in benchmark.labels)
    return letters and not asks_in_own_prompt(benchmark)


def build_prompt(
    benchmark: Benchmark, item: Item, prompt_template: str = "alpaca", tokenizer: Any = None
) -> str:
    """Return the text that is put before every answer.

    Parameters
    ----------
    prompt_template : str
        One of `grandrounds.data.prompts.TEMPLATES`; read only where `asks_in_own_prompt`, as is
        `tokenizer`, which template `chat` needs.
    """
    if asks_in_own_prompt(benchmark):
        return own_prompt(prompt_template, item.question, tokenizer)
    if not shows_letters(benchmark):
        return _abstract(item)
    return _medqa(item) if benchmark.name == "medqa" else _choices(item)


def answer_texts(benchmark: Benchmark, item: Item) -> tuple[str, ...]:
    """Return the answers whose likelihoods are compared: labels, or what the options say."""
    return item.options if asks_in_own_prompt(benchmark) else item.labels


def prompt_hash(
    benchmark: Benchmark, prompt_template: str = "alpaca", tokenizer: Any = None
) -> str:
    """Return 16 hex digits that change whenever a prompt or an answer of the benchmark changes."""
    labels = benchmark.labels
    options = tuple(f"\x00option {label}\x00" for label in labels)
    context = ("\x00one\x00", "\x00two\x00")
    probe = Item(1, "\x00question\x00", context, options, labels, gold_index=0, group="")
    prompt = build_prompt(benchmark, probe, prompt_template, tokenizer)
    if asks_in_own_prompt(benchmark):
        answers = [response_text(prompt_template, option) + "\x00end" for option in options]
    else:
        answers = [DELIMITER + label for label in labels]
    return hashlib.sha256("\x00".join([prompt, *answers]).encode()).hexdigest()[:16]


def shuffled(
    benchmark: Benchmark, items: Sequence[Item], permutation_seed: int
) -> tuple[Item, ...]:
    """Return the items with their options in random order, the right one followed along.

    Each item has its own order, decided by the seed and the item's row alone, so a part of the
    items is shuffled as the whole is. An option that speaks of others ("both A and B", as some of
    MedMCQA do) no longer says what it said.

    Raises
    ------
    ValueError
        If no letters are shown, so that there is nothing to shuffle (see `shows_letters`).
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
    """Answers of one item that follow the same prompt tokens."""

    item: int
    """Position of the item in the caller's sequence."""
    options: tuple[int, ...]
    """Positions of the item's options, from 0."""
    prompt: tuple[int, ...]
    """Token ids of the prompt, cut on the left where it was too long."""
    answers: tuple[tuple[int, ...], ...]
    """Token ids of each answer, in the order of `options`."""


@dataclass(frozen=True)
class Requests:
    """Everything that a model is asked."""

    requests: tuple[Request, ...]
    """One per item; several where answers of different lengths leave different room to a prompt
    that had to be cut."""
    truncated: frozenset[int]
    """Positions of the items whose prompt was cut."""


def requests(
    benchmark: Benchmark,
    items: Sequence[Item],
    tokenizer: Any,
    max_length: int,
    prompt_template: str = "alpaca",
) -> Requests:
    """Tokenise prompts and answers, and cut prompts on the left to what the context holds.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The model's own.
    max_length : int
        Tokens that the model can read (see `context_length`). The last token of an answer is
        predicted but never read, so prompt and answer together may have one more.
    prompt_template : str
        See `build_prompt`.

    Raises
    ------
    ValueError
        If an answer leaves no room for a prompt.
    """
    encode = _encode_own if asks_in_own_prompt(benchmark) else _encode_harness
    made: list[Request] = []
    truncated = set()
    encoded = encode(benchmark, items, tokenizer, prompt_template)
    for number, (prompt, answers) in enumerate(encoded):
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for option, answer in enumerate(answers):
            room = max_length + 1 - len(answer)
            if room < 1:
                raise ValueError(f"{len(answer)} tokens of an answer in a context of {max_length}")
            if len(prompt) > room:
                truncated.add(number)
            by_prompt.setdefault(tuple(prompt[-room:]), []).append(option)
        made += [
            Request(number, tuple(options), cut, tuple(tuple(answers[o]) for o in options))
            for cut, options in by_prompt.items()
        ]
    return Requests(tuple(made), frozenset(truncated))


Encoded = list[tuple[list[int], list[list[int]]]]
"""For each item the tokens of its prompt, and of every answer."""


def _encode_harness(
    benchmark: Benchmark, items: Sequence[Item], tokenizer: Any, prompt_template: str
) -> Encoded:
    """Tokenise prompt and answer together, as the harness's `_encode_pair`."""
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
    """Tokenise prompt and answer apart, as training does; an answer ends with the sequence."""
    prompts = prompt_token_ids(tokenizer, prompt_template, [item.question for item in items])
    encoded: Encoded = []
    for prompt, item in zip(prompts, items, strict=True):
        answers = answer_token_ids(tokenizer, prompt_template, answer_texts(benchmark, item))
        encoded.append((prompt, [[*answer, tokenizer.eos_token_id] for answer in answers]))
    return encoded


# --- Answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a model thinks of one item's options."""

    log_likelihoods: tuple[float, ...]
    """Of each option: natural logarithms, summed over the tokens."""
    choice: int
    """Position of the likeliest option, the first on ties; for `statistics.position_bias`."""
    choice_normalised: int
    """The same by log-likelihood per character of the answer. Letters all have one character, so
    there it is the same choice."""
    correct: bool
    """Whether `choice` is right: the harness's `acc`."""
    correct_normalised: bool
    """Whether `choice_normalised` is right: the harness's `acc_norm`."""
    truncated: bool
    """Whether the prompt was cut on the left to fit the context."""


def answer_items(
    model: Any,
    tokenizer: Any,
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    batch_size: int = 64,
    prompt_template: str = "alpaca",
    progress: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Ask a model every item.

    Parameters
    ----------
    model : causal language model of transformers, or a PEFT model around one
        Used in evaluation mode, put back into its former mode afterwards.
    tokenizer : transformers tokenizer
        The model's own.
    benchmark : Benchmark
        To which the items belong.
    items : sequence of Item
        As loaded, or `shuffled`.
    batch_size : int
        Most prompts in one forward pass.
    prompt_template : str
        See `build_prompt`.
    progress : callable
        Called with the number of items that a batch has finished.

    Returns
    -------
    list of Answer
        In the order of `items`.
    """
    from grandrounds.model.scoring import option_log_likelihoods

    asked = requests(benchmark, items, tokenizer, context_length(model.config), prompt_template)
    scores = option_log_likelihoods(
        model,
        [request.prompt for request in asked.requests],
        [request.answers for request in asked.requests],
        batch_size=batch_size,
        progress=_by_items(progress, len(items), len(asked.requests)),
    )
    by_item: list[dict[int, float]] = [{} for _ in items]
    for request, row in zip(asked.requests, scores, strict=True):
        by_item[request.item].update(zip(request.options, row, strict=True))
    return [
        _answer(benchmark, item, [found[i] for i in sorted(found)], number in asked.truncated)
        for number, (item, found) in enumerate(zip(items, by_item, strict=True))
    ]


def _by_items(progress: Callable[[int], None], items: int, requests: int) -> Callable[[int], None]:
    """Translate finished requests into finished items, of which some make several requests."""
    done = 0

    def translated(finished: int) -> None:
        nonlocal done
        before, done = done, done + finished
        progress(done * items // requests - before * items // requests)

    return translated


def _answer(
    benchmark: Benchmark, item: Item, log_likelihoods: Sequence[float], truncated: bool
) -> Answer:
    texts = answer_texts(benchmark, item)
    per_character = [
        value / max(len(text), 1) for value, text in zip(log_likelihoods, texts, strict=True)
    ]
    choice = list(log_likelihoods).index(max(log_likelihoods))
    choice_normalised = per_character.index(max(per_character))
    return Answer(
        log_likelihoods=tuple(log_likelihoods),
        choice=choice,
        choice_normalised=choice_normalised,
        correct=choice == item.gold_index,
        correct_normalised=choice_normalised == item.gold_index,
        truncated=truncated,
    )


def context_length(config: Any) -> int:
    """Return how many tokens a model can read, as its configuration says.

    The harness's `resolve_max_length` (`lm_eval/models/utils.py`): the text part of a composite
    configuration, and the names that architectures have for it, in this order; else 2,048.
    """
    text_config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(text_config, name, None)
        if value is not None:
            return int(value)
    return 2048
