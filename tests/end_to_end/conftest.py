"""Fixtures for tests that play whole runs."""

from __future__ import annotations

from typing import Any

import pytest

from grandrounds.site import visit as visits
from tests.end_to_end.sites import RecordedVisit


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[RecordedVisit]:
    """Record the training visits made from here on."""
    made: list[RecordedVisit] = []
    train = visits.train

    def remember(visit: Any, resident: Any, batches: Any) -> Any:
        result = train(visit, resident, batches)
        made.append(
            RecordedVisit(visit.site.partition_id, [e for batch in batches for e in batch], result)
        )
        return result

    monkeypatch.setattr(visits, "train", remember)
    return made
