"""What a `comparison.json` (docs/compare.md) holds, as the page needs it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grandrounds.errors import DataError
from grandrounds.statistics import without_rounding
from grandrounds.study.report.figures import NONE, decimals_of, fixed, is_number

LOSS = "held-out-loss"

FORMAT = 1

OWN, EVERYWHERE = "local, own part", "local, everywhere"
"""The two ways to judge a site's own model: on that site's questions, and on all sites'."""

STYLE = {
    "base": 4,
    "federated": 0,
    "centralised": 1,
    "local": 2,
    OWN: 2,
    EVERYWHERE: 6,
    "leave-one-out": 3,
}
"""Arm → how it is drawn."""

POINTS = " points"
"""Unit of a difference of accuracies."""

Json = Mapping[str, Any]


def read_comparison(file: Path) -> dict[str, Any]:
    """Read a comparison.

    Raises
    ------
    DataError
        If the file is not there, is no comparison, or is of another format.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict):
        raise DataError(f"{file} is no comparison: it has no arms. grandrounds compare writes one.")
    if content.get("format") != FORMAT:
        raise DataError(
            f"{file} has format {content.get('format')!r}, this version reads {FORMAT}. Repeat "
            "the comparison, or use the version that made it."
        )
    return content


def measures(comparison: Json) -> dict[str, tuple[str, str, float]]:
    """Return measure → (title, unit, factor)."""
    found = {LOSS: ("Held-out loss", "nats per answer token", 1.0)}
    for exam, what in comparison["exams"].items():
        found[exam] = (f"Accuracy: {what['title']}", "right answers, %", 100.0)
    return found


def arms_of(comparison: Json) -> dict[str, Json]:
    """Return the arms as they are shown: `local` twice, judged on its own part and everywhere."""
    found: dict[str, Json] = {}
    for name, arm in comparison["arms"].items():
        if name != "local" or not arm.get("everywhere"):
            found[name] = arm
            continue
        sites = {s: of.get("everywhere") or {} for s, of in (arm.get("sites") or {}).items()}
        found[OWN] = arm
        found[EVERYWHERE] = {**arm["everywhere"], "seeds": arm["seeds"], "sites": sites}
    return found


def estimate_of(holder: Json, measure: str) -> Json | None:
    """Return an estimate or a test of an arm, of a site of it, or of a gain; None if not there."""
    found = holder.get(LOSS) if measure == LOSS else (holder.get("accuracy") or {}).get(measure)
    return found if found and is_number(found.get("mean")) else None


def mean_of(estimate: Json, factor: float) -> float:
    """Return a mean as it is shown: a gain that is but rounding is 0."""
    mean = float(estimate["mean"])
    return factor * (without_rounding(mean) if _is_gain(estimate) else mean)


def interval_of(estimate: Json, factor: float) -> tuple[float, float] | None:
    """Return an interval as it is shown; None if there is none.

    Student's interval is a mean and a spread, and knows no ends: that of a share is cut at 0 and
    100 %, that of a gain in shares at -100 and 100 points.
    """
    if not estimate.get("interval"):
        return None
    low, high = (factor * end for end in estimate["interval"])
    if factor == 1:
        return low, high
    return max(low, -factor if _is_gain(estimate) else 0.0), min(high, factor)


def _is_gain(estimate: Json) -> bool:
    return "p" in estimate


def decimals_for(estimates: Iterable[Json | None], factor: float) -> int:
    """Return the decimals of all means and intervals of a column: 3 at least, of shares 1."""
    values: list[float] = []
    for found in estimates:
        if found is not None:
            values += (mean_of(found, factor), *(interval_of(found, factor) or ()))
    return decimals_of(values, least=3 if factor == 1 else 1)


def words(estimate: Json | None, factor: float, decimals: int, share: str = " %") -> str:
    """Return a mean and its interval in words; `share` is the unit of accuracies."""
    if estimate is None:
        return NONE
    unit = share if factor != 1 else ""
    shown = fixed(mean_of(estimate, factor), decimals) + unit
    if interval := interval_of(estimate, factor):
        low, high = (fixed(end, decimals) for end in interval)
        shown += f" ({low} to {high})"
    return shown
