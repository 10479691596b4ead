"""Reads a `comparison.json`, whose format docs/compare.md describes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.errors import DataError
from grandrounds.statistics import without_rounding
from grandrounds.study.comparison.results import EVERYWHERE, FORMAT, LOSS
from grandrounds.study.comparison.units import (
    BASE,
    CENTRALISED,
    FEDERATED,
    LEAVE_ONE_OUT,
    LOCAL,
    PERSONAL,
    PRIVATE,
)
from grandrounds.study.report.charts import Interval
from grandrounds.study.tables import NONE, decimals_of, fixed, is_number

LOCAL_OWN, LOCAL_EVERYWHERE = "local, own part", "local, everywhere"
"""The local arm evaluated on each site's own questions, and on the questions of all sites."""

PERSONAL_OWN, PERSONAL_EVERYWHERE = "personal, own part", "personal, everywhere"
"""The same of personal adapters."""

SHOWN = {LOCAL: (LOCAL_OWN, LOCAL_EVERYWHERE), PERSONAL: (PERSONAL_OWN, PERSONAL_EVERYWHERE)}
"""Arm with an adapter for each site → how it is shown: on its own part and everywhere."""

STYLE = {
    BASE: 4,
    FEDERATED: 0,
    PRIVATE: 5,
    CENTRALISED: 1,
    LOCAL: 2,
    LOCAL_OWN: 2,
    LOCAL_EVERYWHERE: 6,
    LEAVE_ONE_OUT: 3,
    PERSONAL: 3,
    PERSONAL_OWN: 3,
    PERSONAL_EVERYWHERE: 5,
}
"""Arm → style of its marks."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """Held-out loss, or the accuracy on an exam."""

    key: str
    """`LOSS`, or the exam's key."""
    title: str
    exam: Json
    """The exam's entry in comparison.json; empty for held-out loss."""
    of_pairs: bool = False
    """Whether a loss is that of preferences."""

    @property
    def factor(self) -> float:
        """Factor from values of the file to values on the page: accuracies are in percent there."""
        return 1.0 if self.key == LOSS else 100.0

    @property
    def unit(self) -> str:
        """Unit of the measure."""
        per = "pair" if self.of_pairs else "answer token"
        return f"nats per {per}" if self.key == LOSS else "accuracy, %"

    def estimate(self, holder: Json) -> Json | None:
        """Return the estimate or test of an arm, a site or a gain; None if there is none."""
        accuracy = holder.get("accuracy") or {}
        found = holder.get(LOSS) if self.key == LOSS else accuracy.get(self.key)
        return found if found and is_number(found.get("mean")) else None

    def mean(self, estimate: Json) -> float:
        """Return a mean as shown: a gain within rounding error is 0."""
        mean = float(estimate["mean"])
        return self.factor * (without_rounding(mean) if is_gain(estimate) else mean)

    def interval(self, estimate: Json) -> Interval | None:
        """Return an interval as shown; None if there is none.

        Student's interval does not know the range of a measure: that of a loss is cut at 0, that of
        a share at 0 and 100 %, and that of the gain of a share at -100 and 100 points.
        """
        if not estimate.get("interval"):
            return None
        low, high = (self.factor * end for end in estimate["interval"])
        if self.key == LOSS:
            return low if is_gain(estimate) else max(low, 0.0), high
        return max(low, -self.factor if is_gain(estimate) else 0.0), min(high, self.factor)

    def decimals(self, estimates: Iterable[Json | None]) -> int:
        """Return the decimals of a column of means and intervals: at least 3, of shares 1."""
        values: list[float] = []
        for found in estimates:
            if found is not None:
                values += (self.mean(found), *(self.interval(found) or ()))
        return decimals_of(values, least=3 if self.key == LOSS else 1)

    def value(self, estimate: Json, decimals: int) -> str:
        """Format a mean."""
        return fixed(self.mean(estimate), decimals)

    def words(self, estimate: Json | None, decimals: int) -> str:
        """Format a mean with its unit and interval."""
        if estimate is None:
            return NONE
        unit = "" if self.key == LOSS else " points" if is_gain(estimate) else " %"
        shown = self.value(estimate, decimals) + unit
        if interval := self.interval(estimate):
            low, high = (fixed(end, decimals) for end in interval)
            shown += f" ({low} to {high})"
        return shown


def is_gain(estimate: Json) -> bool:
    """Whether an estimate is a test of a gain."""
    return "p" in estimate


def read_comparison(file: Path) -> dict[str, Any]:
    """Read a comparison.

    Raises
    ------
    DataError
        If the file does not exist, is not a comparison, or has another format.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict):
        raise DataError(
            f"{file} is not a comparison: it has no arms. grandrounds compare writes one."
        )
    if content.get("format") != FORMAT:
        raise DataError(
            f"{file} has format {content.get('format')!r}, but this version reads {FORMAT}. Repeat "
            "the comparison, or use the version that made it."
        )
    return content


def measures(comparison: Json) -> dict[str, Measure]:
    """Return the measures of a comparison by key."""
    exams = {
        key: Measure(key, f"Accuracy: {exam['title']}", exam)
        for key, exam in comparison["exams"].items()
    }
    of_pairs = comparison.get("config", {}).get("train.objective") == "dpo"
    return {LOSS: Measure(LOSS, "Held-out loss", {}, of_pairs), **exams}


def arms_of(comparison: Json) -> dict[str, Json]:
    """Return the arms as shown; those with an adapter for each site twice, see `SHOWN`."""
    found: dict[str, Json] = {}
    for name, arm in comparison["arms"].items():
        if name not in SHOWN or not arm.get(EVERYWHERE):
            found[name] = arm
            continue
        sites = {s: of.get(EVERYWHERE) or {} for s, of in (arm.get("sites") or {}).items()}
        own, everywhere = SHOWN[name]
        found[own] = arm
        found[everywhere] = {**arm[EVERYWHERE], "seeds": arm["seeds"], "sites": sites}
    return found
