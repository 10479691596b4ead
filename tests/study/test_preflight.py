"""Unsound amounts are warned of beyond thresholds that are said; sound ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config.recipes import resolve
from grandrounds.data.survey import Survey, survey
from grandrounds.errors import ConfigError, DataError, ModelError, RunDirectoryError
from grandrounds.model.location import check_location
from grandrounds.server.directory import check_vacant
from grandrounds.study import preflight
from grandrounds.study.sites import number_of_sites
from tests.places import ROOT


def cards(path: Path, rows: list[tuple[str, str, str]]) -> str:
    lines = [json.dumps({"input": q, "output": a, "ward": ward}) for q, a, ward in rows]
    path.write_text("\n".join(lines))
    return str(path)


def many(count: int, blank: int = 0) -> list[tuple[str, str, str]]:
    return [(f"q {i}", "" if i < blank else f"a {i}", f"ward {i % 2}") for i in range(count)]


def warned(tmp_path: Path, rows: list[tuple[str, str, str]], **settings: Any) -> list[str]:
    """Return the warnings about two sites that both train and evaluate in every round."""
    config = resolve(
        {
            "static.dataset.name": cards(tmp_path / "cards.jsonl", rows),
            "data.num-partitions": 2,
            "strategy.fraction-train": 1.0,
            "strategy.fraction-evaluate": 1.0,
            "data.held-out-fraction": 0.1,
            "train.training-arguments.max-steps": 5,
            "num-server-rounds": 4,
            **{key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()},
        }
    )
    told = preflight.check(config)
    return [line for line in told if line != "columns that are not read: ward"]


def test_the_packaged_run_is_sound() -> None:
    assert preflight.check(resolve()) == []


def test_sound_amounts_are_not_warned_of(tmp_path: Path) -> None:
    """Two sites of 90 training and 10 held-out examples; four visits of 80: 3.6 passes."""
    assert warned(tmp_path, many(200)) == []


def test_a_visit_that_learns_by_heart(tmp_path: Path) -> None:
    """Two rows a site, one of them held out: a visit of 80 passes 80 times over one example."""
    passes, held_out, few = warned(tmp_path, many(4))
    assert passes.startswith("a visit passes 80 times over the 1 training example of a site")
    assert "(warned of above 5)" in passes
    assert held_out.startswith("50% of the examples are held out (warned of above 25%)")
    assert few.startswith("the held-out loss rests on 2 examples of 2 of 2 sites")


def test_a_run_that_passes_too_often(tmp_path: Path) -> None:
    """Forty visits of 80 over 90 examples: 36 passes, though less than one a visit."""
    [told] = warned(tmp_path, many(200), num_server_rounds=40)
    assert told.startswith("the run passes 36 times over the 90 training examples of a site")


def test_many_rows_without_an_answer(tmp_path: Path) -> None:
    [told] = warned(tmp_path, many(300, blank=60))
    assert told.startswith("60 of 300 rows have no question or no answer")
    assert warned(tmp_path, many(300, blank=20)) == []


def test_a_learning_rate_for_the_embedded_base_on_another_one() -> None:
    told = preflight.warnings(resolve({"model.name": "org/base"}), None)
    assert [line.partition(" is high")[0] for line in told] == ["train.learning-rate-max = 0.003"]
    rate = {"train.learning-rate-max": 1e-3}
    assert preflight.warnings(resolve({"model.name": "org/base", **rate}), None) == []


def test_natural_sites_have_their_own_rows(tmp_path: Path) -> None:
    rows = [(f"q {i}", f"a {i}", "big" if i < 90 else "small") for i in range(100)]
    how = {"data.partitioner": "natural", "data.partition-by": "ward", "data.num-partitions": 2}
    source = {"static.dataset.name": cards(tmp_path / "cards.jsonl", rows)}
    config = resolve({**how, **source})
    found = preflight.check_data(config)
    assert found == Survey(100, 100, {"big": 90, "small": 10}, 0)
    assert [site.train + site.held_out for site in preflight.sites_of(config, found)] == [90, 10]


def test_a_survey_counts_what_is_usable(tmp_path: Path) -> None:
    rows = [("q", "a", "x"), ("q", " ", "x"), ("", "a", "y"), ("q", "a", "")]
    source = cards(tmp_path / "cards.jsonl", rows)
    assert survey(source, "input", "output", "ward") == Survey(4, 2, {"x": 1, "y": 0}, 1)
    assert survey(source, "input", "output") == Survey(4, 2, {}, 0, unread=("ward",))
    assert survey("someone/else", "input", "output") is None
    assert number_of_sites(source, ("input", "output", "ward"), may_load=False) == 2


# --- Places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-", "my cards", "data/cards/march", "cards[train", "cards@"])
def test_a_name_that_no_data_set_of_the_hub_has_is_told_at_once(name: str) -> None:
    with pytest.raises(DataError, match="neither a file or folder that exists nor the name"):
        preflight.check(resolve({"static.dataset.name": name}))


@pytest.mark.parametrize("name", ["formulary", "org/base", "base"])
def test_a_name_of_the_hub_is_not_looked_up(name: str) -> None:
    check_location(name)


def test_a_base_is_a_folder_with_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\)"):
        check_location(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    check_location(str(tmp_path))
    with pytest.raises(ModelError, match="is a file, not the folder of a base model"):
        check_location(str(tmp_path / "model.safetensors"))


def test_a_run_directory_is_no_base() -> None:
    with pytest.raises(ModelError, match="it is a run directory, whose base is named in"):
        check_location(str(ROOT / "tests" / "fixtures" / "runs" / "flora"))


def test_a_vacant_place_is_not_written_to(tmp_path: Path) -> None:
    check_vacant(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="is a file: Not a directory"):
        check_vacant(tmp_path / "file" / "run")


def test_a_last_round_that_trains_nothing_is_warned_of() -> None:
    [told] = preflight.warnings(resolve({"train.learning-rate-min": 0.0}), None)
    assert "set train.learning-rate-min above 0" in told
    assert "Real sites refuse" in told


def test_what_a_template_of_ones_own_lacks_is_told_before_a_run(tmp_path: Path) -> None:
    found = warned(tmp_path, many(300), **{"data.prompt-template": SHOWS})
    assert any("the data have no column 'instruction'" in line for line in found)
    with pytest.raises(ConfigError, match="the question does not reach the prompt"):
        preflight.check(resolve({"data.prompt-template": "Tell me. {{ answer }}"}))


SHOWS = "{% if instruction %}{{ instruction }} {% endif %}{{ question }}: {{ answer }}"
"""A template that shows instructions apart from questions."""


def warned_of_triples(tmp_path: Path, rows: list[tuple[str, str]], template: str) -> list[str]:
    lines = [json.dumps({"instruction": i, "input": q, "output": "B."}) for i, q in rows]
    (file := tmp_path / "triples.jsonl").write_text("\n".join(lines))
    settings = {"static.dataset.name": str(file), "data.prompt-template": template}
    return warned(tmp_path, [], **settings)


def test_a_template_with_instructions_leaves_no_row_without_input_out(tmp_path: Path) -> None:
    rows = [("Explain.", str(i) if i % 2 else "") for i in range(300)]
    told = " ".join(warned_of_triples(tmp_path, rows, "alpaca"))
    assert "not read: instruction" in told
    assert "150 of 300 rows have no question" in told
    assert warned_of_triples(tmp_path, rows, SHOWS) == []


def test_alpaca_triples_are_told_as_the_template_shows_them(tmp_path: Path) -> None:
    rows = [(f"{i % 2}.", str(i)) for i in range(300)]
    [joined] = warned_of_triples(tmp_path, rows, "alpaca")
    [apart] = warned_of_triples(tmp_path, rows, SHOWS)
    assert "instruction and input make the question" in joined
    assert "the template shows the instruction apart" in apart
