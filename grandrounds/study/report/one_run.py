"""The page of one run."""

from __future__ import annotations

from grandrounds.study.report import (
    client_updates,
    cost,
    headline,
    learning,
    participation,
    provenance,
)
from grandrounds.study.report.figures import Page
from grandrounds.study.report.read import RunFiles


def run_page(run: RunFiles) -> Page:
    """Return everything that a run directory records."""
    parts = (learning, cost, participation, client_updates)
    return Page(
        title=run.name,
        subtitle=f"model {run.config.model.name}, data {run.config.static.name}",
        mood=headline.mood(run),
        status=headline.status_text(run),
        story=headline.story(run),
        tiles=headline.tiles(run),
        sections=[*(part.section(run) for part in parts), *provenance.sections(run)],
        failures=headline.failures(run),
    )
