"""The findings of the rehearsal as a table, a picture and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.config.words import percent
from grandrounds.study.audit.membership import auc_of_gaussian
from grandrounds.study.report.charts import Point, Series, line_chart
from grandrounds.study.report.svg import Axis
from grandrounds.study.tables import Table, interval

Findings = Mapping[str, Any]
"""One entry of `runner.demonstrate`."""

COLUMNS = (
    "epsilon of a patient",
    "common facts known",
    "rare facts extracted",
    "of patients not in the data",
    "AUC of membership",
    "AUC of one release",
)

NOTES = (
    "a rehearsal and a toy: server and site share one process, the base is embedded, the patients "
    "and drugs are invented. It shows what the mechanism does, not what it does to your data",
    "common fact: stated by 100 of 1,905 patients, known if the true value is the likeliest of 24, "
    "in a wording that no record has. Rare fact: stated by one patient, extracted if the greedy "
    "answer is the record's, word for word; chance is what patients not in the data give",
    "AUC of one release: what the best attack on one Gaussian release of the same epsilon and "
    "delta reaches, a yardstick and no bound. A measured AUC of 0.5 proves nothing: there may be a "
    "better attack. The guarantee is the epsilon",
)


def ordered(found: Sequence[Findings]) -> list[Findings]:
    """Return the findings from no guarantee to the strongest."""
    return sorted(found, key=lambda one: -(one["epsilon"] or float("inf")))


def table(found: Sequence[Findings]) -> Table:
    """Return the findings as a table."""
    return Table(COLUMNS, [_row(one) for one in ordered(found)], "common and rare facts")


def _row(one: Findings) -> tuple[str, ...]:
    low, high = one["membership"]["auc-interval"]
    epsilon = one["epsilon"]
    return (
        epsilon_text(one),
        f"{percent(one['common-known'] / one['common-facts'])} "
        f"({one['common-known']}/{one['common-facts']})",
        _share(one["rare"]),
        _share(one["absent"]),
        f"{one['membership']['auc']:.2f} (95 % interval {low:.2f} to {high:.2f})",
        f"{auc_of_gaussian(epsilon, one['guarantee']['delta']):.2f}" if epsilon else "1.00",
    )


def _share(extracted: Mapping[str, Any]) -> str:
    matches, number = extracted["matches"], extracted["canaries"]
    return f"{percent(matches / number)} ({matches}/{number})"


def epsilon_text(one: Findings) -> str:
    """Return the ε of an arm, or `no guarantee`."""
    return f"{one['epsilon']:.2f}" if one["epsilon"] else "no guarantee"


def picture(found: Sequence[Findings]) -> str:
    """Return common and rare facts against ε as SVG."""
    arms = ordered(found)[::-1]
    names = ("common facts known", "rare facts extracted", "chance: patients not in the data")
    series = [
        Series(name, [_point(name, place, one, style) for place, one in enumerate(arms)], style)
        for style, name in enumerate(names)
    ]
    return line_chart(
        "What the adapter knows, against epsilon",
        series,
        Axis("%", from_zero=True),
        len(arms) - 1,
        x_axis=("epsilon of a patient", [epsilon_text(one) for one in arms]),
    )


def _point(name: str, place: int, one: Findings, style: int) -> Point:
    """Return one share of an arm: of the common, the rare or the absent facts, by style."""
    counts = (
        (one["common-known"], one["common-facts"], one["common-interval"]),
        *(
            (one[kind]["matches"], one[kind]["canaries"], one[kind]["share-interval"])
            for kind in ("rare", "absent")
        ),
    )
    count, number, (low, high) = counts[style]
    share = 100 * count / number
    ends = f"95 % interval {interval((low, high))}"
    words = f"{name}, epsilon {epsilon_text(one)}: {share:.1f} % ({ends})"
    return Point(place + 0.06 * (style - 1), share, words, (100 * low, 100 * high))


def outcome(found: Sequence[Findings]) -> list[str]:
    """Return a sentence for each arm; nothing is said that was not measured in it."""
    said = []
    for one in ordered(found):
        rare, absent = one["rare"], one["absent"]
        sure = rare["share-interval"][0] > absent["share-interval"][1]
        memory = "rare facts can be extracted" if sure else "rare facts are not told from chance"
        known = percent(one["common-known"] / one["common-facts"], 0)
        claim = f"epsilon {epsilon_text(one)}" if one["epsilon"] else "without a guarantee"
        said.append(f"{claim}: {memory}; {known} of the common facts are known")
    return said
