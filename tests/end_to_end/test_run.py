"""A whole run in this process: what it writes, what it learns, and what it survives."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from safetensors.numpy import load_file
from typer.testing import CliRunner

from grandrounds import client_app, server_app
from grandrounds.cli import app as command_line
from grandrounds.config import recipes
from grandrounds.config.keys import FIELD_OF_KEY
from grandrounds.config.strategies import STRATEGIES
from grandrounds.config.validation import parse
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import ConfigError, RoundError
from grandrounds.model import machine
from grandrounds.model import resident as model
from grandrounds.model.base import base_loads
from grandrounds.server import directory as run_directory
from grandrounds.server.listeners import Listener
from grandrounds.server.listeners.plain import without_effect
from grandrounds.site import local_data as site
from grandrounds.site import training
from grandrounds.site import visit as visits
from grandrounds.wire import messages
from grandrounds.wire import schedule as sampling
from tests.places import SHARED

Settings = dict[str, Any]
Sites = Callable[[Message, Context], Message]

GOOD_SITES: Sites = client_app.app

WIKIDOC = SHARED / "train/wikidoc_patient_information.jsonl.gz"


def play(settings: Settings, sites: Sites = GOOD_SITES, **changes: Any) -> Path:
    """Run a federation in this process and return its run directory."""
    config = recipes.resolve({**settings, **changes})
    grid = InProcessGrid(sites, config.flat(), config.data.num_partitions)
    server_app.federate(grid, config, Listener())
    return Path(config.federation.run_directory)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(run: Path, name: str = "") -> bytes:
    folder = name or read_json(run / "summary.json")["adapter"]
    return (run / folder / "adapter_model.safetensors").read_bytes()


def answer_without_a_model(held_out_losses: Mapping[int, float]) -> Sites:
    """Return sites that change nothing and answer the held-out loss given for each round."""

    no_base = {"base-loads": 0, "process-id": 1}

    def sites(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            return GOOD_SITES(message, context)
        round_number = int(message.content.config_records["config"]["round"])
        if kind == MessageType.EVALUATE:
            loss = held_out_losses[round_number]
            judged = {"nll-sum": 10 * loss, "tokens": 10, "num-examples": 2}
            return Message(messages.content(metrics={**judged, **no_base}), reply_to=message)
        received = message.content.array_records["arrays"]
        change = ArrayRecord({n: Array(np.zeros_like(a.numpy())) for n, a in received.items()})
        metrics: dict[str, float | int] = {
            "num-examples": 20,
            "train-loss": 1.0,
            "proximal-penalty": 0.0,
            "examples": 8,
            "tokens": 80,
            "padding-tokens": 0,
            "seconds": 0.0,
            "cursor": 8 * round_number,
            "coverage": 0.5,
            **no_base,
        }
        return Message(messages.content(arrays=change, metrics=metrics), reply_to=message)

    return sites


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the bases loaded from here on, none being resident."""
    loaded: list[str] = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def count(name: str, *args: Any, **kwargs: Any) -> Any:
        loaded.append(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", count)
    monkeypatch.setattr(model, "_resident", None)
    return loaded


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[Any], Any]]:
    """Return (partition id, examples, result) of every visit from here on."""
    visited: list[tuple[int, list[Any], Any]] = []
    train = visits.train

    def remember(visit: Any, resident: Any, batches: Any) -> Any:
        result = train(visit, resident, batches)
        visited.append((visit.site.partition_id, [e for batch in batches for e in batch], result))
        return result

    monkeypatch.setattr(visits, "train", remember)
    return visited


# --- What a run writes ----------------------------------------------------------------------------


