"""A run's data in words, whoever brought them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.config.bases import REAL_BASE
from grandrounds.config.keys import Config
from grandrounds.data.formulary import FORMULARY
from grandrounds.server.described import cautions, data_text, engine_options, leaderboard_text
from grandrounds.server.listeners.next_steps import next_steps
from grandrounds.server.listeners.plain import (
    HELD_BY_NOBODY,
    forgetting_text,
    formulary_rows,
    summary_rows,
)
from grandrounds.server.listeners.start_rows import data_rows, plan_rows
from grandrounds.server.model_card import Findings, model_card

IN_CUSTODY = {"base-content": "0f", "train-examples": 30, "held-out-examples": 2}
OWN = [{"partition-id": p, "name": name, **IN_CUSTODY} for p, name in enumerate("ABC")]
SIMULATED = [{"partition-id": p, "train-examples": 30, "held-out-examples": 2} for p in range(3)]

SUMMARY: dict[str, Any] = {
    "directory": "/elsewhere/run",
    "adapter": "peft_4",
    "best_adapter": None,
    "rounds": 4,
}


def config(**keys: Any) -> Config:
    given = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    few = {"data.num-partitions": 3, "strategy.fraction-evaluate": 1.0}
    return recipes.resolve({**few, "strategy.fraction-train": 1.0, **given})


CARDS = config(static__dataset__name="/home/me/cards.jsonl", data__partitioner="iid")


def test_data_that_sites_brought_are_theirs_whatever_the_recipe_names() -> None:
    plain = config(data__partitioner="iid")
    assert data_text(plain, SIMULATED) == "formulary, 3 sites, iid"
    assert data_text(plain, OWN) == "each site's own, 3 sites"
    assert data_text(plain, [*OWN[:2], SIMULATED[2]]) == (
        "formulary, 3 sites, iid; each site's own at 2 of them"
    )
    whole = [{**site, "data-source": FORMULARY} for site in OWN]
    assert data_text(plain, whole) == "formulary, all of it at each of 3 sites"
    wards = config(data__partitioner="natural", data__partition_by="ward", data__num_partitions=1)
    assert data_text(wards) == "formulary, 1 site, natural by ward"
    assert data_text(CARDS, SIMULATED) == "cards.jsonl (local), 3 sites, iid"


def test_no_leaderboard_is_named_where_sites_brought_their_data() -> None:
    assert leaderboard_text(CARDS, SIMULATED).startswith(
        "not comparable: static.dataset.name is cards.jsonl (local); 3 partitions, not 20"
    )
    assert [name for name, _ in data_rows(CARDS, OWN)] == ["data", "names", "note"]
    card = model_card(config(), ["q_proj"], 1, None, 0.5, Findings(sites=OWN))
    assert "| data | each site's own, 3 sites |" in card
    assert "FlowerTune submission" not in card
    assert "fictional" not in card
    summary = {
        **SUMMARY,
        **{"status": "completed", "rounds": 1, "coverage": 0.98, "planned_mib": 1.0},
        **{"communication_mib": 1.0, "failed_replies": 0, "base_loads": 1, "processes": 1},
        **{"seconds": 2.0, "comparable_with_leaderboard": False},
    }
    told = dict(summary_rows(summary, OWN))
    assert "leaderboard" not in told
    assert told["status"] == "completed after 1 round"
    assert told["coverage"] == "98.0 % of the training examples seen"
    assert told["base loads"] == "1 in 1 process"
    assert "leaderboard" in dict(summary_rows(summary, SIMULATED))


def test_the_embedded_base_on_other_data_is_said_to_read_no_english() -> None:
    assert cautions(config(), SIMULATED) == []
    for run, sites in ((CARDS, SIMULATED), (config(train__replay_examples=0), OWN)):
        (caution,) = cautions(run, sites)
        assert "never read English" in caution
        assert f"--model {REAL_BASE}" in caution
    real = config(model__name="org/real", static__dataset__name="cards.jsonl")
    assert cautions(real, SIMULATED) == []
    (fictional,) = cautions(config(model__name="org/real"), SIMULATED)
    assert "fictional drugs" in fictional
    assert "--data" in fictional


def test_sites_that_replay_nothing_are_told_where_a_recipe_asks_for_it() -> None:
    asked = config(train__replay_examples=2)
    assert [said for said in cautions(asked, [*SIMULATED[:1], *OWN[1:]]) if "replay" in said] == [
        "train.replay-examples = 2 has no effect at 2 sites with a policy: only a site's own "
        "examples train there"
    ]
    assert cautions(asked, SIMULATED) == []


def test_next_steps_keep_the_engine_say_when_they_start_anew_and_fit_the_data() -> None:
    def steps(run: Config, sites: Any, **where: str) -> list[str]:
        return next_steps({**SUMMARY, **where}, run, sites)

    own = config(static__dataset__name="cards.jsonl", model__name="org/real")
    assert steps(config(), SIMULATED)[1:] == [
        "next: grandrounds evaluate /elsewhere/run",
        "next: train longer: grandrounds run --resume /elsewhere/run --rounds 8",
    ]
    assert steps(own, SIMULATED, engine="simulation")[-1].endswith("--rounds 8 --engine simulation")
    for run, sites in ((own, SIMULATED), (CARDS, SIMULATED), (config(), OWN)):
        assert not any("evaluate" in line for line in steps(run, sites))
    here = config(static__dataset__name="/home/me/cards.jsonl", model__name="org/real")
    assert steps(here, SIMULATED)[1] == "next: grandrounds evaluate /elsewhere/run"  # held-out rows
    assert steps(CARDS, SIMULATED)[-1].endswith(f"--model {REAL_BASE}")
    goes_on = config(static__dataset__name="cards.jsonl", model__lora__from_adapter="/elsewhere/a")
    assert steps(goes_on, SIMULATED)[-1].endswith("run --resume /elsewhere/run --rounds 8")
    assert steps(own, OWN, connection="trial")[-1].endswith("--connection trial")
    assert engine_options(OWN) == " --engine deployment --connection NAME"
    assert engine_options(SIMULATED) == ""


def test_the_next_commands_can_be_copied_whatever_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell splits them; a folder whose name starts with a dash is no option."""
    monkeypatch.chdir(tmp_path)
    own = config(static__dataset__name="cards.jsonl", model__name="org/real")
    for name in ("ward 7's $HOME", "-first", 'a"b;c'):
        where = {"directory": str(tmp_path / name), "connection": "o'clock"}
        told = next_steps({**SUMMARY, **where}, own, SIMULATED)
        words = [shlex.split(line.partition("grandrounds ")[2]) for line in told if "next:" in line]
        folder = f"./{name}" if name.startswith("-") else name
        assert [[one[0], folder in one] for one in words] == [
            ["ask", True],
            ["report", True],
            ["run", True],
        ]
        assert words[-1][-4:] == ["--engine", "deployment", "--connection", "o'clock"]


