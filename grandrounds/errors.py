"""Every expected error, as one tree.

GrandRoundsError            exit code 1, printed as one line, never as a traceback
├── ConfigError             configuration keys or values are invalid, one a line    (exit code 2)
├── DataError               a data source is missing, malformed or too small
│   └── OwnDataError        the same for a site's own data, none of which is quoted
├── ModelError              a base model, tokenizer or target module cannot be used
├── RunDirectoryError       a run directory cannot be written, read or resumed
├── RoundError              a round ended with fewer valid updates than required
├── ReplyError              one reply is invalid; the round continues without it
├── PolicyError             a site's own policy forbids what a run requests
│   ├── ApprovalError       a site's operator has not approved the run's recipe yet
│   ├── BudgetError         a site's privacy budget is spent                        (exit code 3)
│   └── ThrottledError      a site has refused so much that it reads no more for a while
└── EngineError             Flower's runtime did not start, or ended without a result

A message states what is wrong, the value received, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

DOCUMENTATION = "grandrounds docs"
"""The command that prints the documentation, which every installation carries."""


class GrandRoundsError(Exception):
    """An expected failure; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(GrandRoundsError):
    """A configuration key or value is invalid."""

    exit_code = 2


class DataError(GrandRoundsError):
    """A data source is missing, malformed or too small for the federation."""


class OwnDataError(DataError):
    """A site's own data cannot be used. The message quotes none of it; its cause may."""


class ModelError(GrandRoundsError):
    """A base model, tokenizer or target module cannot be used."""


class RunDirectoryError(GrandRoundsError):
    """A run directory cannot be written, read or resumed."""


class RoundError(GrandRoundsError):
    """A round ended with fewer valid updates than required."""


class ReplyError(GrandRoundsError):
    """One site's reply is invalid; the round continues without it and counts it as failed."""


class PolicyError(GrandRoundsError):
    """A site's own policy forbids what a run requests."""


class ApprovalError(PolicyError):
    """A site's operator has not approved the recipe of a run yet."""


class BudgetError(PolicyError):
    """The privacy budget of a site is spent: it trains no more in this run."""

    exit_code = 3


class ThrottledError(PolicyError):
    """A site has refused so many messages that it reads no more of them for a while."""


class EngineError(GrandRoundsError):
    """Flower's runtime did not start, or ended without a result."""


_ERRNO = re.compile(r"\[Errno -?\d+\] | ?\(os error \d+\)")
"""The number of an operating system's error, as Python and Rust write it."""


def documented(page: str) -> str:
    """Return the command that prints a page of the documentation, in backticks."""
    return f"`{DOCUMENTATION} {page}`"


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'X'?"` for the allowed word nearest to `word`, else `""`."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def first_line(error: BaseException, most: int | None = 200) -> str:
    """Return the first line of an error's message without its full stop.

    A failure of the operating system is told in words, without its number.

    Parameters
    ----------
    most : int, optional
        Maximum length in characters; None keeps the whole line.
    """
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = said.strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return _ERRNO.sub("", line)[:most].rstrip(".")
