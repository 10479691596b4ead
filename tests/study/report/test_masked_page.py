"""The page of a masked run: figures of single sites are not there, and the page says why."""

from __future__ import annotations

import json
from pathlib import Path

from grandrounds.study.report import cost
from grandrounds.study.report.figures import Page
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.read import read_run
from grandrounds.study.report.several_runs import several_page
from tests.study.report.run_files import write_run


def masked_run(path: Path) -> Path:
    """Write a masked run of four rounds, of which the third was skipped."""
    write_run(path, secure_aggregation="masked32")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        for key in ("site-coverage", "update-norms", "update-cosines", "product-error-of-update"):
            del line[key]
        line |= {"train-loss": None, "coverage": None, "proximal-penalty": None}
        line["masked-sum"] = {"sites": 3, "weight": 210, "values-cut": 7}
    lines[3] |= {
        "good": [],
        "failed": {str(site): "the round's sum was lost" for site in lines[3]["cohort"]},
        "skipped": "Round 3: the shares of 'site 2' are not those of its secret.",
    }
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    return path


def notes(page: Page, key: str) -> str:
    return " ".join(next(s for s in page.sections if s.key == key).notes)


def test_what_nobody_knows_is_left_out_and_named(tmp_path: Path) -> None:
    page = run_page(read_run(masked_run(tmp_path / "run")))
    drawn = {figure.key for figure in page.figures}
    assert not {"coverage", "update-norms", "update-cosines", "aggregation-error"} & drawn
    assert {"loss", "participation"} <= drawn
    loss = next(figure for figure in page.figures if figure.key == "loss")
    assert "Training loss" not in loss.note
    for key in ("sites", "updates"):
        assert "the server learned their sum, and no figure of a single one" in notes(page, key)
    assert "Values that sites cut to the range of the sum: 28." in notes(page, "updates")
    assert next(tile.value for tile in page.tiles if tile.name == "coverage") == "not told"


def test_the_planned_curve_has_the_bytes_of_the_masks(tmp_path: Path) -> None:
    path = masked_run(tmp_path / "run")
    plan = json.loads((path / "plan.json").read_text())
    before = cost.planned(read_run(path))[-1][1]
    plan["totals"] |= {"masks.up": {"messages": 48, "tensor_bytes": 2 * 2**20, "key_bytes": 0}}
    (path / "plan.json").write_text(json.dumps(plan))
    assert cost.planned(read_run(path))[-1][1] == before + 2


def test_a_skipped_round_is_told_with_the_reason(tmp_path: Path) -> None:
    page = run_page(read_run(masked_run(tmp_path / "run")))
    said = "Round 3 was skipped, and the adapter stayed as it was: Round 3: the shares of"
    assert said in notes(page, "updates")
    assert (
        next(t.value for t in page.tiles if t.name == "visits used") == "8 of 12"
    )  # site 1 failed in round 2


def test_masks_are_told_under_privacy_with_what_the_server_still_gets(tmp_path: Path) -> None:
    page = run_page(read_run(masked_run(tmp_path / "run")))
    [table] = next(s for s in page.sections if s.key == "privacy").tables
    told = dict(table.rows)
    assert told["updates"].startswith("secure aggregation (beta, unreviewed), masked32; a rehears")
    assert told["the server still gets of each site"].startswith("its introduction")
    plain = run_page(read_run(write_run(tmp_path / "plain")))
    assert not next(s for s in plain.sections if s.key == "privacy").tables


def test_a_masked_and_a_plain_run_stand_side_by_side(tmp_path: Path) -> None:
    runs = [read_run(masked_run(tmp_path / "run")), read_run(write_run(tmp_path / "plain"))]
    table = next(s for s in several_page(runs).sections if s.key == "table").tables[0]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["coverage"][0] == "not told"
    assert rows["training loss, last"][0] == "-"
