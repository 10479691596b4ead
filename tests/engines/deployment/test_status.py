"""Statuses of a site and of a consortium, from nothing that runs to everything that does."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.engines.deployment import (
    admissions,
    consortium_status,
    joining,
    server_checks,
    set_up,
    site_status,
)
from grandrounds.engines.deployment.superlink import LAST_RUN
from grandrounds.errors import EngineError
from grandrounds.server import admitted
from grandrounds.site.custody import audit, quota
from grandrounds.site.custody.site_file import SiteFile, read_site_file
from grandrounds.site.custody.state import SiteState
from tests.runs import copy_of


@pytest.fixture
def member(consortium: Path, site: Path) -> SiteFile:
    """A site that has joined, of which nothing runs."""
    admission = admissions.admit(consortium, site / "request.json", 0, 1)
    joining.join(read_site_file(site / "site.toml"), admission, consortium / "authority.pub")
    return read_site_file(site / "site.toml")


@contextmanager
def listening(site: SiteFile) -> Iterator[None]:
    """Listen where the site's agent would."""
    with closing(socket.socket(socket.AF_UNIX)) as agent:
        agent.bind(str(site.place(site.agent.socket)))
        agent.listen(8)
        yield


def asked(monkeypatch: pytest.MonkeyPatch, status: int, process: float | None = None) -> None:
    """Let the server answer an activation with a status, beside a SuperNode of so many seconds."""
    running = Mock(pid=4711, create_time=lambda: time.time() - (process or 0))
    for module in (server_checks, site_status):
        monkeypatch.setattr(module, "activation", lambda *_: status)
        monkeypatch.setattr(
            module, "supernode_process", lambda _: None if process is None else running
        )


def status(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["site", "status", *words])
    return done.exit_code, done.output


def test_of_a_site_of_which_nothing_runs_each_part_is_told_and_nothing_is_made(
    member: SiteFile,
) -> None:
    code, said = status(str(member.path.parent))
    assert code == 1
    assert "agent         off: No such file or directory" in said
    assert "trial.example.org:8000 does not answer" in said
    assert "last visit    none" in said
    assert "visits        0 in 24 hours, 400 of 400 left" in said
    assert said.count("\nproblem") == 2
    assert not (member.path.parent / "state" / "site.sqlite").exists()


def test_before_it_has_joined_a_site_is_told_to(site: Path) -> None:
    assert "has not joined a consortium (grandrounds site join)" in status(str(site))[1]


def test_a_folder_that_is_no_sites_gets_one_line(tmp_path: Path) -> None:
    code, said = status(str(tmp_path))
    assert code == 2
    [line] = said.splitlines()
    assert line.startswith("grandrounds: ")
    assert "site.toml" in line


