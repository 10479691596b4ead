"""Runs on preferences: figures, files, pages, and what stays as in any other run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grandrounds.config import recipes
from grandrounds.model import machine
from grandrounds.model.resident import set_adapter
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners.plain import round_line, summary_rows
from grandrounds.site.local_data import site_of
from grandrounds.site.preferences import ratios_and_margins
from grandrounds.study.comparison.runner import compare
from grandrounds.study.comparison.tables import notes, tables
from grandrounds.study.comparison.units import Design
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.read import read_run
from tests.conftest import WORDS
from tests.runs import Settings, adapter_bytes, play, read_json, summary_of

pytestmark = pytest.mark.slow


@pytest.fixture
def pairs(settings: Settings, tmp_path: Path) -> Settings:
    """Settings of a small federation on preferences: rest is right and a walk is wrong."""
    with (path := tmp_path / "pairs.jsonl").open("w") as file:
        for number in range(80):
            asked = f"What helps patient {number} against {WORDS[number % len(WORDS)]}?"
            row = {
                "prompt": asked,
                "chosen": "Rest, and tea.",
                "rejected": f"Walks of {number} km.",
            }
            file.write(json.dumps({**row, "ward": f"ward {number % 4}"}) + "\n")
    return {
        **settings,
        "static.dataset.name": str(path),
        "train.objective": "dpo",
        "train.learning-rate-max": 3e-2,
        "train.training-arguments.max-steps": 4,
    }


def test_a_run_learns_what_is_preferred_and_every_file_tells_it(pairs: Settings) -> None:
    run = play(pairs)
    first, *_, last = RunDirectory(run).read_metrics()
    assert first["held-out-loss"] == pytest.approx(math.log(2))
    assert (first["margin"], first["preference-accuracy"]) == (0.0, 0.0)
    assert last["held-out-loss"] < 0.6
    assert last["margin"] > 0.1
    assert last["preference-accuracy"] == 1.0
    assert "preferred 100.0 %, margin " in round_line(last, 3)
    summary = summary_of(run)
    assert summary["preferences"]["preference_accuracy"] == {"first": 0.0, "last": 1.0}
    shown = dict(summary_rows(summary))
    assert shown["preference accuracy"].startswith("0.0 % → 100.0 % of held-out pairs")
    assert shown["margin"].startswith("0.0000 → ")
    card = (run / summary["adapter"] / "README.md").read_text(encoding="utf-8")
    assert "nats per pair" in card
    assert "| preference accuracy | 100.0 % of held-out pairs |" in card
    assert "| objective | DPO, beta 0.1; reference: the base |" in card
    assert read_json(run / "ledger.json")["totals"] == read_json(run / "plan.json")["totals"]
    page = run_page(read_run(run))
    [figure] = [f for section in page.sections for f in section.figures if f.key == "preferences"]
    assert figure.table.rows[0][:2] == ("0", "0.0 %")
    assert figure.table.rows[-1][:2] == ("3", "100.0 %")
    assert "nats per pair" in page.outcome
    assert [tile.value for tile in page.tiles if tile.name == "preference accuracy"] == ["100.0 %"]


def test_margins_are_the_difference_to_the_base_of_the_saved_adapter(pairs: Settings) -> None:
    """Played again outside of the run, by the checkpoint's tensors."""
    run = play(pairs)
    config = recipes.resolve({**pairs, "run-directory": ""})
    resident = machine.prepare_model(config)
    saved = load_file(run / summary_of(run)["adapter"] / "adapter_model.safetensors")
    set_adapter(resident, {name: tensor.numpy() for name, tensor in saved.items()})
    last = RunDirectory(run).read_metrics()[-1]
    held = [pair for site in last["evaluated"] for pair in site_of(config, site).held_out]
    ratios, margins = ratios_and_margins(resident, held, config)
    assert float(margins.mean()) == pytest.approx(last["margin"], rel=1e-4)
    assert float((ratios > 0).double().mean()) == last["ranking-accuracy"]


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy.name": "ffa"},
        {"strategy.name": "fedprox", "strategy.proximal-mu": 0.1},
        {"communication.uplink-codec": "int8", "train.dpo-reference": "received"},
        {"communication.uplink-codec": "topk", "train.dpo-length-normalised": True},
        {"strategy.name": "product", "train.batching": "padded"},
        {"model.lora.peft-use-dora": True, "strategy.name": "fedavg"},
    ],
    ids=["ffa", "fedprox", "int8 received", "topk normalised", "product padded", "dora"],
)
def test_rules_codecs_and_references_train_on_pairs(
    pairs: Settings, changes: dict[str, Any]
) -> None:
    changes = {"strategy.name": "fedavg", "strategy.proximal-mu": 0.0, **changes}
    run = play(pairs, **changes)
    lines = RunDirectory(run).read_metrics()
    assert lines[-1]["held-out-loss"] < math.log(2) == pytest.approx(lines[0]["held-out-loss"])
    if changes["strategy.name"] == "ffa":
        start, end = (load_file(file) for file in _first_and_last(run))
        frozen = [name for name in start if ".lora_A." in name]
        assert all(torch.equal(start[name], end[name]) for name in frozen)


def _first_and_last(run: Path) -> list[Path]:
    folders = sorted(run.glob("peft_*"), key=lambda path: int(path.name[5:]))
    return [folder / "adapter_model.safetensors" for folder in (folders[0], folders[-1])]


def test_a_run_is_the_same_bit_for_bit_again(pairs: Settings, tmp_path: Path) -> None:
    again = play(pairs, **{"run-directory": str(tmp_path / "again")})
    assert adapter_bytes(play(pairs)) == adapter_bytes(again)


def test_a_comparison_judges_its_arms_on_held_out_pairs(pairs: Settings, tmp_path: Path) -> None:
    config = recipes.resolve(
        {**pairs, "run-directory": "", "data.partitioner": "natural", "data.partition-by": "ward"}
    )
    arms = ("base", "federated", "local", "centralised")
    content = compare(config, Design(arms, [42, 43]), tmp_path / "comparison")
    assert list(content["exams"]) == ["preferred", "ranked"]
    assert content["exams"]["preferred"]["n"] == sum(
        site["held-out-examples"]["42"] for site in content["sites"]
    )
    found = content["arms"]
    assert found["base"]["held-out-loss"]["mean"] == pytest.approx(math.log(2))
    assert found["base"]["accuracy"]["preferred"]["mean"] == 0.0
    for arm in arms[1:]:
        assert found[arm]["accuracy"]["preferred"]["mean"] > 0.9
        assert found[arm]["held-out-loss"]["mean"] < 0.65
    text = " ".join(str(table) for table in tables(content))
    assert "preferred %" in text
    assert any("losses in nats per pair" in note for note in notes(content))