def test_a_run_writes_exactly_the_files_that_the_run_directory_promises(
    settings: Settings,
) -> None:
    run = play(settings)
    promised = {
        match.group(1)
        for line in (run_directory.__doc__ or "").splitlines()
        if (match := re.match(r"    (\S+)  ", line))
    }
    assert "metrics.jsonl" in promised
    there = {re.sub(r"peft_\d+", "peft_<round>", f.name) + "/" * f.is_dir() for f in run.iterdir()}
    assert there == promised
    assert not list(run.rglob("*.partial"))
    for checkpoint in run.glob("peft_*"):
        assert {f.name for f in checkpoint.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    assert [f.name for f in (run / "state").iterdir()] == ["round-000003"]


def test_metrics_have_one_line_for_the_base_and_one_for_each_round(settings: Settings) -> None:
    lines = metrics_of(play(settings))
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert "train-loss" not in lines[0]
    assert all(math.isfinite(line["train-loss"]) for line in lines[1:])
    assert all(math.isfinite(line["held-out-loss"]) for line in lines)
    assert all(line["good"] == line["cohort"] and len(line["cohort"]) == 2 for line in lines[1:])


def test_the_ledger_equals_the_plan_to_the_byte(settings: Settings) -> None:
    run = play(settings)
    plan, ledger = read_json(run / "plan.json"), read_json(run / "ledger.json")
    assert sum(t["tensor_bytes"] for t in ledger["totals"].values()) == plan["total-bytes"]
    # 3 rounds of 2 sites, down and up; 2 sites judge the base and every round
    counts = {kind: t["messages"] for kind, t in ledger["totals"].items()}
    assert counts == {"train.down": 6, "train.up": 6, "evaluate.down": 8}
    # 4 modules of rank 4 on width 32: q 32 -> 32 and v 32 -> 16, in two layers, float32 + header
    message = 2 * 4 * (4 * (32 + 32) + 4 * (32 + 16)) + 8 * 128
    assert plan["total-bytes"] == 20 * message
    summary = read_json(run / "summary.json")
    assert summary["communication_mib"] == summary["planned_mib"] == 20 * message / 2**20
    assert metrics_of(run)[-1]["communication-mib"] == summary["communication_mib"]


def test_a_checkpoint_is_saved_every_so_many_rounds_and_at_the_end(settings: Settings) -> None:
    run = play(settings, **{"num-server-rounds": 5, "train.save-every-round": 2})
    assert sorted(f.name for f in run.glob("peft_*")) == ["peft_2", "peft_4", "peft_5"]
    named = [line.get("checkpoint") for line in metrics_of(run)]
    assert named == [None, None, "peft_2", None, "peft_4", "peft_5"]
    assert read_json(run / "summary.json")["adapter"] == "peft_5"


@pytest.mark.parametrize("name", ["peft_2", "peft_3"])
def test_a_checkpoint_in_plain_peft_has_the_held_out_loss_that_the_run_reported(
    settings: Settings, name: str
) -> None:
    from peft import PeftModel

    run = play(settings, **{"train.learning-rate-max": 0.1, "train.learning-rate-min": 0.05})
    base = transformers.AutoModelForCausalLM.from_pretrained(str(settings["model.name"]))
    tuned = PeftModel.from_pretrained(base, str(run / name))
    config = recipes.resolve(settings)
    line = metrics_of(run)[int(name.removeprefix("peft_"))]

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
            pad = site.tokenizer_of(config.model.name).pad_token_id
            device, forward = torch.device("cpu"), machine.forward(config)
            more = training.held_out_loss(evaluated, held_out, 4, pad, device, forward)
            nll_sum, tokens = nll_sum + more[0], tokens + more[1]
        return nll_sum / tokens

    assert loss(tuned) == pytest.approx(line["held-out-loss"], rel=1e-5)
    with tuned.disable_adapter():
        untouched = loss(tuned)
    assert untouched == pytest.approx(metrics_of(run)[0]["held-out-loss"], rel=1e-5)
    assert abs(untouched - line["held-out-loss"]) > 1e-2


def test_the_model_card_names_base_data_rounds_and_that_it_is_not_comparable(
    settings: Settings,
) -> None:
    run = play(settings)
    card = (run / "peft_2" / "README.md").read_text()
    assert f"base | {Path(str(settings['model.name'])).name} (local)" in card
    assert "data | cards.jsonl (local), 4 sites" in card
    assert str(settings["model.name"]) not in card  # a card is read elsewhere
    assert "after round 2 of 3" in card
    assert "Not comparable with the FlowerTune leaderboard" in card
    assert "4 partitions, not 20" in card
    assert f"{metrics_of(run)[2]['held-out-loss']:.4f} nats" in card


def test_the_best_adapter_is_the_checkpoint_with_the_lowest_held_out_loss(
    settings: Settings,
) -> None:
    # round 3 is lower still, but was not saved
    sites = answer_without_a_model({0: 0.05, 1: 3.0, 2: 1.0, 3: 0.5, 4: 2.0})
    run = play(settings, sites, **{"num-server-rounds": 4})
    best = read_json(run / "summary.json")["best_adapter"]
    assert best == {"adapter": "peft_2", "round": 2, "held_out_loss": 1.0}
    assert read_json(run / "summary.json")["adapter"] == "peft_4"


def test_without_evaluation_a_run_has_no_held_out_loss_and_no_best_adapter(
    settings: Settings,
) -> None:
    run = play(settings, **{"strategy.fraction-evaluate": 0.0, "data.held-out-fraction": 0.0})
    summary = read_json(run / "summary.json")
    assert (summary["held_out_loss"], summary["best_adapter"]) == (None, None)
    assert all("held-out-loss" not in line for line in metrics_of(run))
    ledger = read_json(run / "ledger.json")
    assert list(ledger["totals"]) == ["train.down", "train.up"]
    assert summary["communication_mib"] == summary["planned_mib"]


def test_the_written_configuration_is_a_recipe_that_gives_the_same_adapter(
    settings: Settings, tmp_path: Path
) -> None:
    run = play(settings)
    recipe = recipes.load_recipe(run / "config.toml")
    again = play({**recipe, "run-directory": str(tmp_path / "again")})
    assert adapter_bytes(again) == adapter_bytes(run)


# --- What a run learns ----------------------------------------------------------------------------


def test_a_site_sees_every_example_once_before_it_repeats_one(
    settings: Settings, seen: list[tuple[int, list[Any], Any]]
) -> None:
    run = play(settings, **{"num-server-rounds": 5, "strategy.fraction-train": 1.0})
    for partition in range(4):
        visits_here = [examples for p, examples, _ in seen if p == partition]
        different = [len({e.input_ids for v in visits_here[:k] for e in v}) for k in range(1, 6)]
        assert different == [8, 16, 24, 27, 27]
        reported = [line["site-coverage"][str(partition)] for line in metrics_of(run)[1:]]
        assert reported == pytest.approx([8 / 27, 16 / 27, 24 / 27, 1, 1])


def test_coverage_of_the_federation_grows_with_every_visit_and_reaches_one(
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
    assert read_json(run / "summary.json")["coverage"] == coverage[-1] == 1.0


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
    assert read_json(run / "summary.json")["status"] == "completed"
    assert loads == []
    assert base_loads() == before


def test_training_and_held_out_loss_fall(settings: Settings) -> None:
    run = play(
        settings,
        **{
            "num-server-rounds": 6,
            "strategy.fraction-train": 1.0,
            "model.lora.target-modules": "all-linear",
            "model.lora.peft-lora-alpha": 32,
            "train.learning-rate-max": 0.03,
            "train.learning-rate-min": 0.01,
            "train.training-arguments.max-steps": 4,
        },
    )
    summary = read_json(run / "summary.json")
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


@pytest.mark.slow
@pytest.mark.skipif(not WIKIDOC.is_file(), reason="the WikiDoc sample is not beside the project")
def test_twenty_sites_learn_from_wikidoc(tiny_base: Path, tmp_path: Path) -> None:
    """5,942 published patient questions, of which some repeat and many are long."""
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
    summary, lines = read_json(run / "summary.json"), metrics_of(run)
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


# --- Every option has an effect, or is refused ----------------------------------------------------

OTHER_VALUE: Settings = {
    "seed": 7,
    "model.dtype": "bfloat16",
    "model.lora.peft-lora-r": 2,
    "model.lora.peft-lora-alpha": 64,
    "model.lora.target-modules": "o_proj",
    "model.lora.dropout": 0.5,
    "train.learning-rate-min": 0.001,
    "train.seq-length": 150,
    "train.optimizer": "adamw_8bit",
    "train.batching": "length-grouped",  # who stands beside whom
    "train.training-arguments.per-device-train-batch-size": 3,
    "train.training-arguments.gradient-accumulation-steps": 2,
    "train.training-arguments.max-steps": 3,
    "train.training-arguments.max-grad-norm": 0.001,
    "train.training-arguments.weight-decay": 0.5,
    "strategy.proximal-mu": 100.0,
    "strategy.fraction-train": 0.25,
    "communication.uplink-codec": "int8",
    "defence.update-norm-bound": 0.001,
    "data.num-partitions": 5,
    "data.partitioner": "size-skewed",
    "data.held-out-fraction": 0.2,
    "data.question-column": "instruction",
    "data.answer-column": "ward",
}
"""Another value for each key that alone changes what a site trains."""

ALSO_OTHER: dict[str, Settings] = {
    "num-server-rounds": {"num-server-rounds": 2},
    "train.training-arguments.num-train-epochs": {
        "train.training-arguments.max-steps": -1,
        "train.training-arguments.num-train-epochs": 1,
    },
    "train.training-arguments.warmup-steps": {
        "train.training-arguments.warmup-steps": 2,
        "train.training-arguments.lr-scheduler-type": "constant_with_warmup",
    },
    "strategy.name": {"strategy.name": "fedavg", "strategy.proximal-mu": 0.0},
    "communication.block-size": {
        "communication.uplink-codec": "int8",
        "communication.block-size": 32,
    },
    "communication.kept-share": {
        "communication.uplink-codec": "topk",
        "communication.kept-share": 0.5,
    },
    "data.partition-by": {"data.partition-by": "ward", "data.partitioner": "natural"},
    "data.dirichlet-alpha": {
        "data.partition-by": "ward",
        "data.partitioner": "dirichlet",
        "data.dirichlet-alpha": 1.0,
    },
}
"""Keys that need the company of others."""

IN_TWO_ROUNDS: Settings = {
    "train.dynamic-data-seed": False,  # the first visit of a site begins at the same examples
    "train.learning-rate-max": 0.02,  # the last round has the minimum
}
"""Keys that show from the second round on."""

TESTED_ELSEWHERE = {
    "model.name": "another base is another run",
    "static.dataset.name": "other data are another run",
    "run-directory": "the server's",
    "resume-from": "the server's",
    "consortium": "tests/consortium",
    "model.quantization": "below, slow",
    "model.gradient-checkpointing": "below: same adapter, by other means",
    "train.response-only-logits": "below: same adapter, by other means",
    "train.logits-chunk-tokens": "below: same adapter, by other means",
    "train.training-arguments.torch-compile": "below: same adapter, by other means",
    "train.save-every-round": "above",
    "train.num-threads": "below",
    "train.report-to": "tests/test_tracking.py: the same adapter, told to others",
    "train.training-arguments.lr-scheduler-type": "with warmup-steps",
    "train.training-arguments.bf16": "for a GPU",
    "train.training-arguments.tf32": "for a GPU",
    "train.training-arguments.gradient-checkpointing": "must agree with the model's",
    "strategy.cohorts": "tests/test_sampling.py, and below",
    "strategy.weighting": "tests/test_rounds.py; these sites have as many examples each",
    **dict.fromkeys(
        (f"strategy.{key}" for asks in STRATEGIES.values() for key in asks.keys),
        "tests/test_rules_and_codecs.py and tests/aggregation",
    ),
    **dict.fromkeys(
        (
            "communication.downlink-codec",
            "communication.downlink",
            "communication.catch-up-codec",
            "communication.entropy-coding",
            "defence.min-cosine",
        ),
        "tests/test_rules_and_codecs.py and tests/test_downlink.py",
    ),
    "strategy.fraction-evaluate": "above",
    "strategy.min-reply-fraction": "below",
    "strategy.round-timeout-seconds": "in process it never cuts a visit",
    "strategy.min-sites": "tests/consortium/test_custody.py and tests/test_rounds.py",
    "strategy.connect-timeout-seconds": "tests/test_rounds.py",
    "data.prompt-template": "below",
}


def short_run(settings: Settings, tmp_path: Path, name: str, changes: Settings) -> bytes:
    """Return the adapter's bytes after one round of all sites, if the changes say no other."""
    base = {
        "num-server-rounds": 1,
        "strategy.fraction-train": 1.0,
        "strategy.fraction-evaluate": 0.0,
        "run-directory": str(tmp_path / name),
    }
    return adapter_bytes(play(settings, **{**base, **changes}))


def test_every_key_is_shown_to_have_an_effect_or_is_refused_or_named_as_idle() -> None:
    only = {"logging-steps", "save-steps", "save-total-limit"}
    idle = {f"train.training-arguments.{key}" for key in only}
    refused = {
        "train.training-arguments.output-dir",
        "train.training-arguments.learning-rate",
        "train.training-arguments.fp16",
        "model.lora.peft-use-dora",
    }
    shown = [set(OTHER_VALUE), set(ALSO_OTHER), set(IN_TWO_ROUNDS), set(TESTED_ELSEWHERE)]
    kinds = [*shown, idle, refused]
    assert set().union(*kinds) == set(FIELD_OF_KEY)
    assert sum(len(kind) for kind in kinds) == len(FIELD_OF_KEY)


@pytest.mark.parametrize("key", [*OTHER_VALUE, *ALSO_OTHER, *IN_TWO_ROUNDS])
def test_another_value_gives_another_adapter(
    settings: Settings, tmp_path: Path, key: str, reference: dict[int, bytes]
) -> None:
    rounds = 2 if key in IN_TWO_ROUNDS else 1
    if rounds not in reference:
        whole = {"num-server-rounds": rounds}
        reference[rounds] = short_run(settings, tmp_path, "reference", whole)
    alone = {key: {**OTHER_VALUE, **IN_TWO_ROUNDS}.get(key)}
    changes = {"num-server-rounds": rounds, **ALSO_OTHER.get(key, alone)}
    assert short_run(settings, tmp_path, "other", changes) != reference[rounds]


@pytest.fixture(scope="module")
def reference() -> dict[int, bytes]:
    """Return the adapters to compare with, by number of rounds, as they are made."""
    return {}


@pytest.mark.parametrize("key", ["logging-steps", "save-steps", "save-total-limit"])
def test_a_key_without_effect_is_named(settings: Settings, key: str) -> None:
    name = f"train.training-arguments.{key}"
    assert without_effect(recipes.resolve(settings)) == []
    assert without_effect(recipes.resolve({**settings, name: 7})) == [name]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.training-arguments.output-dir", "/tmp/out"),
        ("train.training-arguments.learning-rate", "1e-3"),
        ("train.training-arguments.fp16", True),
        ("model.lora.peft-use-dora", True),
        ("train.training-arguments.warmup-steps", 1),  # with a constant rate
        ("train.training-arguments.lr-scheduler-type", "cosine"),
        ("train.optimizer", "sgd"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused(settings: Settings, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        parse({**settings, key: value}, recipes.defaults())


@pytest.mark.parametrize(
    "change",
    [
        {"model.gradient-checkpointing": True},
        {"train.response-only-logits": False},
        {"train.logits-chunk-tokens": 3},
        pytest.param({"train.training-arguments.torch-compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_means_give_nearly_the_same_adapter(
    settings: Settings, tmp_path: Path, change: Settings
) -> None:
    short_run(settings, tmp_path, "plain", {})
    short_run(settings, tmp_path, "saving", change)
    plain, saving = (
        load_file(tmp_path / name / "peft_1" / "adapter_model.safetensors")
        for name in ("plain", "saving")
    )
    for name, tensor in plain.items():
        np.testing.assert_allclose(saving[name], tensor, rtol=1e-3, atol=1e-5)


def test_num_threads_reaches_torch(settings: Settings, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        short_run(settings, tmp_path, "run", {"train.num-threads": 1})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_gives_another_adapter(settings: Settings, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    plain = short_run(settings, tmp_path, "plain", {})
    assert short_run(settings, tmp_path, "quantized", {"model.quantization": bits}) != plain
    said = read_json(tmp_path / "quantized" / "summary.json")["precision"]
    assert {4: "4-bit NF4, double quantisation", 8: "8-bit (LLM.int8)"}[bits] in said


def test_a_static_data_seed_begins_every_visit_at_the_same_examples(
    settings: Settings, seen: list[tuple[int, list[Any], Any]]
) -> None:
    run = play(settings, **{"train.dynamic-data-seed": False, "strategy.fraction-train": 1.0})
    for partition in range(4):
        first, *later = ({e.input_ids for e in ex} for p, ex, _ in seen if p == partition)
        assert len(first) == 8
        assert later == [first, first]
    assert {line["coverage"] for line in metrics_of(run)[1:]} == {32 / 108}


@pytest.mark.parametrize(("epochs", "examples", "steps"), [(1, 27, 7), (0.5, 14, 4), (2, 54, 14)])
def test_max_steps_of_minus_one_counts_epochs(
    settings: Settings,
    seen: list[tuple[int, list[Any], Any]],
    epochs: float,
    examples: int,
    steps: int,
) -> None:
    """27 examples a site in batches of 4."""
    play(
        settings,
        **{
            "num-server-rounds": 1,
            "train.training-arguments.max-steps": -1,
            "train.training-arguments.num-train-epochs": epochs,
        },
    )
    assert [(len(e), result.steps) for _, e, result in seen] == [(examples, steps)] * 2
    assert all(len({e.input_ids for e in given}) == min(27, examples) for _, given, _ in seen)


def test_gradient_accumulation_takes_more_examples_in_as_many_steps(
    settings: Settings, seen: list[tuple[int, list[Any], Any]]
) -> None:
    key = "train.training-arguments.gradient-accumulation-steps"
    play(settings, **{"num-server-rounds": 1, key: 3})
    assert [(len(e), result.steps) for _, e, result in seen] == [(2 * 4 * 3, 2)] * 2


def test_warm_up_lowers_the_rate_of_the_first_steps(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    set_rate = training.set_learning_rate

    def remember(optimizer: torch.optim.Optimizer, rate: float) -> None:
        set_rate(optimizer, rate)
        rates.extend(group["lr"] for group in optimizer.param_groups)

    monkeypatch.setattr(training, "set_learning_rate", remember)
    play(
        settings,
        **{
            "num-server-rounds": 1,
            "strategy.fraction-train": 0.25,
            "train.learning-rate-max": 0.004,
            "train.learning-rate-min": 0.004,
            "train.training-arguments.max-steps": 4,
            "train.training-arguments.warmup-steps": 3,
            "train.training-arguments.lr-scheduler-type": "constant_with_warmup",
        },
    )
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004])


# --- A site that fails ----------------------------------------------------------------------------


def spoil(partition: int, damage: Callable[[Message, Message], Message], kind: str) -> Sites:
    """Return sites of which one answers messages of a kind with what `damage` makes of it."""

    def sites(message: Message, context: Context) -> Message:
        if (
            message.metadata.message_type != kind
            or context.node_config["partition-id"] != partition
        ):
            return GOOD_SITES(message, context)
        return damage(message, GOOD_SITES(message, context))

    return sites


ONE_QUICK_ROUND: Settings = {
    "num-server-rounds": 1,
    "strategy.fraction-train": 1.0,
    "train.training-arguments.max-steps": 1,
}


def crash(message: Message, reply: Message) -> Message:
    raise RuntimeError("out of memory")


def not_finite(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    name = next(iter(arrays))
    values = arrays[name].numpy().copy()
    values[0, 0] = np.nan
    arrays[name] = Array(values)
    return reply


def wrong_shape(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(arrays[name].numpy().T.copy())
    return reply


def wrong_type(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(arrays[name].numpy().astype(np.float64))
    return reply


def no_tensors(message: Message, reply: Message) -> Message:
    del reply.content["arrays"]
    return reply


def one_tensor_less(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    del arrays[next(iter(arrays))]
    return reply


def no_metrics(message: Message, reply: Message) -> Message:
    del reply.content["metrics"]
    return reply


def metric(name: str, value: float | None) -> Callable[[Message, Message], Message]:
    """Return the damage that sets a metric, or leaves it out for None."""

    def damage(message: Message, reply: Message) -> Message:
        metrics = reply.content.metric_records["metrics"]
        del metrics[name]
        if value is not None:
            metrics[name] = value
        return reply

    return damage


TRAIN_DAMAGE: dict[str, tuple[Callable[[Message, Message], Message], str]] = {
    "crash": (crash, "out of memory"),
    "not-finite": (not_finite, "not finite"),
    "wrong-shape": (wrong_shape, "expected float32 of shape"),
    "wrong-type": (wrong_type, "expected float32 of shape"),
    "no-tensors": (no_tensors, "no tensors"),
    "one-tensor-less": (one_tensor_less, "missing"),
    "no-metrics": (no_metrics, "no metrics"),
    "zero-examples": (metric("num-examples", 0), "num-examples is 0"),
    "half-an-example": (metric("num-examples", 0.5), "num-examples is 0.5"),
    "loss-not-finite": (metric("train-loss", math.nan), "train-loss"),
    **{
        f"no-{name}": (metric(name, None), name)  # the reason names what is missing
        for name in (
            "num-examples",
            "train-loss",
            "proximal-penalty",
            "examples",
            "tokens",
            "padding-tokens",
            "seconds",
            "cursor",
            "coverage",
        )
    },
}


@pytest.mark.parametrize("damage", TRAIN_DAMAGE)
def test_a_site_that_fails_is_named_and_counted_and_the_run_goes_on(
    settings: Settings, damage: str
) -> None:
    act, words = TRAIN_DAMAGE[damage]
    run = play(settings, spoil(1, act, MessageType.TRAIN), **ONE_QUICK_ROUND)
    line = metrics_of(run)[1]
    assert line["good"] == [0, 2, 3]
    assert list(line["failed"]) == ["1"]
    assert words in line["failed"]["1"]
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["failed_replies"]) == ("completed", 1)
    adapter = load_file(run / "peft_1" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in adapter.values())


def test_a_failed_site_has_no_part_in_the_adapter(settings: Settings, tmp_path: Path) -> None:
    """However its reply is unusable, the others' average is the same."""
    changes = ONE_QUICK_ROUND
    adapters = {
        adapter_bytes(
            play(
                settings,
                spoil(1, TRAIN_DAMAGE[name][0], MessageType.TRAIN),
                **changes,
                **{"run-directory": str(tmp_path / name)},
            )
        )
        for name in ("crash", "not-finite", "no-metrics", "half-an-example")
    }
    whole = play(settings, **changes)
    assert len(adapters) == 1
    assert adapter_bytes(whole) not in adapters


EVALUATE_DAMAGE: dict[str, tuple[Callable[[Message, Message], Message], str]] = {
    "crash": (crash, "out of memory"),
    "no-metrics": (no_metrics, "no metrics"),
    "loss-not-finite": (metric("nll-sum", math.inf), "nll-sum"),
    "no-loss": (metric("nll-sum", None), "nll-sum"),
    "no-tokens": (metric("tokens", None), "tokens"),
}


@pytest.mark.parametrize("damage", EVALUATE_DAMAGE)
def test_a_site_that_cannot_evaluate_is_named_and_the_others_are_believed(
    settings: Settings, tmp_path: Path, damage: str
) -> None:
    act, words = EVALUATE_DAMAGE[damage]
    changes = {**ONE_QUICK_ROUND, "strategy.fraction-evaluate": 1.0}
    run = play(settings, spoil(2, act, MessageType.EVALUATE), **changes)
    for line in metrics_of(run):
        assert line["evaluated"] == [0, 1, 3]
        assert list(line["evaluate-failed"]) == ["2"]
        assert words in line["evaluate-failed"]["2"]
        assert math.isfinite(line["held-out-loss"])
    assert read_json(run / "summary.json")["failed_replies"] == 2
    assert adapter_bytes(run) == adapter_bytes(
        play(settings, **changes, **{"run-directory": str(tmp_path / "whole")})
    )


def fail_from(round_number: int, partitions: set[int]) -> Sites:
    """Return sites of which some crash in training from a round on."""

    def sites(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            now = int(message.content.config_records["config"]["round"])
            if now >= round_number and context.node_config["partition-id"] in partitions:
                raise RuntimeError("disk broke")
        return GOOD_SITES(message, context)

    return sites


def test_too_few_good_replies_end_the_run_as_failed_and_finished_rounds_are_kept(
    settings: Settings,
) -> None:
    sites = fail_from(2, {0, 1, 3})
    changes = {"strategy.fraction-train": 1.0, "train.save-every-round": 1}
    with pytest.raises(RoundError, match=r"Round 2: 1 of 4 .* at least 2 .*site 0: .*disk broke"):
        play(settings, sites, **changes)
    run = Path(settings["run-directory"])
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["rounds"]) == ("failed", 1)
    assert "disk broke" in summary["reason"]
    assert summary["adapter"] == "peft_1"
    assert [line["round"] for line in metrics_of(run)] == [0, 1]
    assert [f.name for f in run.glob("peft_*")] == ["peft_1"]


@pytest.mark.parametrize(("fraction", "ends"), [(0.5, "completed"), (0.51, "failed")])
def test_the_minimum_of_good_replies_is_the_configured_share_rounded_up(
    settings: Settings, fraction: float, ends: str
) -> None:
    changes = {**ONE_QUICK_ROUND, "num-server-rounds": 2, "strategy.min-reply-fraction": fraction}
    sites = fail_from(2, {0, 3})
    if ends == "failed":
        with pytest.raises(RoundError):
            play(settings, sites, **changes)
    else:
        play(settings, sites, **changes)
    assert read_json(Path(settings["run-directory"]) / "summary.json")["status"] == ends


def test_a_failed_run_leaves_the_command_with_exit_code_1(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_app, "app", fail_from(2, {0, 1, 2, 3}))
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(command_line, ["run", *sets])
    assert result.exit_code == 1
    assert result.stderr.startswith("grandrounds: Round 2: 0 of 2 sites replied well")
    assert len(result.stderr.splitlines()) == 1


def test_a_crash_at_roll_call_ends_the_run_and_leaves_no_directory(settings: Settings) -> None:
    def sites(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 3:
            raise RuntimeError("no power")
        return GOOD_SITES(message, context)

    with pytest.raises(Exception, match="no power"):
        play(settings, sites)
    assert not Path(settings["run-directory"]).exists()


def test_the_cohorts_of_a_run_are_those_drawn_by_seed(settings: Settings) -> None:
    lines = metrics_of(play(settings, seed=11))[1:]
    drawn = [sampling.training_cohort(11, k, 4, 2, True) for k in (1, 2, 3)]
    assert [line["cohort"] for line in lines] == drawn
