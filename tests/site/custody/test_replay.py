"""The same request again gets the same reply; what is kept is whole, whatever ends the process."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.common.serde import recorddict_to_proto

from grandrounds.errors import ReplyError
from grandrounds.site.custody import audit, kept_runs, replay
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import REPLIES, STATES, SiteState
from grandrounds.wire import messages
from tests.asking import Asking
from tests.own_sites import sites_of
from tests.runs import Settings, adapter_bytes, interrupted_at, play
from tests.site.custody.test_custody import grid_of_sites


@pytest.fixture
def asks(settings: Settings, tmp_path: Path) -> Asking:
    return Asking(sites_of(settings, tmp_path, policy__max_runs_per_day=9)[0], settings)


def packed(reply: Message) -> bytes:
    content: bytes = recorddict_to_proto(reply.content).SerializeToString()
    return content


def position_of(site: SiteFile) -> Any:
    with closing(SiteState(site.place("state"))) as state:
        return state.table.execute("select epoch, place from position").fetchone()


def test_the_same_request_again_gets_the_same_bytes_and_no_example_is_used_up(
    asks: Asking,
) -> None:
    first = asks()
    at = position_of(asks.site)
    again = asks()
    assert packed(again) == packed(first)
    assert len(asks.visits) == 1
    assert position_of(asks.site) == at
    last = audit.read(asks.site.place("state"))[-1]
    assert last["outcome"] == "answered again"
    assert last["left"]["bytes"] > 0


@pytest.mark.parametrize(
    "change",
    [
        {"run": "cd"},
        {"number": 2},
        {"kind": "evaluate"},
        {"sent": 1},
        {"said": {"learning-rate": 2e-3}},
        {"said": {"cursor": 8}},
    ],
    ids=str,
)
def test_whatever_differs_makes_it_another_request(asks: Asking, change: dict[str, Any]) -> None:
    assert packed(asks()) != packed(asks(**change))
    assert len(asks.visits) == 2


def test_the_number_of_a_message_matters_only_where_the_next_one_builds_on_it(
    asks: Asking,
) -> None:
    """A resumed server counts its messages anew."""
    for version in (3, 1):
        asks(said={"version": version})
    assert len(asks.visits) == 1
    built_on = {"communication.downlink": "incremental", "communication.downlink-codec": "int4"}
    for version in (3, 1):
        asks("cd", said={"version": version}, settings=built_on)
    assert len(asks.visits) == 3


def test_replies_of_the_last_two_rounds_are_kept(asks: Asking) -> None:
    for number in (1, 2, 3):
        asks(number=number)
    asks(number=3)
    asks(number=2)
    assert len(asks.visits) == 3
    asks(number=1)
    assert len(asks.visits) == 4
    assert len(list((asks.site.place("state") / STATES).iterdir())) == 1


class Killed(BaseException):
    """Ends a visit as `kill -9` does: nothing after it is done."""


@pytest.mark.parametrize("where", ["in training", "state written", "reply written", "named"])
def test_a_visit_that_was_killed_begins_again_with_the_same_examples(
    asks: Asking, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    asks(number=1)

    def killed(*_: object) -> Any:
        raise Killed

    def train_and_die(visit: Any) -> Any:
        asks.note(visit)
        raise Killed

    with monkeypatch.context() as patched:
        if where == "state written":
            real = kept_runs.new_file
            patched.setattr(
                replay,
                "new_file",
                lambda state, folder, *rest: (
                    killed() if folder == REPLIES else real(state, folder, *rest)
                ),
            )
        elif where == "reply written":
            patched.setattr(kept_runs, "name_state", killed)
        elif where == "named":
            patched.setattr(SiteState, "discard", killed)
        with pytest.raises(Killed):
            asks(number=2, function=train_and_die if where == "in training" else None)
    before = len(asks.visits)
    reply = asks(number=2)
    if where == "named":  # it was finished: only the files that it replaced were left
        assert len(asks.visits) == before
    else:
        assert asks.chosen()[-1] == asks.chosen()[-2]
        assert asks.visits[-1].cursor == asks.visits[-2].cursor
    assert packed(asks(number=2)) == packed(reply)


def test_what_a_crash_left_is_deleted_after_an_hour(asks: Asking) -> None:
    asks()
    folder = asks.site.place("state")
    left = folder / STATES / "ab-0123"
    left.write_bytes(b"")
    with closing(SiteState(folder)) as state:
        state.tidy()
        assert left.exists()
        os.utime(left, (0, 0))
        for file in (folder / REPLIES).iterdir():
            os.utime(file, (0, 0))
        state.tidy()
    assert not left.exists()
    asks()
    assert len(asks.visits) == 1


def test_a_damaged_reply_is_made_again_from_new_examples(asks: Asking) -> None:
    asks()
    [file] = (asks.site.place("state") / REPLIES).iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    asks()
    assert len(asks.visits) == 2


def test_replies_beyond_the_bound_go_the_oldest_first_and_states_never(
    asks: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("ab", "cd", "ef"):
        asks(run)
    folder = asks.site.place("state")
    size = sum(f.stat().st_size for f in folder.glob("*/*"))
    monkeypatch.setattr(kept_runs, "MOST_BYTES", size - 1)
    asks("ef", 2)
    asks("ef", 2)
    assert len(asks.visits) == 4
    assert len(list((folder / STATES).iterdir())) == 3
    asks("ab")
    assert len(asks.visits) == 5


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    settings: Settings, tmp_path: Path
) -> None:
    """Under secrets of the sites, and with error memories: a site that had answered the round in
    which the run was interrupted gives the same answer again."""
    lossy = {
        **settings,
        "communication.uplink-codec": "int4",
        "communication.downlink-codec": "float32",
        "train.training-arguments.max-steps": 1,
        "strategy.fraction-train": 1.0,
    }

    def sites(name: str) -> list[SiteFile]:
        made = sites_of(lossy, tmp_path / name)
        for i, site in enumerate(made):
            with closing(SiteState(site.place("state"))) as state:
                state.table.execute("insert into position values (1, 7, 0)")
            (site.place("state") / "order.key").write_bytes(bytes([i]) * 32)
        return made

    whole = {**lossy, "run-directory": str(tmp_path / "whole-run")}
    play(whole, grid=grid_of_sites(whole, sites("whole")))
    stopped = sites("stopped")
    with pytest.raises(KeyboardInterrupt):
        play(lossy, listener=interrupted_at("reply", 6), grid=grid_of_sites(lossy, stopped))
    resumed = {**lossy, "resume-from": str(lossy["run-directory"])}
    run = play(resumed, grid=grid_of_sites(resumed, stopped))
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "whole-run")
    again = [
        line
        for site in stopped
        for line in audit.read(site.place("state"))
        if line["outcome"] == "answered again"
    ]
    assert {line["asked"] for line in again} == {"train"}


def test_a_visit_that_changes_nothing_writes_no_state(asks: Asking) -> None:
    """An evaluation; error memories of a large adapter would be written again for each."""
    asks()
    [file] = (asks.site.place("state") / STATES).iterdir()
    asks(kind="evaluate", function=lambda visit: messages.content(metrics={"tokens": 1}))
    assert [file] == list((asks.site.place("state") / STATES).iterdir())


def test_a_visit_that_fails_is_no_reply(asks: Asking) -> None:
    def fail(visit: Any) -> Any:
        raise ReplyError("diverged")

    for _ in range(2):
        with pytest.raises(ReplyError, match="diverged"):
            asks(function=fail)
    asks()
    assert len(asks.visits) == 1
