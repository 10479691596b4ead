"""Held-out losses by subgroup: what a run tells, what a site's policy keeps, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.errors import ConfigError, DataError, ReplyError
from grandrounds.server.model_card import Findings, model_card
from grandrounds.server.subgroups import subgroups_of
from grandrounds.study.report.read import read_run
from grandrounds.study.report.subgroups import section
from grandrounds.wire.messages import CONFIG, METRICS
from grandrounds.wire.subgroups import EXAMPLES, LOSSES, NAMES, NLL_SUMS, SUBGROUPS, TOKENS
from grandrounds.wire.told import rounded_count
from tests.own_sites import make_site
from tests.runs import Settings, play, read_json, summary_of
from tests.site.custody.test_custody import entries, grid_of_sites

KEY = "data.subgroup-columns"


def rows(count: int) -> str:
    """Return flashcards with a column of two values and one of a different value in each row."""
    return "".join(
        json.dumps(
            {
                "input": f"What helps patient {i} against the cough?",
                "output": f"Rest, and {1 + i % 7} cups of tea.",
                "sex": "fm"[i % 2],
                "patient": f"p{i}",
            }
        )
        + "\n"
        for i in range(count)
    )


@pytest.fixture
def wide(settings: Settings, tmp_path: Path) -> Settings:
    """Two sites of 80 rows, half of them held out, and one round."""
    (tmp_path / "wide.jsonl").write_text(rows(160))
    return {
        **settings,
        "static.dataset.name": str(tmp_path / "wide.jsonl"),
        **{"data.num-partitions": 2, "data.held-out-fraction": 0.5, "num-server-rounds": 1},
        **{"strategy.fraction-train": 1.0, "strategy.fraction-evaluate": 1.0},
        KEY: "sex,patient",
    }


@pytest.mark.slow
def test_a_run_tells_subgroups_and_its_report_and_card_show_them(wide: Settings) -> None:
    run = play(wide)
    found = summary_of(run)["subgroups"]
    assert list(found["groups"]) == ["sex = f", "sex = m"]  # each patient has one row
    groups = found["groups"].values()
    assert sum(group["held-out-examples"] for group in groups) == 80
    assert {tuple(group["sites"]) for group in groups} == {(0, 1)}
    low, high = sorted(group["held-out-loss"] for group in groups)
    assert low < summary_of(run)["held_out_loss"]["last"] < high
    ledger = read_json(run / "ledger.json")["totals"]
    assert ledger == read_json(run / "plan.json")["totals"]
    assert ledger["subgroups.down"]["messages"] == 2
    [table] = section(read_run(run)).tables
    assert [row[0] for row in table.rows] == ["sex = f", "sex = m"]
    config = recipes.resolve(wide)
    card = model_card(config, ["q_proj"], 1, 1.0, 1.0, Findings(subgroups=found))
    assert f"| `sex = f` | {found['groups']['sex = f']['held-out-loss']:.4f} |" in card
    assert "## Subgroups" not in model_card(config, ["q_proj"], 1, 1.0, 1.0)


def test_a_value_is_no_markup_in_the_card() -> None:
    told = {"held-out-loss": 1.5, "held-out-examples": 20, "sites": [0]}
    groups = dict.fromkeys(["ward = <img src=x>", "ward = [a](http://b)", "ward = `|b"], told)
    config = recipes.resolve({})
    card = model_card(config, ["q_proj"], 1, 1.0, 1.0, Findings(subgroups={"groups": groups}))
    for name in ("ward = <img src=x>", "ward = [a](http://b)", "ward = '/b"):
        assert f"\n| `{name}` | 1.5000 | 20 | 1 |" in card


@pytest.mark.slow
def test_sites_tell_only_what_their_policy_names_rounded(wide: Settings, tmp_path: Path) -> None:
    left: list[Message] = []

    def watched(message: Message, context: Any) -> Message:
        reply = client_app.app(message, context)
        if message.metadata.message_type == SUBGROUPS:
            left.append(reply)
        return reply

    (tmp_path / "own.jsonl").write_text(rows(80))
    sites = [
        make_site(
            tmp_path / f"site-{number}",
            {str(wide["model.name"]): str(wide["model.name"])},
            str(tmp_path / "own.jsonl"),
            **{"node__partition_id": number, "node__num_partitions": 2},
            **{"data__held_out_fraction": 0.5, "tell__subgroup_columns": columns},
        )
        for number, columns in enumerate(("sex", "patient"))
    ]
    run = play(wide, grid=grid_of_sites(wide, sites, watched))
    found = summary_of(run)["subgroups"]
    assert (list(found["groups"]), found["silent"]) == (["sex = f", "sex = m"], [1])
    told = left[0].content.metric_records[METRICS]
    assert set(told) == {LOSSES, EXAMPLES}
    assert all(round(loss, 2) == loss for loss in told[LOSSES])  # type: ignore[union-attr]
    (line,) = entries(sites[0], asked=SUBGROUPS)
    exact = line["figures"][EXAMPLES]
    assert sum(exact) == 40
    assert told[EXAMPLES] == [rounded_count(count) for count in exact]
    assert {NLL_SUMS, TOKENS} <= set(line["kept"])
    (other,) = entries(sites[1], asked=SUBGROUPS)
    assert other["left"]["told"] == []


def test_what_cannot_be_told_by_subgroup_is_refused() -> None:
    private = {"privacy.unit-guarantee": "example", "privacy.target-epsilon": 4.0}
    with pytest.raises(ConfigError, match="subgroup-columns = 'sex' does not go with privacy"):
        recipes.resolve({KEY: "sex", **private})
    with pytest.raises(ConfigError, match="must be up to 5 different columns"):
        recipes.resolve({KEY: "sex,sex"})


def test_a_column_that_is_missing_is_named(wide: Settings) -> None:
    with pytest.raises(DataError, match=r"no column 'height';.* Set the key that names it to"):
        play(wide, **{KEY: "height"})


@pytest.mark.parametrize(
    ("names", "metrics", "said"),
    [
        (["age = 4"], {LOSSES: [1.0], EXAMPLES: [10]}, "of no column"),
        (["sex = f\n"], {LOSSES: [1.0], EXAMPLES: [10]}, "of no column"),
        (["sex = f", "sex = f"], {LOSSES: [1.0, 1.0], EXAMPLES: [10, 10]}, "different names"),
        (["sex = f"], {LOSSES: [1.0, 2.0], EXAMPLES: [10]}, "no list of 1 numbers"),
        (["sex = f"], {LOSSES: [-1.0], EXAMPLES: [10]}, "has -1.0"),
        (["sex = f"], {EXAMPLES: [10]}, "no losses"),
        (["sex = f"], {LOSSES: 1.0, EXAMPLES: [10]}, "no list"),
    ],
)
def test_a_reply_that_cannot_be_is_not_used(
    names: list[str], metrics: dict[str, Any], said: str
) -> None:
    content = RecordDict({CONFIG: ConfigRecord({NAMES: names}), METRICS: MetricRecord(metrics)})
    with pytest.raises(ReplyError, match=said):
        subgroups_of(Message(content, 1, SUBGROUPS), ["sex"])
