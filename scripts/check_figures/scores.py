"""The accuracies of a run, from its evaluations, else from the exam at the end of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scripts.check_figures.raw import Json, Raw
from scripts.check_figures.sheet import Cell

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""

FORMULARY = "Formulary (fictional)"

GREEDY = "greedy"
"""The protocol that compares a model's own words."""

FACTS = ("private", "public")
"""Groups of the formulary's questions."""


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share; no numbers if it is none."""
    if not 0 <= correct <= n:
        return math.nan, math.nan
    share, z2 = correct / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Score:
    """One model on one set of questions."""

    protocol: str
    benchmark: str
    group: str
    model: str
    counts: list[float]
    """Correct answers and questions; of a mean over answers their number."""
    percent: float
    interval: list[float]
    """In percent; empty where there is none."""

    @property
    def round(self) -> int | None:
        number = self.model.removeprefix("peft_")
        return int(number) if number.isdigit() else None

    @property
    def digits(self) -> list[float]:
        """The number in the model's name."""
        return [] if self.round is None else [self.round]

    @property
    def shown(self) -> list[float]:
        """Share, counts and interval, as a mark says them."""
        return [self.percent, *self.counts, *self.interval]


def of_counts(protocol: str, title: str, group: str, model: str, part: Json) -> Score:
    """Return a share of right answers, recomputed from the counts."""
    correct, n = part["correct"], part["n"]
    ends = [100 * end for end in wilson(correct, n)]
    return Score(protocol, title, group, model, [correct, n], 100 * correct / n, ends)


def brings_own_data(raw: Raw) -> bool:
    """Whether a real site trains on other data than the formulary."""
    real = [site for site in raw.sites if "base-content" in site]
    return any(not str(site.get("data-source") or "").startswith("formulary") for site in real)


def scores(raw: Raw) -> list[Score]:
    """Return every score of a run; of two evaluations of the same the first."""
    found: dict[tuple[str, ...], Score] = {}

    def add(score: Score) -> None:
        key = (score.protocol, score.benchmark, score.group, score.model)
        found.setdefault(key, score)

    for evaluation in raw.evaluations:
        protocol = evaluation["protocol"]
        for row in evaluation["rows"]:
            title, model = row["title"], row["model"]
            for part in row["groups"] or [row]:
                group = "exact match" if protocol == GREEDY else part.get("group", "")
                add(of_counts(protocol, title, group, model, part))
            if protocol == GREEDY:
                ends = [100 * end for end in row["f1"]["interval"] or ()]
                mean = 100 * row["f1"]["mean"]
                add(Score(protocol, title, "token F1", model, [row["n"]], mean, ends))
    if FORMULARY not in {score.benchmark for score in found.values()}:
        for group, of in (raw.summary.get("formulary") or {}).items():
            if group == "private" and brings_own_data(raw):
                continue  # nobody holds these facts
            for which, part in of.items():
                model = "base" if which == "base" else f"peft_{raw.rounds}"
                add(of_counts("likelihood", FORMULARY, group, model, part))
    return list(found.values())


def pairs(raw: Raw) -> list[tuple[str, Score | None, Score]]:
    """Return name of the questions, base and last checkpoint, what may be forgotten last."""
    groups: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores(raw):
        groups.setdefault((score.protocol, score.benchmark, score.group), []).append(score)
    found = []
    for (_, benchmark, group), asked in groups.items():
        base = next((score for score in asked if score.model == "base"), None)
        tuned = [score for score in asked if score.round is not None]
        if tuned:
            is_facts = group in FACTS
            name = f"{group} facts" if is_facts else ", ".join(filter(None, (benchmark, group)))
            found.append((name, base, max(tuned, key=lambda score: score.round or 0)))
    return sorted(found, key=lambda pair: pair[0] == "public facts")


def figures(raw: Raw) -> list[list[Score]]:
    """Return the scores of each figure of accuracy, in order."""
    found: dict[tuple[str, str], list[Score]] = {}
    for score in scores(raw):
        found.setdefault((score.protocol, score.benchmark), []).append(score)
    return list(found.values())


def row_of(score: Score) -> list[Cell]:
    """Return a score as a row of its table."""
    return [[], score.digits, score.counts, [score.percent], score.interval or "-"]


def losses(raw: Raw) -> list[float]:
    """Return the held-out loss of each model that answered the held-out rows."""
    found: dict[str, Any] = {}
    for evaluation in raw.evaluations:
        if evaluation["protocol"] == GREEDY:
            for row in evaluation["rows"]:
                found.setdefault(row["model"], row["loss"]["nats_per_token"])
    return list(found.values())
