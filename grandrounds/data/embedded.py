"""The data that are built in, by name: the formulary, and common and rare facts."""

from __future__ import annotations

from grandrounds.data.common_and_rare import COMMON_AND_RARE
from grandrounds.data.formulary import FORMULARY, FORMULARY_PREFERENCES

EMBEDDED = (FORMULARY, FORMULARY_PREFERENCES, COMMON_AND_RARE)
"""Names of the built-in data. All are of fictional drugs, in the embedded base's own words."""


def embedded_rows(name: str) -> list[dict[str, str | int]]:
    """Return the rows of one of `EMBEDDED`, each with at least `input`, `output` and `site`; of
    preferences with `prompt`, `chosen` and `rejected` instead."""
    if name == COMMON_AND_RARE:
        from grandrounds.data.common_and_rare.records import rows

        return rows()
    from grandrounds.data.formulary.facts import flashcards, preferences

    if name == FORMULARY_PREFERENCES:
        return preferences()
    return flashcards()
