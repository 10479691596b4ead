"""What a model knows of common and rare facts: by rank, word for word, and beside the base.

A common fact is known if its value is the likeliest of all 24, asked in words that no record has. A
rare one is extracted if the greedy answer to its record's question is the record's, word for word.
The same questions of patients who are not in the data show what chance gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grandrounds.data.common_and_rare.records import Fact, Record, common_facts, world
from grandrounds.data.tokenization import answer_token_ids, end_token_ids, prompt_token_ids
from grandrounds.model.scoring import generate_greedily, option_log_likelihoods, stop_tokens
from grandrounds.statistics import wilson_interval
from grandrounds.study.audit.extraction import extraction, rank_of
from grandrounds.study.audit.membership import membership


@dataclass(frozen=True)
class Answers:
    """How a model answered; lists of records hold the rare patients first, then the absent."""

    common_ranks: Sequence[int]
    """Rank of each common fact's value among 24, from 1."""
    ranks: Sequence[int]
    """The same of each record's value."""
    greedy: Sequence[bool]
    """Whether the greedy answer is the record's, word for word."""
    shares: Sequence[float]
    """Log share of the record's value in the probability of all 24."""


@dataclass(frozen=True)
class Examiner:
    """A model and how it is asked."""

    model: Any
    tokenizer: Any
    template: str
    """A value of `data.prompt-template`."""

    def answers(self, draw: int) -> Answers:
        """Hold the exam on one draw of the rare patients."""
        facts, records = common_facts(), examined(draw)
        of_common = self._log_likelihoods([fact.question for fact in facts], facts)
        questions, stated = [r.question for r in records], [r.fact for r in records]
        of_records = self._log_likelihoods(questions, stated)
        return Answers(
            common_ranks=[rank_of(*pair) for pair in _with_true(of_common, facts)],
            ranks=[rank_of(*pair) for pair in _with_true(of_records, stated)],
            greedy=self._is_answered(questions, stated),
            shares=[_share(*pair) for pair in _with_true(of_records, stated)],
        )

    def _log_likelihoods(
        self, questions: Sequence[str], facts: Sequence[Fact]
    ) -> list[list[float]]:
        """Return for each question the log-likelihood of every value of its fact's list."""
        prompts = prompt_token_ids(self.tokenizer, self.template, questions)
        end, ids = end_token_ids(self.tokenizer, self.template), self._ids(facts)
        return option_log_likelihoods(
            self.model, prompts, [[[*ids[value], *end] for value in fact.values] for fact in facts]
        )

    def _is_answered(self, questions: Sequence[str], facts: Sequence[Fact]) -> list[bool]:
        end, ids = end_token_ids(self.tokenizer, self.template), self._ids(facts)
        prompts = prompt_token_ids(self.tokenizer, self.template, questions)
        limits = [max(len(ids[value]) for value in fact.values) for fact in facts]
        stops = stop_tokens(self.model, self.tokenizer, end)
        written = generate_greedily(self.model, prompts, limits, stops)
        return [list(w) == ids[fact.value] for w, fact in zip(written, facts, strict=True)]

    def _ids(self, facts: Sequence[Fact]) -> dict[str, list[int]]:
        values = sorted({value for fact in facts for value in fact.values})
        ids = answer_token_ids(self.tokenizer, self.template, values)
        return {value: list(of_value) for value, of_value in zip(values, ids, strict=True)}


def examined(draw: int) -> tuple[Record, ...]:
    """Return the records that are asked for: of the rare patients, then of the absent ones."""
    return (*world(draw).rare, *world(draw).absent)


def _with_true(
    rows: Sequence[Sequence[float]], facts: Sequence[Fact]
) -> list[tuple[Sequence[float], int]]:
    trues = [list(fact.values).index(fact.value) for fact in facts]
    return list(zip(rows, trues, strict=True))


def _share(scores: Sequence[float], true: int) -> float:
    highest = max(scores)
    return scores[true] - highest - math.log(sum(math.exp(s - highest) for s in scores))


def _of_four(rank: int, length: int) -> float:
    """Return how often a value of this rank is the likeliest beside three others of its list.

    C(length - rank, 3) / C(length - 1, 3): the three others, drawn at random, all rank below it.
    """
    return math.comb(length - rank, 3) / math.comb(length - 1, 3)


def knowledge(tuned: Answers, base: Answers) -> dict[str, Any]:
    """Return what a tuned model knows, as JSON values.

    Membership is told by how much training raised the log share of a record's value.
    """
    number = len(tuned.ranks)
    is_in = [row < number // 2 for row in range(number)]
    gains = np.array(tuned.shares) - np.array(base.shares)
    known, common = sum(rank == 1 for rank in tuned.common_ranks), len(tuned.common_ranks)
    length = len(common_facts()[0].values)
    rare, absent = (
        extraction(tuned.greedy, tuned.ranks, length, chosen)
        for chosen in (is_in, [not one for one in is_in])
    )
    return {
        "common-known": known,
        "common-known-by-base": sum(rank == 1 for rank in base.common_ranks),
        "common-facts": common,
        "common-interval": list(wilson_interval(known, common)),
        "common-of-four": sum(_of_four(rank, length) for rank in tuned.common_ranks) / common,
        "rare": rare.as_dict(),
        "absent": absent.as_dict(),
        "membership": membership(gains, np.array(is_in)).as_dict(),
    }