def test_private_facts_are_told_only_where_sites_hold_them() -> None:
    score = {"correct": 9, "n": 10}
    scores = {kind: {"base": score, "tuned": score} for kind in ("private", "public")}
    held = [facts for facts, *_ in formulary_rows(scores, config(), SIMULATED)]
    assert held == ["private facts of the sites", "public facts, known to the base"]
    assert [facts for facts, *_ in formulary_rows(scores, config(), OWN)] == held[1:]


def test_public_facts_are_only_the_embedded_bases_knowledge() -> None:
    scores = {
        kind: {"base": {"correct": 9, "n": 10}, "tuned": {"correct": 5, "n": 10}}
        for kind in ("private", "public")
    }
    real = config(model__name="org/real")
    assert [facts for facts, *_ in formulary_rows(scores, real, SIMULATED)][1] == HELD_BY_NOBODY
    assert forgetting_text(scores, real) == ""
    assert forgetting_text(scores, config()) == "forgotten: 40.0 points of the public facts"


def test_what_stays_frozen_and_stored_bits_are_said_before_the_first_round() -> None:
    plan = {"totals": {}, "total-mib": 0.0, "adapter-parameters": 8, "target-modules": ["q_proj"]}
    said = dict(plan_rows({**plan, "frozen-modules": ["experts.down_proj"], "stored-bits": 4}))
    assert said["frozen"] == "experts.down_proj: all-linear leaves them out"
    assert said["base"] == "loaded as it was published, in 4 bits"
    assert {"frozen", "base"}.isdisjoint(dict(plan_rows(plan)))
