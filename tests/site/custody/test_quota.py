"""One run a day, so many visits and questions; the operator may lift it; clocks may jump."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.errors import PolicyError, ThrottledError
from grandrounds.site.custody import clock, kept_runs, quota, refusals
from grandrounds.site.custody.clock import DAY_SECONDS, Reading
from grandrounds.site.custody.state import SiteState
from tests.asking import Asking
from tests.own_sites import sites_of
from tests.runs import Settings


@pytest.fixture
def asks(settings: Settings, tmp_path: Path) -> Asking:
    return Asking(sites_of(settings, tmp_path)[0], settings)


@pytest.fixture
def pass_hours(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets hours pass, on every clock."""
    passed = [0.0]
    since_boot, wall = clock._since_boot, time.time

    def let_pass(hours: float) -> None:
        passed[0] += 3600 * hours

    monkeypatch.setattr(clock, "_since_boot", lambda: since_boot() + passed[0])
    monkeypatch.setattr(clock.time, "time", lambda: wall() + passed[0])
    return let_pass


def allow(asks: Asking, *words: str) -> str:
    done = CliRunner().invoke(app, ["site", *words, "--config", str(asks.site.path)])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_second_run_within_a_day_is_refused_with_what_lifts_it(
    asks: Asking, pass_hours: Callable[[float], None]
) -> None:
    asks("ab")
    for kind in ("query", "train"):
        with pytest.raises(PolicyError) as refused:
            asks("cd", kind=kind)
        assert "max-runs-per-day = 1, and another run has visited" in str(refused.value)
        assert "grandrounds site allow-run cd --config site.toml" in str(refused.value)
        moment = time.strftime("%Y-%m-%d %H", time.gmtime(time.time() + DAY_SECONDS))
        assert f"opens by itself at {moment}" in str(refused.value)
    asks("ab", 2)
    pass_hours(23.9)
    with pytest.raises(PolicyError, match="max-runs-per-day"):
        asks("cd")
    pass_hours(0.2)
    asks("cd")


def test_a_run_that_goes_on_for_days_keeps_its_place(
    asks: Asking, pass_hours: Callable[[float], None]
) -> None:
    for number in range(1, 5):
        asks("ab", number)
        pass_hours(20)
        with pytest.raises(PolicyError, match="max-runs-per-day"):
            asks("cd", kind="query")


def test_a_roll_call_takes_no_runs_place(asks: Asking) -> None:
    for run in ("ab", "cd", "ef"):
        asks(run, kind="query")
    asks("cd")
    with pytest.raises(PolicyError, match="max-runs-per-day"):
        asks("ab", kind="query")


@pytest.mark.parametrize("named", [True, False], ids=["by its key", "whichever comes next"])
def test_the_operator_allows_one_more_run_with_one_command(
    asks: Asking, pass_hours: Callable[[float], None], named: bool
) -> None:
    """An aborted first try does not keep a consortium waiting for a day."""
    asks("ab")
    said = allow(asks, "allow-run", *(["cd"] if named else []))
    assert "for 24 hours" in said
    asks("cd")
    with pytest.raises(PolicyError, match="max-runs-per-day"):
        asks("ef")
    pass_hours(23)
    asks("ab", 2)
    asks("cd", 2)
    pass_hours(2)  # what was allowed is over; runs in progress go on
    asks("ab", 3)
    asks("cd", 3)
    with pytest.raises(PolicyError, match="max-runs-per-day"):
        asks("ef")


def test_what_is_not_a_runs_key_cannot_be_allowed(asks: Asking) -> None:
    done = CliRunner().invoke(app, ["site", "allow-run", "x y", "--config", str(asks.site.path)])
    assert done.exit_code == 2
    assert "'x y' is not a run's key" in done.output + str(done.exception)


def test_visits_beyond_the_number_of_a_day_are_refused_but_not_cached_replies(
    settings: Settings, tmp_path: Path
) -> None:
    [site, *_] = sites_of(settings, tmp_path, policy__max_visits_per_day=2)
    asks = Asking(site, settings)
    asks(number=1)
    asks(number=2)
    asks(number=2)
    with pytest.raises(PolicyError, match="max-visits-per-day = 2, but there were 2"):
        asks(number=3)
    assert len(asks.visits) == 2


def test_a_runs_configuration_is_that_of_its_first_visit(asks: Asking) -> None:
    """Alternating model.dtype loaded the base again at every visit; a length singles out rows."""
    asks(number=1)
    for changed in ({"train.seq-length": 40}, {"model.dtype": "bfloat16"}, {"seed": 7}):
        for kind in ("train", "query", "evaluate"):
            with pytest.raises(PolicyError, match="has changed since its first visit") as refused:
                asks(number=2, kind=kind, settings=changed)
            assert next(iter(changed)) in str(refused.value)
    asks(number=2, settings={"resume-from": "/elsewhere", "train.report-to": "none"})
    assert len(asks.visits) == 2


