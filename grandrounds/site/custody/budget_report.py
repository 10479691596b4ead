"""A site's privacy budget as its operator sees it: charged, spent, reserved and left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from grandrounds.site.custody import budget
from grandrounds.site.custody.clock import DAY_SECONDS
from grandrounds.site.custody.sequence import START, sequence_file
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.site.private.accountant import epsilon_of
from grandrounds.site.private.mechanism import Mechanism


def report(site: SiteFile, state: SiteState | None) -> dict[str, Any]:
    """Return the budget as JSON values, after its chain was verified.

    Parameters
    ----------
    state : SiteState, optional
        None: the site has no state yet.

    Raises
    ------
    PolicyError
        If the budget is in doubt.
    ConfigError
        If dp-accounting is not installed.
    """
    privacy, found = site.privacy, budget.read(site, state)
    return {
        "site": site.name,
        "started": sequence_file(site).exists(),
        "require": privacy.require,
        "unit": privacy.unit,
        "declared-units": privacy.declared_units,
        "epsilon-total": privacy.epsilon_total,
        "epsilon-charged": found.epsilon,
        "epsilon-left": max(0.0, privacy.epsilon_total - found.epsilon),
        "epsilon-of-run": privacy.epsilon_of_run,
        "delta-charged": found.delta,
        "delta-limit": privacy.all_delta if privacy.declared_units else None,
        "lines": found.lines,
        "last-sha256": found.sha256,
        "runs": [_run(run) for run in found.runs.values()],
        "reserved": _reserved(state, found),
    }


def _run(run: budget.ChargedRun) -> dict[str, Any]:
    mechanism = run.mechanism
    return {
        "run": run.run,
        "day": run.day,
        "epsilon-charged": run.epsilon,
        "epsilon-spent": run.spent,
        "delta": mechanism.delta,
        "visits": run.visits,
        "most-visits": mechanism.visits,
        "steps-of-visit": mechanism.steps,
        "noise-multiplier": mechanism.noise_multiplier,
        "clipping-norm": mechanism.clipping_norm,
        "sampling-rate": mechanism.sampling_rate,
    }


def _reserved(state: SiteState | None, found: budget.Budget) -> list[dict[str, Any]]:
    """Return the runs that called the roll in the last day and have not visited."""
    if state is None:
        return []
    with budget.readable("its table of coins"):
        state.count("select count(*) from coins")
    with budget.readable("its table of reservations"):
        rows = state.table.execute(
            "select run, mechanism from reservations where at > ? order by at",
            (state.now() - DAY_SECONDS,),
        ).fetchall()
    asked = [(run, Mechanism(**json.loads(text))) for run, text in rows if run not in found.runs]
    return [
        {"run": run, "epsilon": epsilon_of(mechanism), "most-visits": mechanism.visits}
        for run, mechanism in asked
    ]


COLUMNS = ("run", "since", "epsilon charged", "spent so far", "visits", "noise")


def rows(told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of runs, the total last."""
    listed = [
        (
            str(run["run"]),
            str(run["day"]),
            f"{run['epsilon-charged']:.3f}",
            f"{run['epsilon-spent']:.3f}",
            f"{run['visits']} of {run['most-visits']}",
            f"{run['noise-multiplier']:.4g}",
        )
        for run in told["runs"]
    ]
    asked = [
        (
            str(one["run"]),
            "asked",
            f"({one['epsilon']:.3f})",
            "-",
            f"0 of {one['most-visits']}",
            "-",
        )
        for one in told["reserved"]
    ]
    total = ("all runs", "", f"{told['epsilon-charged']:.3f}", "", "", "")
    return [*listed, *asked, total]


def headline(told: Mapping[str, Any]) -> str:
    """Return what is left, in one line."""
    if not told["declared-units"]:
        return "privacy.declared-units = 0: the site makes no private visits"
    if not told["started"]:
        return f"not started, and no private visits before that: {START}"
    return (
        f"epsilon {told['epsilon-left']:.3f} left of {told['epsilon-total']:g} for ever, at most "
        f"{told['epsilon-of-run']:g} of it for one run; unit: one {told['unit']}, "
        f"{told['declared-units']:,} declared; deltas {told['delta-charged']:.3g} of less than "
        f"{told['delta-limit']:.3g}"
    )
