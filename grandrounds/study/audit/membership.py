"""How well scores tell members from non-members: AUC, and hits at a few false alarms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from grandrounds.statistics import CONFIDENCE
from grandrounds.study.audit.one_run import Flags, Scores
from grandrounds.study.plan.privacy import gaussian_noise

FALSE_ALARMS = (0.01, 0.001)
"""False positive rates at which the true positive rate is measured: an attack that is sure of a few
members does harm, whatever it gets right on average (Carlini et al., 2022, section 3)."""


@dataclass(frozen=True)
class Hits:
    """Members found at a few false alarms."""

    false_alarm_rate: float
    """Largest share of non-members that may be taken for members."""
    found: int
    members: int
    interval: tuple[float, float]
    """95 % interval of found / members, by Clopper and Pearson; the threshold counts as given."""

    @property
    def rate(self) -> float:
        """True positive rate."""
        return self.found / self.members


@dataclass(frozen=True)
class Membership:
    """How well one score tells members from non-members."""

    auc: float
    """Probability that a member's score is the higher one, ties counted half. 0.5: by chance."""
    interval: tuple[float, float]
    """95 % interval of the AUC."""
    members: int
    others: int
    hits: tuple[Hits, ...]
    """One for each of `FALSE_ALARMS`."""

    def as_dict(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {
            "auc": self.auc,
            "auc-interval": list(self.interval),
            "members": self.members,
            "non-members": self.others,
            "tpr-at-fpr": [
                {
                    "fpr": one.false_alarm_rate,
                    "tpr": one.rate,
                    "found": one.found,
                    "interval": list(one.interval),
                }
                for one in self.hits
            ],
        }


def membership(scores: Scores, is_member: Flags) -> Membership:
    """Measure how well scores tell members from non-members.

    Parameters
    ----------
    scores : float64 array
        Higher: more likely a member.
    is_member : bool array
        At least one of each kind.

    Raises
    ------
    ValueError
        If one kind is missing, or a score is not a number.
    """
    members, others = scores[is_member], scores[~is_member]
    if not len(members) or not len(others):
        raise ValueError(f"{len(members)} members and {len(others)} others: needs both")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not a finite number")
    area = auc(members, others)
    return Membership(
        auc=area,
        interval=auc_interval(area, len(members), len(others)),
        members=len(members),
        others=len(others),
        hits=tuple(hits(members, others, rate) for rate in FALSE_ALARMS),
    )


def auc(members: Scores, others: Scores) -> float:
    """Return the share of pairs in which the member has the higher score, ties counted half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    upto = np.searchsorted(ordered, members, side="right")
    return float((below + upto).sum() / (2 * len(members) * len(others)))


def auc_interval(area: float, members: int, others: int) -> tuple[float, float]:
    """Return the 95 % interval of an AUC; it has a width at 0 and 1 too.

    Method 5 of Newcombe (2006), Confidence intervals for an effect size measure based on the
    Mann-Whitney statistic, part 2: the bounds t solve |t - AUC| = 1.96 sqrt(V(t)), where V is the
    variance of Hanley and McNeil (1982) with (members + others) / 2 in the place of both numbers.
    """
    size = (members + others) / 2 - 1

    def distance(t: float) -> float:
        spread = t * (1 - t) * (1 + size * (1 - t) / (2 - t) + size * t / (1 + t))
        return 1.959964 * math.sqrt(max(0.0, spread) / (members * others))

    def solved(end: float) -> float:
        inner, outer = area, end
        for _ in range(60):
            middle = (inner + outer) / 2
            is_inside = abs(middle - area) <= distance(middle)
            inner, outer = (middle, outer) if is_inside else (inner, middle)
        return inner

    return solved(0.0), solved(1.0)


def hits(members: Scores, others: Scores, rate: float) -> Hits:
    """Return how many members score above all but a share of the others."""
    allowed = math.floor(rate * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed]
    found = int((members > threshold).sum())
    return Hits(rate, found, len(members), clopper_pearson(found, len(members)))


def clopper_pearson(found: int, number: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share (Clopper and Pearson, 1934)."""
    from scipy.stats import binomtest

    interval = binomtest(found, number).proportion_ci(confidence_level=CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def auc_of_gaussian(epsilon: float, delta: float) -> float:
    """Return the AUC against one Gaussian release with (ε, delta): Phi(1 / (z sqrt(2))).

    z is its noise multiplier. Many subsampled steps together are close to one such release (Dong,
    Roth and Su, Gaussian differential privacy, 2022, section 3), so this is a yardstick for what a
    guarantee allows, not a bound.
    """
    return NormalDist().cdf(1 / (gaussian_noise(epsilon, delta) * math.sqrt(2)))
