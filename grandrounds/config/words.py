"""Figures as text, in one style: `98.0 %`, `1 round`, and paths without their folders."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

NOT_TOLD = "not told"
"""A figure that real sites keep to themselves."""


def percent(share: float, decimals: int = 1) -> str:
    """Format a share: 0.98 as `98.0 %`."""
    shown = round(100 * share, decimals)
    return f"{shown:z,.{decimals}f} %"


def beyond(value: float, limit: float, digits: int = 3) -> str:
    """Return a value to `digits` significant digits, or as many as tell it from a limit."""
    for more in range(digits, 18):
        said = f"{value:.{more}g}"
        if value == limit or (float(said) - limit) * (value - limit) > 0:
            break
    return said


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural (`plural`, or with an s) unless it is 1."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def with_own(number: float, table: Mapping[str, float]) -> str:
    """Return a number and those of the modules that have one of their own: `16 (q_proj: 4)`."""
    own = ", ".join(f"{pattern}: {one:g}" for pattern, one in table.items())
    return f"{number:g} ({own})" if own else f"{number:g}"


def has_controls(text: str) -> bool:
    """Whether a text contains what is no character to be shown: controls, or half a character."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def is_utf8(path: str) -> bool:
    """Whether a path is UTF-8. On Linux a name may be any bytes; Python keeps others as
    surrogates."""
    return not any(unicodedata.category(character) == "Cs" for character in path)


def shown(text: str) -> str:
    """Return a text with its control characters but tabs escaped: no terminal obeys them."""
    return "".join(repr(c)[1:-1] if c != "\t" and has_controls(c) else c for c in text)


def command(*words: object) -> str:
    """Return a command to copy, with its words quoted for a POSIX shell where they need it.

    A path that starts with a dash is written so that it is not read as an option.
    """
    return shlex.join(
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
        for word in words
    )


def place_name(name: str) -> str:
    """Return a model or data set as published: of an absolute path only the last part."""
    is_path = Path(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return f"{PureWindowsPath(name).name} (local)" if is_path else name
