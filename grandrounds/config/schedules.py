"""Which learning-rate schedule a round follows, where a run was given another length on its way.

`earlier-schedules = "2/2,4/6"` says: rounds 1 and 2 followed the schedule of 2 rounds, 3 and 4 that
of 6, and those after them follow that of `num-server-rounds`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from grandrounds.config.words import counted

_PART = re.compile(r"([1-9]\d{0,8})/([1-9]\d{0,8})")

Part = tuple[int, int]
"""Last round of a part, and the rounds of the schedule that it followed."""


@dataclass(frozen=True)
class Schedules:
    """A value of `earlier-schedules`, or an empty string."""

    def admits(self, value: str) -> bool:
        """Whether a text names parts in ascending order, each within its own schedule."""
        words = value.split(",") if value else []
        if not all(_PART.fullmatch(word) for word in words):
            return False
        found = parts_of(value)
        lasts = [last for last, _ in found]
        return lasts == sorted(set(lasts)) and all(last <= total for last, total in found)

    def __str__(self) -> str:
        return "parts such as 2/2,4/6 (last round / rounds of its schedule), or empty"


def parts_of(earlier: str) -> list[Part]:
    """Return the parts of a run that followed other schedules, the first one first."""
    return [(int(last), int(total)) for last, total in _PART.findall(earlier)]


def total_at(earlier: str, total: int, round_number: int) -> int:
    """Return the rounds of the schedule that a round follows.

    Parameters
    ----------
    earlier : str
        `earlier-schedules` of the run.
    total : int
        `num-server-rounds` of the run.
    """
    ahead = (rounds for last, rounds in parts_of(earlier) if round_number <= last)
    return next(ahead, total)


def same_until(one: tuple[str, int], other: tuple[str, int], played: int) -> bool:
    """Whether the first rounds follow the same schedule under two pairs of earlier and total."""
    return all(total_at(*one, n) == total_at(*other, n) for n in range(1, played + 1))


def lengthened(earlier: str, total: int, played: int, new_total: int) -> str:
    """Return `earlier-schedules` of a run that goes on with another length.

    Parameters
    ----------
    earlier, total
        Of the run so far.
    played : int
        The round after which it goes on.
    """
    parts: list[Part] = []
    for number in range(1, played + 1):
        rounds = total_at(earlier, total, number)
        if parts and parts[-1][1] == rounds:
            parts.pop()
        parts.append((number, rounds))
    if parts and parts[-1][1] == new_total:
        parts.pop()
    return ",".join(f"{last}/{rounds}" for last, rounds in parts)


def told(earlier: str) -> str:
    """Return `rounds 1 to 2 followed the schedule of 2 rounds`; empty if none followed another."""
    said, first = [], 1
    for last, total in parts_of(earlier):
        which = f"round {last}" if first == last else f"rounds {first} to {last}"
        said.append(f"{which} followed the schedule of {counted(total, 'round')}")
        first = last + 1
    return ", ".join(said)
