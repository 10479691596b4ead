"""The exams of a comparison: two of the formulary, and benchmarks."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.data.common_and_rare import COMMON_AND_RARE
from grandrounds.data.formulary import FORMULARY
from grandrounds.data.formulary.facts import Question, questions
from grandrounds.study.comparison.results import RIGHT, WRONG
from grandrounds.study.comparison.units import Design
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, get_benchmark, load_items
from grandrounds.study.evaluation.likelihood import answer_items

LEARNED, KEPT, BENCHMARK = "learned", "kept", "benchmark"
"""What an exam measures: knowledge held by sites only, knowledge of the base, or anything else."""

GENERAL = "general"
"""The benchmark of general knowledge, which a base brings along."""

_COMMON_AND_RARE = (
    ("common", "facts of many records", LEARNED),
    ("rare", "facts of one record each", BENCHMARK),
    ("absent", "such facts of patients not in the data", BENCHMARK),
)
"""Groups of the exam on common and rare facts."""


@dataclass(frozen=True)
class Exam:
    """Questions that every adapter answers."""

    name: str
    """Its key in comparison.json."""
    title: str
    measures: str
    """`learned`, `kept` or `benchmark`."""
    benchmark: Benchmark
    """How its questions are asked."""
    items: tuple[Item, ...]
    site_of: tuple[int, ...] | None
    """The site that each question belongs to; None if the exam is not divided by site."""

    def entry(self) -> dict[str, Any]:
        """Return its entry in comparison.json."""
        return {
            "title": self.title,
            "n": len(self.items),
            "chance": statistics.fmean(1 / len(item.options) for item in self.items),
            "measures": self.measures,
            "by-site": self.site_of is not None,
        }

    def fingerprint(self) -> str:
        """Return a hash of the questions, 16 hex digits."""
        return hashlib.sha256(repr(self.items).encode()).hexdigest()[:16]


def exams_of(config: Config, design: Design) -> list[Exam]:
    """Return the exams that fit the data and the base, then the benchmarks of the design.

    There is an exam on private facts if the data are the formulary, and one on public facts if the
    base is the formulary's. Private facts are divided by site if the partitions are the
    formulary's own sites.

    Raises
    ------
    ConfigError, DataError
        If a benchmark is unknown, or its items cannot be loaded.
    """
    exams = []
    if config.is_on_formulary:
        private = questions("private")
        by_site = config.is_formulary_by_site
        site_of = tuple(question.site for question in private) if by_site else None
        exams.append(_formulary("private facts of the sites", LEARNED, private, site_of))
    if config.static.name == COMMON_AND_RARE:
        exams += [_group(COMMON_AND_RARE, *of) for of in _COMMON_AND_RARE]
    if config.model.name == FORMULARY:
        exams.append(_formulary("public facts, known to the base", KEPT, questions("public"), None))
    for name in design.benchmarks:
        benchmark = get_benchmark(name)
        items = load_items(benchmark, design.benchmark_data, design.limit)
        measures = KEPT if name == GENERAL else BENCHMARK
        exams.append(Exam(name, benchmark.title, measures, benchmark, items, None))
    return exams


PREFERRED, RANKED = "preferred", "ranked"
"""Exams on the held-out pairs of a run on preferences; a pair is a question of its own site."""

_PAIRS = {
    PREFERRED: ("held-out pairs with a margin above 0 against the base", BENCHMARK),
    RANKED: ("held-out pairs whose chosen answer is the likelier one", LEARNED),
}


def pair_entries(held_out: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Return the entries of the exams on held-out pairs, as `Exam.entry`, with `site-of`.

    Parameters
    ----------
    held_out
        Pairs of each site, by seed. They are divided by site where every seed holds out as many.
    """
    sites = [site for site, count in enumerate(held_out[0]) for _ in range(count)]
    alike = all(list(counts) == list(held_out[0]) for counts in held_out)
    return {
        name: {
            "title": title,
            "n": len(sites),
            "chance": 0.5,
            "measures": measures,
            "by-site": alike,
            "site-of": tuple(sites) if alike else None,
        }
        for name, (title, measures) in _PAIRS.items()
    }


def pair_answers(ratios: Sequence[float], margins: Sequence[float]) -> dict[str, str]:
    """Return the answers to these exams, of the pairs of all sites in order."""
    found = {PREFERRED: margins, RANKED: ratios}
    return {
        name: "".join(RIGHT if value > 0 else WRONG for value in values)
        for name, values in found.items()
    }


def _formulary(
    title: str, measures: str, exam: Sequence[Question], site_of: tuple[int, ...] | None
) -> Exam:
    made = _group(FORMULARY, exam[0].kind, title, measures)
    return replace(made, site_of=site_of)


def _group(name: str, group: str, title: str, measures: str) -> Exam:
    """Return one group of a built-in benchmark as an exam."""
    benchmark = get_benchmark(name)
    items = tuple(item for item in load_items(benchmark) if item.group == group)
    return Exam(group, title, measures, benchmark, items, None)


def sit(exam: Exam, model: Any, tokenizer: Any, prompt_template: str) -> str:
    """Return a model's answers, one character per question; see `results.RIGHT`."""
    answers = answer_items(
        model, tokenizer, exam.benchmark, exam.items, prompt_template=prompt_template
    )
    return "".join(RIGHT if answer.correct else WRONG for answer in answers)
