"""Updates that wait on disk."""

from __future__ import annotations

import errno
import logging
from typing import Any

import numpy as np
import pytest

from grandrounds.server import set_aside
from grandrounds.server.set_aside import SetAside


def changes() -> dict[int, dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = {"a.lora_A.weight": (2, 3), "a.lora_B.weight": (5, 2)}
    return {
        site: {n: rng.normal(size=shape).astype(np.float32) for n, shape in names.items()}
        for site in range(4)
    }


def assert_all_come_back(aside: SetAside) -> None:
    for site in (2, 0, 3, 1):
        back = aside.take(site)
        assert list(back) == list(changes()[site])
        assert all(back[n].tobytes() == t.tobytes() for n, t in changes()[site].items())


def test_a_change_comes_back_as_it_was() -> None:
    aside = SetAside()
    for site, change in changes().items():
        aside.put(site, change)
    assert_all_come_back(aside)


def test_where_the_disk_is_full_changes_wait_in_memory_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save, written = np.save, []

    def full(file: Any, tensor: Any, **options: Any) -> None:
        if len(written) >= 3:  # in the middle of the second change
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(tensor)
        save(file, tensor, **options)

    monkeypatch.setattr(set_aside.np, "save", full)
    aside = SetAside()
    with caplog.at_level(logging.WARNING, "grandrounds"):
        for site, change in changes().items():
            aside.put(site, change)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "updates of this round wait in memory"
    ]
    assert_all_come_back(aside)
