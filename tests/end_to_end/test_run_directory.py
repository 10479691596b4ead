"""What a run writes into its directory."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from grandrounds.config import recipes
from grandrounds.model import machine
from grandrounds.model.tokenizers import tokenizer_of
from grandrounds.server import directory as run_directory
from grandrounds.site import local_data as site
from grandrounds.site import training
from tests.end_to_end.sites import answer_without_a_model
from tests.runs import Settings, adapter_bytes, config_of, metrics_of, play, read_json, summary_of


@pytest.fixture(scope="module")
def finished(federation: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run; tests only read it."""
    rates = {"train.learning-rate-max": 0.1, "train.learning-rate-min": 0.05}
    folder = tmp_path_factory.mktemp("finished") / "run"
    return play(federation, **{"run-directory": str(folder), **rates})


def test_a_run_writes_exactly_the_documented_files(finished: Path) -> None:
    run = finished
    promised = {
        match.group(1)
        for line in (run_directory.__doc__ or "").splitlines()
        if (match := re.match(r"    (\S+)  ", line))
    }
    assert "metrics.jsonl" in promised
    there = {re.sub(r"peft_\d+", "peft_<round>", f.name) + "/" * f.is_dir() for f in run.iterdir()}
    other = {"unfinished.jsonl", "masks.json", "roster.json", "sites/"}  # of other runs
    assert there == promised - other
    assert not list(run.rglob("*.partial"))
    for checkpoint in run.glob("peft_*"):
        assert {f.name for f in checkpoint.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    assert sorted(f.name for f in (run / "state").iterdir()) == ["round-000002", "round-000003"]


def test_metrics_have_a_line_for_the_base_and_for_each_round(finished: Path) -> None:
    lines = metrics_of(finished)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert "train-loss" not in lines[0]
    assert all(math.isfinite(line["train-loss"]) for line in lines[1:])
    assert all(math.isfinite(line["held-out-loss"]) for line in lines)
    assert all(line["good"] == line["cohort"] and len(line["cohort"]) == 2 for line in lines[1:])


def test_the_ledger_equals_the_plan_to_the_byte(finished: Path) -> None:
    run = finished
    plan, ledger = read_json(run / "plan.json"), read_json(run / "ledger.json")
    assert sum(t["tensor_bytes"] for t in ledger["totals"].values()) == plan["total-bytes"]
    # 3 rounds of 2 sites, down and up; 2 sites judge the base and every round
    counts = {kind: t["messages"] for kind, t in ledger["totals"].items()}
    assert counts == {"train.down": 6, "train.up": 6, "evaluate.down": 8}
    # 4 modules of rank 4 on width 32: q 32 -> 32 and v 32 -> 16, in two layers, float32 + header
    message = 2 * 4 * (4 * (32 + 32) + 4 * (32 + 16)) + 8 * 128
    assert plan["total-bytes"] == 20 * message
    summary = summary_of(run)
    assert summary["communication_mib"] == summary["planned_mib"] == 20 * message / 2**20
    assert metrics_of(run)[-1]["communication-mib"] == summary["communication_mib"]


def test_checkpoints_are_saved_at_the_configured_interval_and_at_the_end(
    settings: Settings,
) -> None:
    run = play(settings, **{"num-server-rounds": 5, "train.save-every-round": 2})
    assert sorted(f.name for f in run.glob("peft_*")) == ["peft_2", "peft_4", "peft_5"]
    named = [line.get("checkpoint") for line in metrics_of(run)]
    assert named == [None, None, "peft_2", None, "peft_4", "peft_5"]
    assert summary_of(run)["adapter"] == "peft_5"


@pytest.mark.parametrize("name", ["peft_2", "peft_3"])
def test_a_checkpoint_loaded_with_peft_has_the_reported_held_out_loss(
    finished: Path, name: str
) -> None:
    from peft import PeftModel

    config = config_of(finished)
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.name)
    tuned = PeftModel.from_pretrained(base, str(finished / name))
    line = metrics_of(finished)[int(name.removeprefix("peft_"))]

    def loss(evaluated: Any) -> float:
        nll_sum, tokens = 0.0, 0
        for partition in line["evaluated"]:
            held_out = site.open_site(
                config.static.name,
                config.data,
                config.model.name,
                config.train.seq_length,
                config.federation.seed,
                partition,
            ).held_out
            pad = tokenizer_of(config.model.name).pad_token_id
            forward = machine.forward(config)
            more = training.held_out_loss(evaluated, held_out, 4, pad, forward)
            nll_sum, tokens = nll_sum + more[0], tokens + more[1]
        return nll_sum / tokens

    assert loss(tuned) == pytest.approx(line["held-out-loss"], rel=1e-5)
    with tuned.disable_adapter():
        untouched = loss(tuned)
    assert untouched == pytest.approx(metrics_of(finished)[0]["held-out-loss"], rel=1e-5)
    assert abs(untouched - line["held-out-loss"]) > 1e-2


def test_the_model_card_states_base_data_rounds_and_comparability(
    finished: Path, federation: Settings
) -> None:
    card = (finished / "peft_2" / "README.md").read_text()
    assert f"base | {Path(federation['model.name']).name} (local)" in card
    assert "data | cards.jsonl (local), 4 sites" in card
    assert federation["model.name"] not in card  # a card is read on other machines
    assert "after round 2 of 3" in card
    assert "Not comparable with the FlowerTune leaderboard" in card
    assert "4 partitions, not 20" in card
    assert "license: unknown" in card
    assert "| failed replies so far | 0 |" in card
    assert f"{metrics_of(finished)[2]['held-out-loss']:.4f} nats" in card


def test_the_best_adapter_is_the_checkpoint_with_the_lowest_held_out_loss(
    settings: Settings,
) -> None:
    # round 3 is lower still, but was not saved
    sites = answer_without_a_model({0: 0.05, 1: 3.0, 2: 1.0, 3: 0.5, 4: 2.0})
    run = play(settings, sites, **{"num-server-rounds": 4})
    summary = summary_of(run)
    best = {"adapter": "peft_2", "round": 2, "held_out_loss": 1.0}
    assert (summary["best_adapter"], summary["adapter"]) == (best, "peft_4")


def test_without_evaluation_a_run_has_no_held_out_loss_and_no_best_adapter(
    settings: Settings,
) -> None:
    run = play(settings, **{"strategy.fraction-evaluate": 0.0, "data.held-out-fraction": 0.0})
    summary = summary_of(run)
    assert (summary["held_out_loss"], summary["best_adapter"]) == (None, None)
    assert all("held-out-loss" not in line for line in metrics_of(run))
    ledger = read_json(run / "ledger.json")
    assert list(ledger["totals"]) == ["train.down", "train.up"]
    assert summary["communication_mib"] == summary["planned_mib"]


def test_the_written_configuration_is_a_recipe_that_gives_the_same_adapter(
    finished: Path, tmp_path: Path
) -> None:
    recipe = recipes.load_recipe(finished / "config.toml")
    again = play({**recipe, "run-directory": str(tmp_path / "again")})
    assert adapter_bytes(again) == adapter_bytes(finished)