def test_a_site_that_is_connected_is_well_and_tells_its_last_visit_and_budgets(
    member: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(monkeypatch, server_checks.ACTIVE, process=600)
    folder = member.place(member.agent.state)
    with closing(SiteState(folder)) as state:
        quota.count_visit(state, "3f9a1c2b5d", 2)
        quota.allow_run(state)
    visit = {"run": "3f9a1c2b5d", "round": 2, "asked": "train", "seconds": 2.13}
    audit.write(folder, {**visit, "outcome": "answered"})
    audit.write(folder, {"run": "ab", "asked": "query", "outcome": "refused", "reason": "no"})
    with listening(member):
        code, said = status(str(member.path))
        found = json.loads(
            CliRunner().invoke(app, ["site", "status", str(member.path), "--json"]).stdout
        )
    assert code == 0, said
    assert "SuperNode     connected to trial.example.org:8000 (process 4711, since " in said
    assert "Z train, round 2 of run 3f9a1c2b: answered in 2.1 s" in said
    assert "Z query, round - of run ab: refused: no" in said
    assert "visits        1 in 24 hours, 399 of 400 left" in said
    assert "runs          1 in 24 hours, 1 of 2 left" in said
    assert found["problems"] == []
    assert found["last-visit"]["seconds"] == 2.13
    assert found["supernode"]["connected"] is True


@pytest.mark.parametrize(
    ("answer", "process", "told"),
    [
        (200, None, "no SuperNode of this site runs; the server knows its key"),
        (200, 600, "its SuperNode runs, but the server knows its key and has no connection of it"),
        (412, None, "no SuperNode of this site runs here: its key is not registered"),
        (412, 3, "started 3 s ago: whether it is accepted shows once it has run for 30 s"),
        (401, 600, "the server refuses this site's key (401)"),
    ],
)
def test_a_site_that_is_not_connected_is_told_why(
    member: SiteFile,
    monkeypatch: pytest.MonkeyPatch,
    answer: int,
    process: float | None,
    told: str,
) -> None:
    asked(monkeypatch, answer, process)
    with listening(member):
        [problem] = site_status.look(member)["problems"]
    assert problem.startswith("not connected: ")
    assert told in problem


@pytest.mark.parametrize(
    ("answer", "process", "level"), [(200, None, "ok"), (412, 600, "ok"), (412, 3, "warning")]
)
def test_a_check_beside_a_connected_supernode_is_no_error(
    member: SiteFile, monkeypatch: pytest.MonkeyPatch, answer: int, process: float, level: str
) -> None:
    """Flower answers a second connection with 412, as it does an unknown key."""
    asked(monkeypatch, answer, process)
    assert server_checks.accepted(member, Path("ca.crt")).level == level


def test_a_key_that_is_refused_with_no_supernode_here_is_an_error(
    member: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(monkeypatch, 412)
    assert server_checks.accepted(member, Path("ca.crt")).level == "error"


def test_a_supernode_is_known_by_the_node_key_that_it_names(
    member: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def running(key: Path) -> Mock:
        words = set_up.supernode_command(member)
        words[words.index(server_checks.KEY_OPTION) + 1] = str(key)
        return Mock(info={"cmdline": words})

    other, own = running(Path("/srv/other/node.key")), running(member.path.parent / "node.key")
    no_words = Mock(info={"cmdline": None})  # of another user, or a zombie
    monkeypatch.setattr(psutil, "process_iter", lambda _: [no_words, other, own])
    assert server_checks.supernode_process(member) is own
    monkeypatch.setattr(psutil, "process_iter", lambda _: [no_words, other])
    assert server_checks.supernode_process(member) is None


def test_what_is_used_up_keeps_a_site_from_its_next_visit(
    member: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(monkeypatch, 412, process=600)
    text = set_up.with_value(member.path.read_text(), "policy", "max-visits-per-day", 1)
    monkeypatch.setattr(site_status, "LEAST_MESSAGES", 10**9)
    member.path.write_text(text)
    with closing(SiteState(member.place(member.agent.state))) as state:
        quota.count_visit(state, "ab", 1)
    with listening(member):
        problems = site_status.look(read_site_file(member.path))["problems"]
    assert [problem.partition(" ")[0] for problem in problems] == [
        "policy.max-visits-per-day",
        "disk:",
    ]


def test_a_privacy_budget_is_told_and_one_that_was_lost_is_a_problem(
    member: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(monkeypatch, 412, process=600)
    text = set_up.with_value(member.path.read_text(), "privacy", "declared-units", 500)
    member.path.write_text(text)
    with listening(member):
        code, said = status(str(member.path))
        assert code == 0, said
        assert "privacy       epsilon 0.000 charged, 8.000 left of 8 for ever" in said
        (member.path.parent / "state" / "budget.sequence").unlink()
        code, said = status(str(member.path))
    assert code == 1
    assert "problem       privacy: the budget has not been started" in said


def test_a_file_that_a_visit_removes_meanwhile_counts_nothing() -> None:
    gone = Mock(is_file=lambda: True, stat=Mock(side_effect=FileNotFoundError))
    assert site_status._bytes_of(gone) == 0


# --- The consortium -------------------------------------------------------------------------------


def nodes(monkeypatch: pytest.MonkeyPatch, *listed: dict[str, Any]) -> None:
    """Let the SuperLink list nodes; none: it does not answer."""

    def ask(*_: object) -> dict[str, Any]:
        if not listed:
            raise EngineError("Connection refused")
        return {"success": True, "nodes": list(listed)}

    monkeypatch.setattr(consortium_status, "ask", ask)


def consortium_said(folder: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["consortium", "status", "--dir", str(folder), *words])
    return done.exit_code, done.stdout


def test_members_are_told_with_their_connection_and_the_last_run(
    consortium: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = set_up.init_site(tmp_path / "other", "other")
    for number, folder in enumerate((site, other)):
        admissions.admit(consortium, folder / "request.json", number, 2)
    admitted.node_file(consortium / "admissions" / "st-elsewhere.json").write_text("17\n")
    run = copy_of("plain", tmp_path)
    noted = {"directory": str(run), "flower-run": "1", "started": "2026-11-28T05:00:00Z"}
    (consortium / LAST_RUN).write_text(json.dumps(noted))
    online = {"node-id": "17", "status": "online", "online-at": "2026-11-28 04:42:04Z"}
    nodes(monkeypatch, online)
    code, said = consortium_said(consortium)
    assert code == 1
    assert "connected       1 of 2" in said
    assert "st-elsewhere  site 0, online since 2026-11-28 04:42:04Z; last update: round " in said
    assert "other         site 1, not registered" in said
    assert "problem         other is not connected (not registered)" in said
    found = json.loads(consortium_said(consortium, "--json")[1])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["last-run"]["round"] == last["round"]
    assert found["members"][0]["status"] == "online"
    (run / "metrics.jsonl").write_text("{\n{}\n")  # a damaged run hides no member
    said = consortium_said(consortium)[1]
    assert "last run        unreadable: " in said
    assert "st-elsewhere  site 0, online" in said


def test_a_superlink_that_does_not_answer_is_told_and_members_are_listed(
    consortium: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admissions.admit(consortium, site / "request.json", 0, 1)
    nodes(monkeypatch)
    code, said = consortium_said(consortium)
    assert code == 1
    assert "SuperLink       does not answer" in said
    assert "site 0, unknown" in said
    assert "last run        none begun from this machine" in said
    assert said.count("problem") == 1


def test_a_run_that_has_no_directory_yet_is_told(
    consortium: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (consortium / LAST_RUN).write_text(json.dumps({"directory": "/nowhere", "started": "now"}))
    nodes(monkeypatch, {"node-id": "1", "status": "online"})
    code, said = consortium_said(consortium)
    assert code == 1
    assert "not begun; begun now, /nowhere" in said
    assert "no site is admitted" in said


def test_a_folder_that_is_no_consortiums_gets_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["consortium", "status", "--dir", str(tmp_path)])
    assert done.exit_code == 2
    assert len(done.output.splitlines()) == 1
