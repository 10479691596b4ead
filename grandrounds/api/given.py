"""Checks of a call's arguments: one line with name, value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grandrounds.errors import ConfigError


def integer(name: str, value: Any, least: int) -> int:
    """Return an integer of at least `least`; raise `ConfigError` if it is none."""
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} = {value!r} must be an integer of at least {least}.")
    return value


def integer_or_none(name: str, value: Any, least: int) -> int | None:
    """Return an integer of at least `least`, or None if none is given."""
    return None if value is None else integer(name, value, least)


def number_or_none(name: str, value: Any) -> float | None:
    """Return a finite number of at least 0, or None if none is given."""
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} = {value!r} must be a number of at least 0.")
    return float(value)


def text(name: str, value: Any) -> str:
    """Return a string; raise `ConfigError` if it is none."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} = {value!r} must be a string.")
    return value


def text_or_none(name: str, value: Any) -> str | None:
    """Return a string, or None if none is given."""
    return None if value is None else text(name, value)


def truth(name: str, value: Any) -> bool:
    """Return True or False; raise `ConfigError` if it is neither."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} = {value!r} must be True or False.")
    return value


def names(name: str, value: Any, example: str) -> list[str]:
    """Return a list of strings; a single string, whose letters it would be, is refused."""
    listed = _listed(value)
    if listed is None or not all(isinstance(one, str) for one in listed):
        raise ConfigError(f"{name} = {value!r} must be a list of names, such as [{example!r}].")
    return listed


def sites(name: str, value: Any) -> list[str]:
    """Return a list of site numbers and names as strings."""
    listed = _listed(value)
    if listed is None or not all(type(one) in (int, str) for one in listed):
        raise ConfigError(f"{name} = {value!r} must be a list of sites, such as [0, 3].")
    return list(map(str, listed))


def path(name: str, value: Any) -> Path:
    """Return a path; raise `ConfigError` if it is none, or holds what no file name can."""
    if not isinstance(value, str | Path):
        raise ConfigError(f"{name} = {value!r} must be a path.")
    if "\0" in str(value):
        raise ConfigError(f"{name} = {str(value)!r} has a NUL character, which no file name can.")
    return Path(value)


def path_or_none(name: str, value: Any) -> Path | None:
    """Return a path, or None if none is given."""
    return None if value is None else path(name, value)


def paths(name: str, value: Any, example: str) -> list[Path]:
    """Return a list of paths; a single one is refused."""
    listed = _listed(value)
    if listed is None:
        raise ConfigError(f"{name} = {value!r} must be a list of paths, such as [{example!r}].")
    return [path(name, one) for one in listed]


def _listed(value: Any) -> list[Any] | None:
    """Return the entries of a list; None if it is none."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    return list(value) if is_list else None
