"""What a run learns: data coverage, falling losses, and reproducibility from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from grandrounds.model import resident as model
from grandrounds.model.base import base_loads
from grandrounds.wire import schedule as sampling
from tests.end_to_end.sites import RecordedVisit, answer_without_a_model
from tests.places import SHARED
from tests.runs import Settings, adapter_bytes, metrics_of, play, summary_of

WIKIDOC = SHARED / "train/wikidoc_patient_information.jsonl.gz"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the bases loaded from here on, starting with no resident model."""
    loaded: list[str] = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def count(name: str, *args: Any, **kwargs: Any) -> Any:
        loaded.append(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", count)
    monkeypatch.setattr(model, "_resident", None)
    return loaded


def test_a_site_sees_every_example_once_before_it_repeats_one(
    settings: Settings, visited: list[RecordedVisit]
) -> None:
    run = play(settings, **{"num-server-rounds": 5, "strategy.fraction-train": 1.0})
    for partition in range(4):
        visits_here = [visit.examples for visit in visited if visit.partition == partition]
        different = [len({e.input_ids for v in visits_here[:k] for e in v}) for k in range(1, 6)]
        assert different == [8, 16, 24, 27, 27]
        reported = [line["site-coverage"][str(partition)] for line in metrics_of(run)[1:]]
        assert reported == pytest.approx([8 / 27, 16 / 27, 24 / 27, 1, 1])


def test_federation_coverage_grows_with_every_visit_and_reaches_one(
    settings: Settings,
) -> None:
    run = play(settings, **{"num-server-rounds": 12, "strategy.fraction-evaluate": 0.0})
    lines = metrics_of(run)[1:]
    coverage = [line["coverage"] for line in lines]
    # 108 examples in all: each of the 24 visits of 8 adds what its site has not seen
    given = dict.fromkeys(range(4), 0)
    for line, share in zip(lines, coverage, strict=True):
        for partition in line["cohort"]:
            given[partition] = min(27, given[partition] + 8)
        assert share == pytest.approx(sum(given.values()) / 108)
    assert coverage[0] == pytest.approx(16 / 108)
    assert summary_of(run)["coverage"] == coverage[-1] == 1.0


def test_the_base_is_loaded_once_for_all_sites_rounds_and_evaluations(
    settings: Settings, loads: list[str]
) -> None:
    before = base_loads()
    play(settings)
    assert loads == [settings["model.name"]]
    assert base_loads() == before + 1


def test_the_server_never_loads_the_base(settings: Settings, loads: list[str]) -> None:
    before = base_loads()
    run = play(settings, answer_without_a_model(dict.fromkeys(range(4), 1.0)))
    assert summary_of(run)["status"] == "completed"
    assert loads == []
    assert base_loads() == before


def test_training_and_held_out_loss_fall(settings: Settings) -> None:
    run = play(
        settings,
        **{
            "num-server-rounds": 4,
            "strategy.fraction-train": 1.0,
            "model.lora.target-modules": "all-linear",
            "model.lora.peft-lora-alpha": 32,
            "train.learning-rate-max": 0.03,
            "train.learning-rate-min": 0.01,
            "train.training-arguments.max-steps": 4,
        },
    )
    summary = summary_of(run)
    assert summary["train_loss"]["last"] < summary["train_loss"]["first"] - 0.1
    assert summary["held_out_loss"]["last"] < summary["held_out_loss"]["first"] - 0.1


def test_the_same_seed_gives_the_same_adapter_to_the_bit_and_another_seed_another(
    settings: Settings, tmp_path: Path
) -> None:
    first, again, other = (
        play(settings, **{"run-directory": str(tmp_path / name), "seed": seed})
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for name in ("peft_2", "peft_3"):
        assert adapter_bytes(first, name) == adapter_bytes(again, name)
        assert adapter_bytes(first, name) != adapter_bytes(other, name)


def test_a_resident_model_left_by_another_adapter_does_not_change_a_run(
    settings: Settings, tmp_path: Path
) -> None:
    first = play(settings, **{"run-directory": str(tmp_path / "a")})
    play(
        settings,
        **{
            "run-directory": str(tmp_path / "b"),
            "model.lora.peft-lora-r": 2,
            "model.lora.target-modules": "all-linear",
            "model.lora.dropout": 0.5,
        },
    )
    again = play(settings, **{"run-directory": str(tmp_path / "c")})
    assert adapter_bytes(first) == adapter_bytes(again)


def test_a_run_trains_the_cohorts_drawn_from_its_seed(settings: Settings) -> None:
    lines = metrics_of(play(settings, seed=11))[1:]
    drawn = [sampling.training_cohort(11, k, 4, 2, True) for k in (1, 2, 3)]
    assert [line["cohort"] for line in lines] == drawn


@pytest.mark.slow
@pytest.mark.skipif(not WIKIDOC.is_file(), reason="the WikiDoc sample is not beside the project")
def test_twenty_sites_learn_from_wikidoc(tiny_base: Path, tmp_path: Path) -> None:
    """5,942 published patient questions, some of them duplicates, many of them long."""
    run = play(
        {
            "model.name": str(tiny_base),
            "static.dataset.name": str(WIKIDOC),
            "run-directory": str(tmp_path / "run"),
            "num-server-rounds": 10,
            "data.num-partitions": 20,
            "strategy.fraction-train": 0.1,
            "strategy.fraction-evaluate": 0.1,
            "model.lora.target-modules": "all-linear",
            "train.seq-length": 256,  # the tiny tokenizer knows no English words
            "train.learning-rate-max": 0.02,
            "train.num-threads": 1,
            "train.training-arguments.max-steps": 2,
            "train.training-arguments.per-device-train-batch-size": 4,
        }
    )
    summary, lines = summary_of(run), metrics_of(run)
    assert summary["held_out_loss"]["last"] < summary["held_out_loss"]["first"] - 0.1
    data = summary["data"]
    assert data["duplicate-rows"] > 0
    assert data["truncated"] > 0
    parts = ("empty-rows", "duplicate-rows", "unlearnable", "train-examples", "held-out-examples")
    assert data["rows"] == sum(data[part] for part in parts)
    coverage = [line["coverage"] for line in lines[1:]]
    # no site reaches the end of its examples: every visit of 8 adds 8
    expected = [16 * k / data["train-examples"] for k in range(1, 11)]
    assert coverage == pytest.approx(expected)
    assert summary["failed_replies"] == 0
