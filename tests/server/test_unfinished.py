"""Lines of unfinished.jsonl that somebody has changed by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grandrounds.server.unfinished import AFTER, lines_of

WHOLE: dict[str, Any] = {
    AFTER: 2,
    "reason": "interrupted",
    "cohort": [0],
    "good": [],
    "failed": {"1": "silent"},
    "communication-mib": 1.0,
    "totals": {"train.down": {"messages": 1, "tensor_bytes": 2, "key_bytes": 3}},
    "seconds": 0.5,
}


def test_a_line_as_a_run_writes_it_is_read() -> None:
    assert lines_of(f"{json.dumps(WHOLE)}\n".encode()) == [WHOLE]


@pytest.mark.parametrize(
    "change",
    [
        {"cohort": 7},
        {"failed": {"x": "y"}},
        {"failed": [1]},
        {"totals": {"train.down": {"messages": "1", "tensor_bytes": "2", "key_bytes": "3"}}},
    ],
)
def test_a_line_with_something_else_in_it_is_no_line(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="line 1: "):
        lines_of(f"{json.dumps({**WHOLE, **change})}\n".encode())
