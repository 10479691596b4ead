"""The numbers in a text, and whether they are a value rounded as they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_NUMBER = re.compile(
    r"(?<![A-Za-z0-9.])(?P<less>< )?(?P<sign>[-+\u2212]?)(?P<whole>\d[\d,]*)(?P<rest>\.\d+)?"
    r"(?P<power>e[-+]?\d+)?(?P<kilo>k?)(?![A-Za-z0-9])"
)


@dataclass(frozen=True)
class Shown:
    """A number as a text shows it."""

    value: float
    half: float
    """Half a unit of its last digit."""
    is_bound: bool = False
    """Whether the text says `< 0.001`."""

    def shows(self, raw: float) -> bool:
        """Whether it is a raw value, rounded to as many digits as are shown."""
        if self.is_bound:
            return raw < self.value
        return abs(self.value - raw) <= self.half * (1 + 1e-6) + 1e-9 * abs(raw)


def numbers_in(text: str, names: Sequence[str] = ()) -> list[Shown]:
    """Return the numbers of a text that are not part of a word, in order.

    Parameters
    ----------
    names
        Texts that are taken out first: names of files, models and sites, and reasons.
    """
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = text.replace(name, "~")
    found = []
    for match in _NUMBER.finditer(text):
        if match["sign"] == "-" and text[match.start() - 1 : match.start()].strip(" (→"):
            sign = ""  # a hyphen within a word
        else:
            sign = match["sign"].replace("\u2212", "-")
        whole, rest = match["whole"].replace(",", ""), match["rest"] or ""
        power = int((match["power"] or "e0")[1:]) + (3 if match["kilo"] else 0)
        value = float(f"{sign}{whole}{rest}e{power}")
        found.append(
            Shown(value, 0.5 * 10.0 ** (power - max(0, len(rest) - 1)), bool(match["less"]))
        )
    return found


def agree(shown: Sequence[Shown], raw: Sequence[float]) -> bool:
    """Whether numbers show these values, one each and in order."""
    return len(shown) == len(raw) and all(s.shows(r) for s, r in zip(shown, raw, strict=True))


def of_duration(seconds: float) -> list[float]:
    """Return the numbers of `47.0 s`, `12 min 5 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return [seconds]
    return [whole // 60, whole % 60] if whole < 3600 else [whole // 3600, whole % 3600 // 60]
