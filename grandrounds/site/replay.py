"""Replay against forgetting: public prompts, with the base's own answers, beside a site's examples.

Rehearsal of what a network knew before (Robins, 1995, "Catastrophic forgetting, rehearsal and
pseudorehearsal", Connection Science 7, 123-146): where its old examples are not at hand, the
network's own answers stand for them. Nothing of it depends on a site's data.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from grandrounds.config.keys import Config
from grandrounds.data.formulary import FORMULARY
from grandrounds.data.formulary.facts import public_flashcards
from grandrounds.data.general import PROMPTS
from grandrounds.data.tokenization import (
    TokenizedExample,
    answer_token_ids,
    end_token_ids,
    prompt_token_ids,
)
from grandrounds.model.resident import Resident, adapter_off
from grandrounds.model.scoring import generate_greedily
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.wire.schedule import visit_generator

ANSWER_TOKENS = 48
"""Most tokens of an answer that a base gives to a general prompt."""

Shown = tuple[TokenizedExample, ...]


def replayed(
    config: Config, resident: Resident, round_number: int, partition_id: int, batches: int
) -> list[Shown]:
    """Return what is replayed beside each batch of a visit; nothing without the key.

    The examples are drawn without replacement by the seed of the visit, and anew where a visit
    needs more than there are.
    """
    count = config.train.replay_examples
    if not count:
        return []
    known = public_examples(config, resident)
    generator = visit_generator(config.federation.seed, round_number, partition_id)
    drawn: list[int] = []
    while len(drawn) < batches * count:
        drawn += generator.permutation(len(known)).tolist()
    return [tuple(known[i] for i in drawn[b * count : (b + 1) * count]) for b in range(batches)]


def public_examples(config: Config, resident: Resident) -> Shown:
    """Return all that can be replayed on a base, tokenised.

    The embedded base: the cards of its public drugs, in the wordings that it was trained on, which
    are not those of the exam. Another base: `data.general.PROMPTS`, answered by the base itself.
    """
    tokenizer = run_tokenizer(config)
    if config.model.name == FORMULARY:
        return _cards(tokenizer, config.data.prompt)
    return _answered(resident, tokenizer, config.data.prompt)


@lru_cache(maxsize=2)
def _cards(tokenizer: Any, template: str) -> Shown:
    rows = public_flashcards()
    answers = answer_token_ids(tokenizer, template, [str(row["output"]) for row in rows])
    return _joined(tokenizer, template, [str(row["input"]) for row in rows], answers)


_ANSWERS: WeakKeyDictionary[Any, dict[tuple[Any, str], Shown]] = WeakKeyDictionary()
"""Model → tokenizer and template → what it answered. Weak: nothing here keeps a base loaded."""


def _answered(resident: Resident, tokenizer: Any, template: str) -> Shown:
    known = _ANSWERS.setdefault(resident.model, {})
    if (tokenizer, template) not in known:
        prompts = prompt_token_ids(tokenizer, template, PROMPTS)
        limits, stop = [ANSWER_TOKENS] * len(prompts), end_token_ids(tokenizer, template)
        with adapter_off(resident):
            answers = generate_greedily(resident.model, prompts, limits, stop, batch_size=8)
        known[tokenizer, template] = _joined(tokenizer, template, PROMPTS, answers)
    return known[tokenizer, template]


def _joined(tokenizer: Any, template: str, asked: Any, answers: list[list[int]]) -> Shown:
    prompts = prompt_token_ids(tokenizer, template, list(asked))
    end = end_token_ids(tokenizer, template)
    return tuple(
        TokenizedExample((*prompt, *answer, *end), len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    )
