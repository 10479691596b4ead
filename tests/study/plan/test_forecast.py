"""What the sites will have read, other encodings and transfer times, worked out by hand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.data.formulary.facts import flashcards
from grandrounds.data.rows import Rows
from grandrounds.errors import DataError
from grandrounds.study.plan.forecast import (
    LEADERBOARD_ROWS,
    as_dict,
    by_codec,
    count_rows,
    forecast,
    link_seconds,
    reading,
    rows_of,
    site_sizes,
)
from grandrounds.study.plan.tables import notes, tables
from grandrounds.wire import schedule as sampling
from grandrounds.wire.ledger import Ledger
from grandrounds.wire.traffic import Plan
from tests.places import ROOT

JSL = ROOT / "configs" / "jsl-medllama-3-8b-100-rounds.toml"


def configured(**changes: Any) -> Any:
    return recipes.resolve(recipes.load_recipe(JSL), changes)


# --- Data -----------------------------------------------------------------------------------------


def test_the_leaderboards_data_and_the_formulary_need_no_file() -> None:
    assert count_rows("medalpaca/medical_meadow_medical_flashcards") == LEADERBOARD_ROWS
    assert count_rows("formulary") == 1_500
    assert count_rows("someone/else") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"x": 1}\n\n{"x": 2}\n{"x": 3}'),
        ("a.json", '[{"x": 1}, {"x": 2}, {"x": 3}]'),
        ("b.json", '{"x": 1}\n{"x": 2}\n{"x": 3}\n'),
        ("a.csv", 'x,y\n1,"two\nlines"\n2,b\n3,c\n'),
    ],
)
def test_rows_of_local_files_are_counted_packed_or_not(
    name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    assert count_rows(str(tmp_path / name)) == count_rows(str(packed)) == 3


def test_a_damaged_file_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"cannot be read: .* or use --rows"):
        count_rows(str(tmp_path / "a.jsonl.gz"))


def test_rows_are_those_that_a_run_reads(tmp_path: Path) -> None:
    rows = [{"input": f"{i}?", "output": "B."} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "b.tsv").write_text("input\toutput\n3?\tB.\n")
    for name, count in (("a.json", 3), ("b.tsv", 1)):
        assert rows_of(recipes.resolve({"static.dataset.name": str(tmp_path / name)})) == count


def test_the_rows_of_a_part_of_a_hub_data_set_are_unknown() -> None:
    named = {"static.dataset.name": "medalpaca/medical_meadow_medical_flashcards"}
    assert rows_of(recipes.resolve(named)) == LEADERBOARD_ROWS
    assert rows_of(recipes.resolve(named | {"static.dataset.split": "train[:1000]"})) is None


def test_examples_and_coverage_of_the_jsl_recipe_by_hand() -> None:
    """300 visits of 6 * 16 = 96 examples: 28,800. In turn, each of 20 sites is visited 15 times and
    sees 1,440 of its 1,697 or 1,698: 28,800 of 33,955, 84.8 %."""
    read = reading(configured(**{"strategy.cohorts": "balanced"}), 33_955)
    assert (read.examples_per_visit, read.examples_seen) == (96, 28_800)
    assert read.share_covered == 28_800 / 33_955


def test_without_a_cursor_a_site_sees_the_same_examples_again() -> None:
    """20 sites x 96 of 33,955."""
    read = reading(configured(**{"train.dynamic-data-seed": False}), 33_955)
    assert read.share_covered == 20 * 96 / 33_955


def test_epochs_and_held_out_examples_are_counted() -> None:
    """200 rows, 20 sites of 10: one is held out of each; 2 epochs of 9 are 18, 300 times."""
    changes = {
        "train.training-arguments.max-steps": -1,
        "train.training-arguments.num-train-epochs": 2.0,
        "data.held-out-fraction": 0.05,
    }
    read = reading(configured(**changes), 200)
    assert (read.train_examples, read.examples_per_visit) == (180, 18)
    assert (read.examples_seen, read.share_covered) == (300 * 18, 1.0)


def test_coverage_is_that_of_the_cursors_of_a_run() -> None:
    """Indices are really drawn for uniform cohorts, site by site, and counted."""
    config = configured(**{"strategy.cohorts": "uniform", "num-server-rounds": 30})
    seen: dict[int, set[int]] = {site: set() for site in range(20)}
    cursors = dict.fromkeys(range(20), 0)
    for number in range(1, 31):
        for site in sampling.training_cohort(42, number, 20, 3, False):
            seen[site].update(sampling.next_examples(42, site, 200, cursors[site], 96))
            cursors[site] += 96
    share = sum(map(len, seen.values())) / 4_000
    assert reading(config, 4_000).share_covered == pytest.approx(share)


@pytest.mark.parametrize("partitioner", ["iid", "size-skewed"])
def test_sites_have_the_sizes_that_the_partitioner_gives(partitioner: str) -> None:
    from grandrounds.data.partitioning import Division, Partition, partition_rows

    rows = Rows({"x": list(range(107))})
    division = Division(partitioner, "", 0.5)
    sizes = [len(partition_rows(rows, division, Partition(1, site, 5))) for site in range(5)]
    changes = {"data.partitioner": partitioner, "data.num-partitions": 5}
    config = configured(**changes, **{"strategy.fraction-train": 0.4})
    predicted = site_sizes(config, 107)
    assert max(abs(a - b) for a, b in zip(sizes, predicted, strict=True)) <= (
        0 if partitioner == "iid" else 5
    )


def test_the_formularys_sites_hold_as_many_flashcards_each() -> None:
    config = recipes.resolve()
    held = Counter(card["site"] for card in flashcards())
    assert site_sizes(config, 1_500) == [held[site] for site in range(20)]
    assert reading(config, 1_500).sizes_known


# --- Encodings and links --------------------------------------------------------------------------


def test_every_codec_is_offered_and_float32_costs_most() -> None:
    planned = forecast(configured())
    plans = by_codec(planned, ("none", "bf16", "int4", "sign"))
    assert list(plans) == ["none", "bf16", "int4", "sign up, int4 down"]
    assert plans["none"].total_bytes == planned.plan.total_bytes
    assert plans["none"].total_bytes > 7 * plans["int4"].total_bytes


def test_rules_that_write_factors_anew_are_offered_no_coarse_codec() -> None:
    changes = {"strategy.name": "flora", "strategy.proximal-mu": 0.0}
    assert list(by_codec(forecast(configured(**changes)), ("int8", "sign", "topk"))) == ["int8"]


def test_what_goes_on_from_an_adapter_is_offered_no_lossy_downlink() -> None:
    saved = {"model.lora.from-adapter-sha256": "0" * 64, "model.lora.from-adapter": "a"}
    start = {"num-server-rounds": 1, **saved}
    offered = by_codec(forecast(recipes.resolve(start)), ("bf16", "float32", "topk"))
    assert list(offered) == ["bf16 up, none down", "float32", "topk up, none down"]


def test_transfer_times_by_hand() -> None:
    """320 bytes each way: 2,560 bits at 1 Mbit/s down and 0.5 up: 2.56 + 5.12 ms a round."""
    plan = Plan(16, 3, Ledger(), (320,) * 3, (320,) * 3, 320)
    seconds = link_seconds(plan, uplink_mbps=0.5, downlink_mbps=1.0)
    assert seconds == pytest.approx({"round": 0.00768, "all-rounds": 3 * 0.00768})


# --- The whole ------------------------------------------------------------------------------------


def test_a_forecast_is_json_and_names_the_base_whose_shapes_it_took() -> None:
    planned = forecast(configured())
    content = json.loads(json.dumps(as_dict(planned)))
    assert content["model"] == "johnsnowlabs/JSL-MedLlama-3-8B-v1.0"
    assert content["architecture"] == "meta-llama/Meta-Llama-3-8B"
    assert content["base-parameters"] == 8_030_261_248
    assert content["communication"]["total-mib"] == pytest.approx(7_809.375)
    assert content["site-memory-bytes"]["total"] == planned.site.total


def test_an_unknown_base_takes_the_shapes_of_the_architecture_given() -> None:
    config = configured(**{"model.name": "someone/tuned-llama"})
    planned = forecast(config, architecture="meta-llama/Meta-Llama-3-8B")
    assert planned.architecture.name == "someone/tuned-llama"
    assert planned.plan.total_bytes == forecast(configured()).plan.total_bytes


def test_floras_sites_hold_the_stack_and_a_fresh_adapter() -> None:
    """Ranks 32 + 8 instead of 8: five times the adapter; what is trained at most the same."""
    changes = {"strategy.name": "flora", "strategy.proximal-mu": 0.0}
    plain, stacked = forecast(configured()), forecast(configured(**changes))
    assert stacked.site.adapter == 5 * plain.site.adapter
    assert stacked.server_bytes > plain.server_bytes


def test_the_start_of_doras_magnitudes_is_planned_once_from_two_sites() -> None:
    """32 layers with 4096 outputs of q_proj and 1024 of v_proj, each vector with its header."""
    plan = forecast(configured(**{"model.lora.peft-use-dora": True})).plan
    assert plan.start_bytes == 2 * 32 * (4 * (4096 + 1024) + 2 * 128)
    assert plan.ledger.totals["magnitudes.up"].messages == 2
    assert forecast(configured()).plan.start_bytes == 0


def test_a_plan_for_several_gpus_is_for_one_of_them() -> None:
    """The activations of 8 of 16 examples and the whole base; the messages stay as they are."""
    jsl = recipes.load_recipe(ROOT / "configs" / "jsl-medllama-3-8b.toml")
    one, two = (forecast(recipes.resolve({**jsl, "train.devices": n})) for n in (1, 2))
    assert two.site.base == one.site.base
    assert two.site.activations * 2 == one.site.activations
    assert two.plan.total_bytes == one.plan.total_bytes
    assert (as_dict(one)["devices"], as_dict(two)["devices"]) == (1, 2)
    titles = [table.title for table in tables(two, None)]
    assert (
        "GPU memory of each of the 2 GPUs of one site, GiB, estimated for shares of 8 x 512 tokens"
        in titles
    )
    [note] = [line for line in notes(two, None) if "train.devices" in line]
    assert "a batch of 16 in 2 shares" in note
    assert not any("train.devices" in line for line in notes(one, None))
