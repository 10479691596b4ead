"""Idle threads sleep in every process of ours, unless the user chose otherwise."""

from __future__ import annotations

import os
import sys

import pytest

from grandrounds import waiting
from grandrounds.engines.flower import quiet


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any setting of OpenMP, and the module as first imported."""
    monkeypatch.setattr(waiting, "_is_too_late", False)
    for name in waiting.USERS_OWN:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_idle_threads_sleep_here_and_in_the_processes_started_from_here() -> None:
    waiting.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert quiet()["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", waiting.USERS_OWN)
def test_the_users_own_setting_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "own")
    waiting.wait_passively()
    assert {n: os.environ[n] for n in waiting.USERS_OWN if n in os.environ} == {name: "own"}
    assert not waiting.is_too_late()


def test_a_process_that_has_loaded_torch_is_told_that_it_is_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    waiting.wait_passively()
    assert not waiting.is_too_late()
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setitem(sys.modules, "torch", None)
    waiting.wait_passively()
    assert waiting.is_too_late()
