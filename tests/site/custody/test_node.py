"""A SuperNode without agent and site.toml answers only where that was chosen, and quotes no row."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.engines.deployment import node_app
from grandrounds.errors import OwnDataError, PolicyError
from grandrounds.server import introductions
from grandrounds.site import visit as visits
from grandrounds.wire import messages
from tests.runs import Settings

PURPOSE = {"data-of-the-run": True}


def asked(settings: Settings, **node: Any) -> Message:
    """Return what a SuperNode answers to a roll call."""
    flat = recipes.resolve(settings).flat()
    numbers = {"partition-id": 0, "num-partitions": 4, **node}
    return node_app.app(
        introductions.questions([1], "ab")[1], Context(1, 1, numbers, RecordDict(), flat)
    )


def test_a_supernode_that_nobody_chose_to_leave_without_custody_is_refused(
    settings: Settings,
) -> None:
    """97ce3f5 trained on whatever file the run named."""
    with pytest.raises(
        PolicyError, match=r"neither an agent nor a site\.toml.*data-of-the-run=true"
    ):
        messages.raise_failure(asked(settings))
    with pytest.raises(PolicyError, match="neither an agent nor"):
        messages.raise_failure(asked(settings, **{"data-of-the-run": "yes"}))
    messages.raise_failure(asked(settings, **PURPOSE))


def test_a_row_of_its_data_reaches_neither_server_nor_journal(
    settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """97ce3f5 sent 40 characters of the row that cannot be read."""
    cards = tmp_path / "cards.jsonl"
    cards.write_text(json.dumps({"input": "a", "output": "b"}) + "\nJane Roe, born 1961, asked\n")
    with pytest.raises(OwnDataError, match="cannot be used at this site") as told:
        messages.raise_failure(asked({**settings, "static.dataset.name": str(cards)}, **PURPOSE))
    said = capfd.readouterr()
    assert "DataError from JSONDecodeError at files.py:" in said.err
    assert "Jane" not in f"{told.value} {said}"


def test_an_unexpected_error_reaches_flower_as_its_kind(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """97ce3f5 let it pass: Flower sends the text of an exception on, and prints its traceback."""

    def crash(*_: object) -> None:
        raise KeyError("Jane Roe")

    monkeypatch.setattr(client_app.visits, "introduction", crash)
    reply = asked(settings, **PURPOSE)
    assert isinstance(reply.error, Error)
    assert "the site's visit crashed (KeyError)" in reply.error.reason
    said = capfd.readouterr()
    assert "KeyError at test_node.py:" in said.err
    assert "Jane" not in f"{reply.error.reason} {said}"
    assert visits.introduction is crash


NOISY = """
import logging, sys, threading, warnings
from grandrounds.site.custody.faults import keep_texts_off_the_terminal
logging.basicConfig()
keep_texts_off_the_terminal()
own = logging.getLogger("a library")
own.addHandler(logging.StreamHandler())
own.propagate = False
own.warning("the sequence of %s is too long", "Jane Roe")
try:
    {}["Jane Roe"]
except KeyError as error:
    logging.getLogger("another").exception("Jane Roe: %s", error)
    try:
        raise ValueError("Jane Roe") from error
    except ValueError as other:
        kept = other
warnings.warn("Jane Roe is out of range")
def fail(): raise kept
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Gone:
    def __del__(self): raise OSError("Jane Roe")
Gone()
raise RuntimeError("Jane Roe")
"""


def test_a_process_with_data_prints_the_kind_and_place_of_everything_and_no_text() -> None:
    """Of errors in threads, warnings, and the log messages of libraries with handlers of their
    own; 97ce3f5 printed all of them."""
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "Jane" not in said
    for kind in ("KeyError", "UserWarning", "ValueError from KeyError", "OSError", "RuntimeError"):
        assert f"{kind} at <string>:" in said.replace("grandrounds: ", "")
    assert said.count("(text withheld") == 6
    assert logging.getLogRecordFactory() is logging.LogRecord
