"""Held-out losses by subgroup: the values of columns that a run names and each site allows.

Small subgroups are not told. Neither are those whose loss would give away that of a few rows by a
subtraction: from the loss of all, or from a subgroup of another column. Sums and differences of
three or more are not looked for: this is a rule of thumb for published tables, not a guarantee.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grandrounds.wire.names import clean_name

SUBGROUPS = "evaluate.subgroups"
"""Kind of message after the last round: tell the held-out loss by subgroup."""

LEAST = 10
"""Held-out examples of a subgroup below which a site tells nothing of it."""

MOST = 200
"""Subgroups that a site tells at most."""

NAMES = "subgroups"
"""Key of the reply's config: the names, `column = value`. All other fields have their order."""

LOSSES, EXAMPLES = "subgroup-losses", "subgroup-examples"
NLL_SUMS, TOKENS = "subgroup-nll-sums", "subgroup-tokens"
FIGURES = (LOSSES, EXAMPLES, NLL_SUMS, TOKENS)
"""Metrics of the reply: loss, examples, summed loss and answer tokens of each subgroup."""


def named(column: str, value: object) -> str:
    """Return what a subgroup is called; empty for a missing value, which is no subgroup."""
    said = clean_name("" if value is None else str(value))
    return f"{column} = {said}" if said else ""


def tellable(
    columns: Mapping[str, Sequence[object]], least: int = LEAST
) -> dict[str, tuple[int, ...]]:
    """Return the subgroups that may be told, each with its examples.

    Parameters
    ----------
    columns
        Column → its value for each held-out example of the site.
    least : int
        Examples below which nothing is told.

    Returns
    -------
    dict
        Name → positions among the held-out examples, the largest subgroups of a column first. Of a
        column either no example or at least `least` are in no subgroup told; two subgroups of
        different columns are the same or differ in at least `least` examples. Values that differ
        only beyond the length of a name are not told: their subgroups would be one.
    """
    told: dict[str, tuple[int, ...]] = {}
    for column, values in columns.items():
        found: dict[str, list[int]] = {}
        texts: dict[str, set[str]] = {}
        for place, value in enumerate(values):
            if name := named(column, value):
                found.setdefault(name, []).append(place)
                texts.setdefault(name, set()).add(" ".join(str(value).split()))
        for name, meant in texts.items():
            if name.endswith("…") and len(meant) > 1:
                del found[name]
        large = sorted((n for n in found if len(found[n]) >= least), key=lambda n: -len(found[n]))
        while large and 0 < len(values) - sum(len(found[n]) for n in large) < least:
            large.pop()
        before = [set(places) for places in told.values()]
        for name in large:
            if all(not 0 < len(set(found[name]) ^ other) < least for other in before):
                told[name] = tuple(found[name])
    return dict(list(told.items())[:MOST])
