"""The page of one run."""

from __future__ import annotations

from grandrounds.config.words import NOT_TOLD, place_name
from grandrounds.server.described import data_text
from grandrounds.study.report import (
    client_updates,
    cost,
    headline,
    learning,
    participation,
    personal,
    privacy,
    provenance,
    subgroups,
)
from grandrounds.study.report.figures import Page, Tile
from grandrounds.study.report.places import published
from grandrounds.study.report.read import RunFiles, folders


def run_page(run: RunFiles) -> Page:
    """Return everything that a run directory records."""
    parts = (learning, personal, subgroups, cost, participation, client_updates, privacy)
    base, data = place_name(run.config.model.name), data_text(run.config, run.sites)
    page = Page(
        title=headline.title(run),
        subtitle=f"Run {run.name}. Base: {base}. Data: {data}.",
        outcome=headline.outcome(run),
        mood=headline.mood(run),
        status=headline.status_text(run),
        story=headline.story(run),
        tiles=_tiles(run),
        sections=[*(part.section(run) for part in parts), *provenance.sections(run)],
        failures=headline.failures(run),
    )
    return published(page, folders(run))


def _tiles(run: RunFiles) -> list[Tile]:
    """Return the headline; ε stands in the place of the coverage, which private sites keep."""
    private = privacy.tile(run)
    told = [tile for tile in headline.tiles(run) if not (private and tile.value == NOT_TOLD)]
    return [*told, *private]
