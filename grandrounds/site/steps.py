"""Progress within a visit, told to whoever watches from the same process.

Sites in other processes have no watcher; nothing is sent for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Watcher = Callable[[str, int, int, int], None]
"""Called with what a site does (`training`, ...), its number, the steps done and their total; a
total of 0 means that the work has no steps."""

_watchers: list[Watcher] = []
_present: list[tuple[str, int]] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher of every step that sites take in this process meanwhile."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def visiting(what: str, site: int) -> Iterator[None]:
    """Say what a site does meanwhile; `step` counts its steps."""
    _present.append((what, site))
    try:
        step(0, 0)
        yield
    finally:
        _present.pop()


def step(done: int, total: int) -> None:
    """Tell that a step is done, of the innermost `visiting`."""
    if _present:
        what, site = _present[-1]
        for watcher in _watchers:
            watcher(what, site, done, total)
