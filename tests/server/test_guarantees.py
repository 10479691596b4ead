"""What card, report and terminal say of a guarantee and of its audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.server.guarantees import (
    NO_PROOF,
    audit_line,
    guarantee_rows,
    is_broken,
    not_covered,
    verdict,
)
from grandrounds.server.model_card import Findings, model_card
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.page import html
from grandrounds.study.report.read import read_run
from tests.study.report.run_files import write_run

AUDIT: dict[str, Any] = {
    "claimed-epsilon": 4.0,
    "delta": 1e-5,
    "at-least-epsilon": 0.41,
    "membership": {"auc": 0.61, "tpr-at-fpr": [{"fpr": 0.01, "tpr": 0.03, "interval": [0, 0.1]}]},
    "extraction": {"in": {"matches": 3, "canaries": 98}},
    "mechanism": {"canaries": 5000, "at-least-epsilon": 1.8},
}

PRIVACY: dict[str, Any] = {
    "guarantee": "example",
    "mode": "enforced",
    "adjacency": "add or remove one unit",
    "unit": "patient",
    "delta": 1e-5,
    "noise_multiplier": 0.79,
    "clipping_norm": 1.0,
    "sampling_rate": 0.064,
    "reserved_epsilon": 4.0,
    "accountant": "dp-accounting 0.6.0, PLD",
    "epsilon": 3.66,
    "epsilon_by_site": {"0": 3.66, "1": 3.09, "2": None},
    "sites_without_guarantee": [],
    "budget_spent": ["1"],
}


def card_of(**found: Any) -> str:
    return model_card(recipes.resolve(), ["q_proj"], 1, None, 0.5, Findings(**found))


def page_text(path: Path, summary: dict[str, Any], audit: dict[str, Any] | None) -> str:
    run = write_run(path)
    told = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**told, **summary}))
    if audit:
        (run / "privacy-audit.json").write_text(json.dumps(audit))
    return html(run_page(read_run(run)))


def test_audit_below_claim_is_not_called_proof(tmp_path: Path) -> None:
    assert not is_broken(AUDIT)
    assert verdict(AUDIT) == NO_PROOF
    assert audit_line(AUDIT) == (
        "claimed epsilon 4.00, at least 0.41 (95 %), AUC 0.61, TPR at 1 % FPR 3.0 %, "
        "extraction 3 of 98"
    )
    card = card_of(privacy=PRIVACY, audit=AUDIT)
    page = page_text(tmp_path / "run", {"privacy": PRIVACY}, AUDIT)
    for text in (card, page):
        assert "bound below the claim proves nothing" in text
        assert "claimed epsilon 4.00, at least 0.41" in text
        assert "on invented records" in text
        for word in ("proven", "verified", "confirms", "passed"):
            assert word not in text[text.index("Audit: ") :][:1500]


@pytest.mark.parametrize("bounds", [(4.2, 1.0), (0.4, 4.2)])
def test_a_bound_above_the_claim_is_called_broken(bounds: tuple[float, float]) -> None:
    key = "surely-at-least-epsilon"
    broken = {**AUDIT, key: bounds[0], "mechanism": {"canaries": 5000, key: bounds[1]}}
    assert is_broken(broken)
    assert "the guarantee does not hold" in verdict(broken)
    assert "does not hold" in card_of(privacy=PRIVACY, audit=broken)


def test_a_bound_that_may_be_chance_is_neither_called_broken_nor_right() -> None:
    doubtful = {**AUDIT, "at-least-epsilon": 4.1, "surely-at-least-epsilon": 3.0}
    assert not is_broken(doubtful)
    assert "Audit again" in verdict(doubtful)


def test_an_audit_without_a_claim_says_so() -> None:
    found = {**AUDIT, "claimed-epsilon": None, "mechanism": None}
    assert not is_broken(found)
    assert audit_line(found).startswith("no epsilon claimed, at least 0.41")
    assert "no guarantee is claimed" in verdict(found)
    card = card_of(audit=found)
    assert "No differential privacy" in card
    assert "no epsilon claimed" in card


def test_a_card_tells_unit_delta_and_the_epsilon_of_each_site() -> None:
    card = card_of(privacy=PRIVACY)
    assert "Differential privacy of one patient, for each site by itself" in card
    assert "| epsilon by site | 0: 3.66, 1: 3.09, 2: not told |" in card
    assert "| delta | 1e-05 |" in card
    assert "| guarantee | enforced by the sites |" in card
    assert "| budget spent | 1 |" in card
    assert "several sites: there the epsilons add up" in card
    assert "No differential privacy" not in card


def test_a_rehearsal_covers_nothing_against_whoever_ran_it(tmp_path: Path) -> None:
    rehearsed = {**PRIVACY, "mode": "rehearsal", "unit": "record"}
    assert not_covered(rehearsed)[0].startswith("Everything, against whoever ran it")
    assert "A rehearsal of differential privacy of one record" in card_of(privacy=rehearsed)
    page = page_text(tmp_path / "run", {"privacy": rehearsed}, None)
    assert "a rehearsal in one process" in page
    assert "Everything, against whoever ran it" in page


def test_what_another_version_left_out_of_a_summary_is_not_told() -> None:
    rows = dict(guarantee_rows({"guarantee": "example"}))
    assert rows["epsilon spent"] == rows["epsilon by site"] == "not told"
    assert rows["delta"] == "differs by site"
    assert not_covered({})[0].startswith("Everything")
    assert audit_line({}) == (
        "no epsilon claimed, at least not told (95 %), AUC not told, extraction - of -"
    )


def test_a_run_without_a_guarantee_has_no_section_on_it(tmp_path: Path) -> None:
    page = run_page(read_run(write_run(tmp_path / "run")))
    assert not next(s for s in page.sections if s.key == "privacy")
    assert "epsilon" not in [tile.name for tile in page.tiles]
