"""A plan that was asked for: communication, memory and data of a run, with nothing loaded."""

from __future__ import annotations

from grandrounds.api.asked import Asked
from grandrounds.api.results import Plan


def planned(asked: Asked, architecture: str | None = None, rows: int | None = None) -> Plan:
    """Return the plan of a recipe; see `grandrounds.plan`.

    Raises
    ------
    GrandRoundsError
        If base, data or run directory cannot be used, or the architecture is not known.
    """
    from grandrounds.study import preflight
    from grandrounds.study.plan.forecast import forecast

    warnings = preflight.check(asked.config)
    return Plan(forecast(asked.config, architecture=architecture, rows=rows), warnings)
