"""The page of one run."""

from __future__ import annotations

import time

import grandrounds
from grandrounds.config import recipes
from grandrounds.study.report import facts, learning, updates
from grandrounds.study.report.figures import Figure, Page, Section
from grandrounds.study.report.read import RunFiles


def run_page(run: RunFiles) -> Page:
    """Return everything that a run directory tells."""
    return Page(
        title=run.name,
        subtitle=f"{run.config.model.name} on {run.config.static.name}",
        mood=facts.MOODS.get(run.status, "bad"),
        status=facts.status_text(run),
        story=facts.story(run),
        tiles=facts.tiles(run),
        sections=[section for section in sections(run) if section],
        made=made(),
        details=facts.failures(run),
    )


def made() -> str:
    """Return by what a page was made, and when."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return f"Made by grandrounds {grandrounds.__version__}, {now}."


def some(*figures: Figure | None) -> list[Figure]:
    """Return the figures that there are."""
    return [figure for figure in figures if figure is not None]


def sections(run: RunFiles) -> list[Section]:
    """Return the parts of the page, those that have nothing to show too."""
    ledger = learning.ledger_table(run)
    mean_of_factors = (
        []
        if not run.trained or updates.aggregation_figure(run)
        else ["No aggregation error is measured with this rule: it does not average A and B apart."]
    )
    return [
        Section(
            "learning",
            "What was learned",
            notes=comparability(run),
            figures=[*some(learning.loss_figure(run)), *learning.accuracy_figures(run)],
        ),
        Section(
            "cost",
            "What it cost",
            figures=some(learning.communication_figure(run), updates.seconds_figure(run)),
            tables=[ledger] if ledger else [],
        ),
        Section(
            "sites",
            "Who took part",
            figures=some(learning.participation_figure(run), learning.coverage_figure(run)),
        ),
        Section(
            "updates",
            "What the sites sent back, and what became of it",
            notes=mean_of_factors,
            figures=[
                *updates.update_figures(run),
                *some(updates.aggregation_figure(run), updates.penalty_figure(run)),
                *updates.rule_figures(run),
            ],
        ),
        Section(
            "repeat",
            "How to repeat it",
            commands=facts.commands(run),
        ),
        Section("recipe", "Recipe", tables=facts.recipe_tables(run.config)),
        Section("environment", "Versions and hashes", tables=facts.environment_tables(run)),
    ]


def comparability(run: RunFiles) -> list[str]:
    """Return whether the run compares with the leaderboard."""
    reasons = recipes.leaderboard_differences(run.config)
    return [f"Not comparable with the FlowerTune leaderboard: {'; '.join(reasons)}."] * bool(
        reasons
    )
