"""How sites are called wherever people read: the one place that cleans names and texts of sites.

A name is text to show. It comes from the consortium's admission, else from what the site says of
itself (under natural partitioning, the value of `data.partition-by`). Nothing trusts it: it is
never a path, a key or markup, and sites are told apart by their number.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

NAME = "name"
"""Key of an introduction: what the site, or its admission, calls it. Optional."""

SOURCE = "data-source"
"""Key of a real site's introduction: `formulary` if its own data are that. Optional."""

MOST_CHARACTERS = 40
"""Maximum length of a name; a longer one ends in an ellipsis."""

_BLANKS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
"""Characters without ink that Unicode counts as letters, marks or symbols."""

_LIKE_A_NUMBER = re.compile(r"(.*\()?site \d+\)?", re.IGNORECASE)


def clean_name(text: object) -> str:
    """Return a name as one line of at most `MOST_CHARACTERS`; empty if nothing is left."""
    return one_line(text, MOST_CHARACTERS) if isinstance(text, str) else ""


MOST_OF_A_TEXT = 1000
"""Maximum length of any other text of a site, such as the reason of a failure."""


def one_line(text: str, most_characters: int = MOST_OF_A_TEXT) -> str:
    """Return a site's text as one line of visible characters, cut with an ellipsis.

    Line breaks and other whitespace become single spaces. Control and format characters
    (bidirectional overrides, zero-width characters), unassigned and private ones are removed.
    """
    line = " ".join(unicodedata.normalize("NFC", text[: 4 * most_characters]).split())
    visible = "".join(c for c in line if not unicodedata.category(c).startswith("C"))
    shown = " ".join(_BLANKS.sub("", visible).split())
    if len(shown) <= most_characters:
        return shown
    return shown[: most_characters - 1].rstrip() + "…"


@dataclass(frozen=True)
class SiteNames:
    """Site → how it is called: its name, else `site 3`. No two sites are called the same."""

    labels: Mapping[int, str] = field(default_factory=dict)
    """Only of sites whose label is not `site <number>`."""

    def __getitem__(self, site: int) -> str:
        """Return how a site is called."""
        return self.labels.get(site, f"site {site}")

    def __bool__(self) -> bool:
        """Whether any site is called by a name."""
        return bool(self.labels)

    def cell(self, site: int) -> str:
        """Return a site as a cell of a column headed `site`: its name, else its number."""
        return self.labels.get(site, str(site))

    def with_number(self, site: int) -> str:
        """Return a site's name with its number, for messages that ask to act on the number."""
        number = f"site {site}"
        name = self[site]
        return name if name == number or name.endswith(f"({number})") else f"{name} ({number})"

    def listed(self, sites: Iterable[int]) -> str:
        """Return several sites, comma-separated."""
        return ", ".join(self[site] for site in sites)

    def in_place_of_number(self, who: str) -> str:
        """Return `who`, with the name in place of `site 3` if it is exactly that."""
        number = re.fullmatch(r"site (\d+)", who)
        return self[int(number[1])] if number else who


def names_of(introductions: Iterable[Mapping[str, Any]]) -> SiteNames:
    """Return how sites are called, from their introductions.

    Of sites with the same name, ignoring case, each gets its number too; so does a site with a name
    that looks like another's number.
    """
    cleaned: dict[int, str] = {}
    for facts in introductions:
        site, name = facts.get("partition-id"), clean_name(facts.get(NAME))
        if isinstance(site, int) and name:
            cleaned[site] = name
    count = Counter(name.casefold() for name in cleaned.values())
    labels = {}
    for site, name in sorted(cleaned.items()):
        number = f"site {site}"
        if name.casefold() == number and count[number] == 1:
            continue
        is_ambiguous = count[name.casefold()] > 1 or _LIKE_A_NUMBER.fullmatch(name)
        labels[site] = f"{name} ({number})" if is_ambiguous else name
    return SiteNames(labels)
