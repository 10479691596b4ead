"""How much a site answers in any 24 hours: runs, visits, and questions.

Time is the site's own (`clock`), so a jump of the wall clock changes nothing.
"""

from __future__ import annotations

import time

from grandrounds.config.words import command
from grandrounds.errors import ConfigError, PolicyError
from grandrounds.site.custody.clock import DAY_SECONDS
from grandrounds.site.custody.request import RUN_KEY
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState

MOST_QUESTIONS = 2000
"""Roll calls, repeated requests and exchanges of masks without training of a run in progress in 24
hours: a roll call whenever the site returns."""

MOST_QUESTIONS_OF_OTHERS = 200
"""Roll calls in 24 hours of all runs that have not visited in that time."""


def in_progress(state: SiteState, run: str) -> bool:
    """Whether a run has visited in the last 24 hours."""
    query = "select count(*) from visit_log where run = ? and at > ?"
    return state.count(query, run, state.now() - DAY_SECONDS) > 0


def is_counted_alone(state: SiteState, run: str) -> bool:
    """Whether a run has limits of its own, apart from those that strangers share.

    One that is in progress, or that the operator has allowed by its key.
    """
    query = "select count(*) from grants where run = ? and run <> '' and at > ?"
    granted = state.count(query, run, state.now() - DAY_SECONDS) > 0
    return granted or in_progress(state, run)


def visits_today(state: SiteState) -> int:
    """Return the number of visits in the last 24 hours."""
    since = state.now() - DAY_SECONDS
    return state.count("select count(*) from visit_log where at > ?", since)


def runs_today(state: SiteState) -> tuple[int, int]:
    """Return the runs that have visited in the last 24 hours, and how many more of them than the
    policy's number the operator has allowed."""
    since = state.now() - DAY_SECONDS
    runs = "select count(distinct run) from visit_log where at > ?"
    return state.count(runs, since), state.count("select count(*) from grants where at > ?", since)


def check_run(site: SiteFile, state: SiteState, run: str) -> None:
    """Raise `PolicyError` if as many other runs as allowed have visited in the last 24 hours.

    A run that has visited in that time itself goes on.
    """
    if in_progress(state, run):
        return
    now = state.now()
    since = now - DAY_SECONDS
    last = [
        row[0]
        for row in state.table.execute(
            "select max(at) from visit_log where at > ? and run <> ? group by run order by max(at)",
            (since, run),
        )
    ]
    if state.count("select count(*) from grants where at > ? and run = ?", since, run):
        return
    most = site.policy.max_runs_per_day
    most += state.count("select count(*) from grants where at > ? and run = ''", since)
    if len(last) < most:
        return
    opens = last[len(last) - most] + DAY_SECONDS - now
    moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time() + opens + 60))
    raise PolicyError(
        f"The policy of site {site.name!r} forbids this run: max-runs-per-day = "
        f"{site.policy.max_runs_per_day}, and another run has visited in the last 24 hours. This "
        f"opens by itself at {moment}, or at once by the site's operator: {_command(site, run)}"
    )


def _command(site: SiteFile, run: str) -> str:
    return command("grandrounds", "site", "allow-run", run, "--config", site.path.name)


def check_visits(site: SiteFile, state: SiteState) -> None:
    """Raise `PolicyError` if the site has reached its limit of visits in 24 hours."""
    most, today = site.policy.max_visits_per_day, visits_today(state)
    if today >= most:
        raise PolicyError(
            f"The policy of site {site.name!r} forbids this run: max-visits-per-day = {most}, but "
            f"there were {today} in the last 24 hours."
        )


def check_questions(site: SiteFile, state: SiteState, run: str) -> None:
    """Raise `PolicyError` if so many questions were answered in 24 hours; `refusals` has others."""
    known = is_counted_alone(state, run)
    most, bucket = (MOST_QUESTIONS, run) if known else (MOST_QUESTIONS_OF_OTHERS, "")
    query = "select count(*) from question_log where run = ? and at > ?"
    if state.count(query, bucket, state.now() - DAY_SECONDS) >= most:
        raise PolicyError(
            f"The policy of site {site.name!r} forbids this run: it answers at most {most} roll "
            f"calls in 24 hours of {'one run' if known else 'runs that have not visited'}."
            + ("" if known else f" The site's operator can allow it: {_command(site, run)}")
        )


def count_question(state: SiteState, run: str) -> None:
    """Count a roll call, or another request without a visit, that was answered."""
    now = state.now()
    state.table.execute("delete from question_log where at < ?", (now - DAY_SECONDS,))
    bucket = run if is_counted_alone(state, run) else ""
    state.table.execute("insert into question_log values (?, ?)", (now, bucket))


def count_visit(state: SiteState, run: str, round_number: int) -> None:
    """Record a visit, also one that fails afterwards."""
    now = state.now()
    state.table.execute("insert into visit_log values (?, ?, ?)", (now, run, round_number))
    state.table.execute("delete from visit_log where at < ?", (now - 2 * DAY_SECONDS,))


def allow_run(state: SiteState, run: str = "") -> None:
    """Allow one more run for 24 hours, by its key or whichever comes next.

    Raises
    ------
    ConfigError
        If it is not a run's key.
    """
    if run and not RUN_KEY.fullmatch(run):
        raise ConfigError(
            f"{run!r} is not a run's key: up to 32 hex digits, as a refusal names it."
        )
    with state.lasting() as table:
        now = state.now()
        table.execute("delete from grants where at < ?", (now - DAY_SECONDS,))
        table.execute("insert into grants values (?, ?)", (now, run))