def test_runs_of_other_keys_take_no_place_of_a_kept_run(
    asks: Asking, pass_hours: Callable[[float], None]
) -> None:
    """Thirty-two of them evicted its state."""
    asks("ab")
    for i in range(40):
        with pytest.raises(PolicyError):
            asks(f"{i:x}f")
    pass_hours(25)
    for i in range(40):
        asks(f"{i:x}e", kind="query")
    asks("ab", 2)
    assert asks.visits[-1].cursor == 8
    with closing(SiteState(asks.site.place("state"))) as state:
        assert [one.run for one in kept_runs.listed(state)] == ["ab"]


def test_what_is_kept_of_runs_is_listed_and_can_be_ended(
    asks: Asking, pass_hours: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asks("ab")
    pass_hours(30)
    asks("cd")
    said = allow(asks, "runs")
    assert said.index("cd") < said.index("ab")
    monkeypatch.setattr(kept_runs, "MOST_BYTES", 0)
    with pytest.raises(PolicyError, match="ends some with grandrounds site forget-run"):
        asks("cd", 2)
    assert "nothing is kept of run 12" in allow(asks, "forget-run", "12")
    for run in ("ab", "cd"):
        assert f"run {run}" in allow(asks, "forget-run", run)
    monkeypatch.undo()
    asks("cd", 2)
    assert [visit.cursor for visit in asks.visits] == [0, 0, 0]


def test_runs_are_kept_for_ninety_days(asks: Asking, pass_hours: Callable[[float], None]) -> None:
    asks("ab")
    pass_hours(24 * 89)
    asks("cd")
    pass_hours(24 * 2)
    asks("ef")
    with closing(SiteState(asks.site.place("state"))) as state:
        assert [one.run for one in kept_runs.listed(state)] == ["ef", "cd"]


# --- The clock ------------------------------------------------------------------------------------

LAST = Reading(1000.0, wall=5e8, boot=100.0, boot_id="a")


@pytest.mark.parametrize(
    ("wall", "boot", "boot_id", "passed"),
    [
        (5e8 + 60, 160.0, "a", 60),
        (5e8 + 30 * DAY_SECONDS, 160.0, "a", 60),
        (0.0, 160.0, "a", 60),
        (5e8 + 600, 20.0, "b", 600),
        (5e8 + 30 * DAY_SECONDS, 20.0, "b", DAY_SECONDS),
        (0.0, 20.0, "b", 20),
        (0.0, 3 * DAY_SECONDS, "b", 3 * DAY_SECONDS),
        (5e8 + 600, 20.0, "a", 600),
    ],
    ids=[
        "as it runs",
        "a month ahead",
        "back to 1970",
        "a reboot",
        "a reboot, a month ahead",
        "a reboot, back to 1970",
        "up for days after a reboot",
        "an earlier snapshot of the machine",
    ],
)
def test_a_jump_of_the_wall_clock_makes_no_time_pass(
    wall: float, boot: float, boot_id: str, passed: float
) -> None:
    assert clock._advanced(LAST, wall, boot, boot_id).site == LAST.site + passed


@pytest.mark.parametrize("years", [-3, 3])
def test_a_clock_jump_neither_frees_nor_locks_the_quota(
    asks: Asking, monkeypatch: pytest.MonkeyPatch, years: float
) -> None:
    """A jump of a day gave everything back; one backwards locked the site until then."""
    asks("ab")
    wall = time.time
    monkeypatch.setattr(clock.time, "time", lambda: wall() + years * 365 * DAY_SECONDS)
    with pytest.raises(PolicyError, match="max-runs-per-day"):
        asks("cd")
    with closing(SiteState(asks.site.place("state"))) as state:
        assert quota.visits_today(state) == 1
    since_boot = clock._since_boot
    monkeypatch.setattr(clock, "_since_boot", lambda: since_boot() + DAY_SECONDS + 1)
    asks("cd")


def test_the_sites_time_goes_on_over_messages(tmp_path: Path) -> None:
    times: list[Any] = []
    for _ in range(3):
        with closing(SiteState(tmp_path / "state")) as state:
            times += [state.now(), state.now()]
    assert times == sorted(times)
    assert times[-1] < 5


def test_strangers_who_use_up_what_runs_share_do_not_keep_out_a_run_that_was_allowed(
    asks: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 roll calls under new keys closed a site to every new run for a day, and 20 refusals for
    ten minutes, and no command of the operator opened it."""
    monkeypatch.setattr(quota, "MOST_QUESTIONS_OF_OTHERS", 3)
    monkeypatch.setattr(refusals, "MOST", 4)
    for key in ("a1", "a2", "a3"):
        asks(key, 0, "query")
    with pytest.raises(PolicyError, match=r"answers at most 3 .* site allow-run bb --config site"):
        asks("bb", 0, "query")
    allow(asks, "allow-run", "bb")
    asks("bb", 0, "query")
    for key in ("c1", "c2", "c3"):
        with pytest.raises(PolicyError, match="answers at most 3"):
            asks(key, 0, "query")
    allow(asks, "allow-run")  # whichever comes next: none has limits of its own for that
    with pytest.raises(ThrottledError):
        asks("dd", 0, "query")
    asks("bb", 0, "query")
    asks("bb")
