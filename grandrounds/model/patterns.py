"""Ranks and alphas of single modules by patterns of their paths, matched as PEFT matches them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from grandrounds.errors import ModelError, nearest

Number = TypeVar("Number", int, float)

Table = tuple[tuple[str, Number], ...]
"""(expression, number), in the order in which they are tried."""

RANK_PATTERN, ALPHA_PATTERN = "model.lora.rank-pattern", "model.lora.alpha-pattern"


def number_at(table: Table[Number], path: str, otherwise: Number) -> Number:
    """Return the number of the first expression that matches the end of a module's path."""
    key = _key_at(table, path)
    return dict(table).get(key, otherwise)


def _key_at(table: Table[Number], path: str) -> str:
    """Return the first expression that matches a path; the path itself if none does."""
    if not table:
        return path
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key([key for key, _ in table], path))


def check_patterns(
    tables: Mapping[str, Table[int] | Table[float]], paths: Sequence[str], name: str
) -> None:
    """Check that every expression matches an adapted module, and their order changes nothing.

    PEFT saves a table sorted by its expressions, and tries them in that order when it loads it.

    Parameters
    ----------
    tables
        Configuration key → its table.
    paths
        Paths of the adapted modules.
    name : str
        Name of the base, for errors.

    Raises
    ------
    ModelError
        If an expression matches nothing, or PEFT would load other ranks or alphas than it trained.
    """
    for key, table in tables.items():
        for pattern, _ in table:
            if not any(_key_at(((pattern, 1),), path) == pattern for path in paths):
                raise ModelError(_without_match(key, pattern, paths, name))
        for path in paths:
            first, saved = _key_at(table, path), _key_at(tuple(sorted(table)), path)
            if dict(table).get(first) != dict(table).get(saved):
                raise ModelError(
                    f"{key}: both {first!r} and {saved!r} match {path} of {name!r}, with different "
                    "numbers. PEFT saves a table sorted, and would load the second's. Write "
                    "expressions of which one matches each module."
                )


def _without_match(key: str, pattern: str, paths: Sequence[str], name: str) -> str:
    names = sorted({path.rpartition(".")[2] for path in paths})
    return (
        f"{key} names {pattern!r}, which matches none of the adapted modules of {name!r}."
        f"{nearest(pattern, names)} They are {', '.join(names)}, with paths such as {paths[0]}; an "
        "expression matches the end of a path, from the beginning of one of its parts."
    )
