"""The published budgets in docs/planning.md: each is what the plan of its row says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from grandrounds.config.recipes import resolve
from grandrounds.study.plan.forecast import forecast
from tests.places import ROOT, SHARED

MIB = 2**20


@dataclass(frozen=True)
class Published:
    """One row of the table."""

    base: str
    modules: str
    dora: bool
    rank: int
    cohort: int
    rounds: int
    figure: str
    planned: tuple[str, ...]


def published() -> Iterator[Published]:
    """Yield the rows of the table in docs/planning.md."""
    text = (ROOT / "docs" / "planning.md").read_text()
    table = text.split("| entry | base |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        _, base, modules, r, size, figure, planned = line.strip("| ").split(" | ")
        rank, cohort, rounds = (int(n) for n in (r, *re.findall(r"\d+", size)))
        yield Published(
            base.strip("`"),
            modules.split("`")[1],
            modules.endswith("DoRA"),
            rank,
            cohort,
            rounds,
            figure,
            tuple(re.findall(r"[\d,.]+\d", planned)),
        )


@pytest.mark.parametrize("row", list(published()), ids=lambda row: row.base)
def test_a_published_budget_is_reproduced_to_the_printed_digit(row: Published) -> None:
    config = resolve(
        {
            "model.name": row.base,
            "model.lora.target-modules": row.modules,
            "model.lora.peft-lora-r": row.rank,
            "static.dataset.name": "medalpaca/medical_meadow_medical_flashcards",
            "data.num-partitions": 20,
            "strategy.fraction-train": row.cohort / 20,
            "num-server-rounds": row.rounds,
            "strategy.name": "fedavg",
            "strategy.fraction-evaluate": 0.0,
            "model.lora.peft-use-dora": row.dora,
        }
    )
    plan = forecast(config).plan
    assert (plan.start_bytes > 0) == row.dora
    counted = plan.total_bytes - plan.start_bytes  # the template's server loads the base
    plain, named = (f"{total / MIB:,.2f}" for total in (counted, plan.total_bytes_with_key_names))
    figure, comma, _ = row.figure.partition(", with names")
    assert (named if comma else plain).startswith(figure)
    assert row.planned in ((plain,), (named,), (named, plain))
    halves = 2 * row.rounds  # of a round: down and up
    assert halves * plan.bytes_before_last_updates == (halves - 1) * counted


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not here")
def test_no_published_budget_is_left_out() -> None:
    text = (SHARED / "README.md").read_text()
    table = text.split("| entry | model, LoRA")[1].split("\n\n")[0].splitlines()[2:]
    figures = [found for line in table for found in re.findall(r"\d+,\d{3}(?:\.\d\d)?", line)]
    assert len(figures) >= len(table) == 6
    ours = {row.figure.partition(", with")[0] for row in published()}
    ours |= {figure for row in published() for figure in row.planned}
    assert set(figures) <= ours
