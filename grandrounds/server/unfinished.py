"""What a run sent and received in rounds that did not finish: `unfinished.jsonl`, one line each.

A round that fails or is interrupted leaves no line in metrics.jsonl and no state, but its messages
were sent. Its line here holds them, so that the run counts on when it is resumed. A run that is
killed (SIGKILL, power) writes no line: what it had sent since its last finished round is unknown.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grandrounds.config.words import counted
from grandrounds.wire.ledger import Ledger, Traffic
from grandrounds.wire.names import one_line

UNFINISHED = "unfinished.jsonl"

AFTER = "after-round"
"""Key of a line: the last finished round before it; null before any."""

TRAIN, EVALUATE, EXAM = "failed", "evaluate-failed", "formulary-failed"
MAGNITUDES, PERSONAL = "magnitudes-failed", "personal-failed"
SUBGROUPS = "subgroups-failed"
KINDS = (MAGNITUDES, TRAIN, EVALUATE, EXAM, PERSONAL, SUBGROUPS)
"""Keys of the failed replies of each kind, site → reason, in metrics.jsonl and here."""


@dataclass
class Attempt:
    """What has been done since the last finished round."""

    after: int | None = None
    """The last finished round; None before any."""
    before: Ledger = field(default_factory=Ledger)
    """The traffic up to it."""
    cohort: list[int] = field(default_factory=list)
    """The sites selected for the round in progress."""
    good: list[int] = field(default_factory=list)
    """Those whose update was received and is usable."""
    failed: dict[str, dict[int, str]] = field(default_factory=dict)
    """Kind of failed reply → site → reason."""
    started: float = field(default_factory=time.perf_counter)
    """`time.perf_counter()` at its start."""

    @classmethod
    def begin(cls, after: int | None, ledger: Ledger) -> Attempt:
        """Return an attempt in which nothing has been done."""
        return cls(after, copy.deepcopy(ledger))

    def note(self, kind: str, site: int, failure: str | None) -> None:
        """Record a reply, or the lack of one."""
        if failure is not None:
            self.failed.setdefault(kind, {})[site] = one_line(failure)
        elif kind == TRAIN:
            self.good.append(site)

    def failures(self, kind: str) -> dict[str, str]:
        """Return the failed replies of a kind, site → reason, as JSON has them."""
        return {str(site): why for site, why in sorted(self.failed.get(kind, {}).items())}

    def record(self, ledger: Ledger, status: str, reason: str) -> dict[str, Any] | None:
        """Return the line of unfinished.jsonl; None if nothing was sent and no site failed.

        Parameters
        ----------
        ledger
            The traffic by now.
        status : str
            `failed` or `stopped`.
        """
        sent = ledger.minus(self.before)
        if not sent.totals and not self.failed:
            return None
        return {
            AFTER: self.after,
            "status": status,
            "reason": one_line(reason),
            "cohort": self.cohort,
            "good": sorted(self.good),
            **{kind: self.failures(kind) for kind in KINDS if kind in self.failed},
            "communication-mib": sent.mib,
            "totals": {kind: asdict(traffic) for kind, traffic in sorted(sent.totals.items())},
            "seconds": time.perf_counter() - self.started,
        }


def traffic_of(line: Mapping[str, Any]) -> Ledger:
    """Return the traffic of a line."""
    return Ledger({kind: Traffic(**traffic) for kind, traffic in line["totals"].items()})


def failures_of(line: Mapping[str, Any]) -> int:
    """Return the failed replies of a line."""
    return sum(len(line.get(kind, ())) for kind in KINDS)


def lines_of(content: bytes) -> list[dict[str, Any]]:
    """Return the lines of unfinished.jsonl, without one that was cut short.

    Raises
    ------
    ValueError
        If a line is not what a run writes.
    """
    found = [json.loads(line) for line in content.decode("utf-8").split("\n")[:-1]]
    for i, line in enumerate(found, 1):
        try:
            if not isinstance(line[AFTER], int | None):
                raise TypeError(f"{AFTER} is {line[AFTER]!r}")
            float(line["communication-mib"]), float(line["seconds"])
            sites = [*line["cohort"], *line["good"]]
            for kind in KINDS:
                sites += dict(line.get(kind, {}))
            traffic_of(line).mib, line["reason"], [int(site) for site in sites]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"line {i}: {type(error).__name__} {error}") from None
    return found


def unfinished_of(path: Path, before: float = math.inf) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of unfinished.jsonl that still count, and what was wrong with the file.

    Parameters
    ----------
    before : int
        Attempts after this round, or a later one, were set aside with it.
    """
    file, lines = path / UNFINISHED, list[dict[str, Any]]()
    if not file.is_file():
        return [], []
    content, fault = file.read_bytes(), ""
    for line in content.splitlines(keepends=True):
        try:
            lines += lines_of(line)
        except (ValueError, RecursionError):
            fault = (
                f"{file} was damaged after its first {counted(len(lines), 'line')}: what was sent "
                "in the unfinished rounds of the others is not counted"
            )
            break
    kept = [line for line in lines if line[AFTER] is None or line[AFTER] < before]
    return kept, [fault] * bool(fault)


def text_of(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the content of unfinished.jsonl."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
