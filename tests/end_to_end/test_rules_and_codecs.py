"""Every aggregation rule and codec in a whole run: learning, traffic, robustness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from safetensors.numpy import load_file

from grandrounds.config.strategies import STRATEGIES
from grandrounds.wire.adapter import drawn_adapter
from tests.end_to_end.sites import with_updates
from tests.runs import (
    GOOD_SITES,
    Settings,
    adapter_bytes,
    interrupted_at,
    metrics_of,
    play,
    read_json,
    summary_of,
)

EXTRAS: dict[str, Settings] = {
    "fedavg": {"strategy.proximal-mu": 0.0},
    "fedtrimmedavg": {"strategy.trimmed-share": 0.34},
    "product": {"strategy.site-ranks": "4,2"},
    "hetlora": {"strategy.site-ranks": "4,2"},
    "nesterov": {
        "strategy.name": "rolora",
        "strategy.outer-nesterov": True,
        "strategy.server-momentum": 0.5,
    },
}


def of_rule(name: str) -> Settings:
    return {"strategy.name": name, "strategy.fraction-train": 0.75, **EXTRAS.get(name, {})}


ENCODINGS: dict[str, Settings] = {
    "bf16": {"uplink-codec": "bf16", "downlink-codec": "bf16"},
    "int8": {"uplink-codec": "int8", "downlink-codec": "int8"},
    "int4": {"uplink-codec": "int4", "downlink-codec": "int4"},
    "int2": {"uplink-codec": "int2", "downlink-codec": "int2"},
    "ternary": {
        "uplink-codec": "ternary",
        "downlink-codec": "ternary",
        "downlink": "incremental",
    },
    "one bit": {"uplink-codec": "sign", "downlink-codec": "sign", "downlink": "incremental"},
    "topk": {"uplink-codec": "topk", "downlink-codec": "topk", "downlink": "incremental"},
}


def of_encoding(name: str) -> Settings:
    return {f"communication.{key}": value for key, value in ENCODINGS[name].items()}


def tensors_of(run: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(run / name / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(
    federation: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function from a rule to its finished run, with a checkpoint for every round.

    Each run is played once; tests only read it.
    """

    @cache
    def played(rule: str) -> Path:
        where = {"run-directory": str(tmp_path_factory.mktemp(rule) / "run")}
        return play({**federation, **of_rule(rule), **where, "train.save-every-round": 1})

    return played


WITH_NESTEROV = "nesterov"
"""Name here of `strategy.outer-nesterov`, which is no rule."""

QUICK = ("fedprox", "fedexp", "fedavgm", "krum", "ffa", "rolora", "product", "flora")
"""Rules that the default test run plays in full; CI plays the others too."""


@pytest.mark.parametrize(
    "name",
    [
        n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
        for n in (*STRATEGIES, WITH_NESTEROV)
    ],
)
@pytest.mark.slow
def test_a_rule_learns_sends_what_was_planned_and_leaves_an_adapter_for_peft(
    name: str, finished: Callable[[str], Path], tiny_base: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = finished(name)
    summary, lines = summary_of(run), metrics_of(run)
    assert summary["communication_mib"] == summary["planned_mib"]
    assert summary["failed_replies"] == 0
    assert lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]
    assert all(norm > 0 for norm in lines[-1]["update-norms"].values())
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    described = read_json(run / "peft_3" / "adapter_config.json")
    assert described["lora_alpha"] / described["r"] == 2
    model = PeftModel.from_pretrained(base, run / "peft_3")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(tuned, model(ids).logits)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("bf16", "int4", "ternary") else pytest.param(name, marks=pytest.mark.slow)
        for name in ENCODINGS
    ],
)
@pytest.mark.parametrize(
    "rule",
    ["fedprox", *(pytest.param(r, marks=pytest.mark.slow) for r in ("ffa", "rolora"))],
)
def test_an_encoding_learns_and_sends_what_was_planned(
    name: str, rule: str, settings: Settings
) -> None:
    run = play(settings, **of_rule(rule), **of_encoding(name))
    summary, lines = summary_of(run), metrics_of(run)
    assert summary["communication_mib"] == summary["planned_mib"]
    assert lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]


@pytest.mark.parametrize(
    "rule",
    ["fedprox", "rolora", *(pytest.param(r, marks=pytest.mark.slow) for r in ("product", "flora"))],
)
def test_the_float32_codec_gives_the_same_bits_as_none_in_fewer_bytes(
    rule: str, settings: Settings, finished: Callable[[str], Path]
) -> None:
    plain = finished(rule)
    codecs = {f"communication.{way}-codec": "float32" for way in ("uplink", "downlink")}
    packed = play(settings, **of_rule(rule), **codecs)
    assert adapter_bytes(packed) == adapter_bytes(plain)
    summary = summary_of(packed)
    assert summary["communication_mib"] == summary["planned_mib"]
    assert summary["communication_mib"] < summary_of(plain)["communication_mib"]


def test_entropy_coding_sends_at_most_what_was_planned(settings: Settings) -> None:
    changes = {**of_encoding("int4"), "communication.entropy-coding": True}
    summary = summary_of(play(settings, **changes))
    assert summary["communication_mib"] < summary["planned_mib"]


def test_ffa_trains_b_alone(finished: Callable[[str], Path]) -> None:
    adapter = tensors_of(finished("ffa"), "peft_3")
    start = drawn_adapter({name: tensor.shape for name, tensor in adapter.items()}, 42)
    for name, tensor in adapter.items():
        assert np.array_equal(tensor, start[name]) == ("lora_A" in name)


def test_rolora_trains_b_in_odd_rounds_and_a_in_even_ones(
    finished: Callable[[str], Path],
) -> None:
    first, second, third = (tensors_of(finished("rolora"), f"peft_{k}") for k in (1, 2, 3))
    for name in first:
        assert np.array_equal(first[name], second[name]) == ("lora_B" in name)
        assert np.array_equal(second[name], third[name]) == ("lora_A" in name)


def test_the_rank_of_flora_grows_to_its_maximum_and_is_reported(settings: Settings) -> None:
    """Rank 4, two sites a round: 8 after round 1, then 16, the maximum of four times 4."""
    run = play(settings, **{"strategy.name": "flora", "train.save-every-round": 1})
    lines = metrics_of(run)[1:]
    assert [line["rank"] for line in lines] == [8, 16, 16]
    assert [line["truncation-error"] > 0 for line in lines] == [False, False, True]
    config = read_json(run / "peft_1" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    card = (run / "peft_1" / "README.md").read_text()
    assert "| adapter | r = 8, alpha = 16 (stacked; trained at r = 4, alpha = 8), on " in card


@pytest.mark.parametrize(
    "name",
    [
        "fedavgm",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("flora", "rolora", "product", "lora-fair", "fedsvd", "hetlora", WITH_NESTEROV)
        ),
    ],
)
def test_an_interrupted_run_goes_on_to_the_bit(
    name: str, settings: Settings, tmp_path: Path
) -> None:
    # with all-linear, tensors are not in alphabetical order
    changes = {**of_rule(name), **of_encoding("int4"), "model.lora.target-modules": "all-linear"}
    if STRATEGIES[str(changes["strategy.name"])].error_feedback:
        changes["communication.uplink-codec"] = "none"  # error feedback is lost with the process
    whole = play({**settings, **changes, "run-directory": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        play({**settings, **changes}, listener=interrupted_at("round", 2))
    resumed = play({**settings, **changes, "resume-from": settings["run-directory"]})
    assert adapter_bytes(whole) == adapter_bytes(resumed)


PRUNING: Settings = {
    "strategy.name": "hetlora",
    "strategy.rank-decay": 0.75,
    "strategy.rank-penalty": 3.0,
    "strategy.fraction-train": 1.0,
    "train.save-every-round": 1,
}


@pytest.mark.slow
def test_sites_that_prune_go_on_with_fewer_ranks_and_bytes_also_after_a_resume(
    settings: Settings, tmp_path: Path
) -> None:
    """Rank 4, pruned to 3, 2 and 1. In round 1 B is zero, and nothing can be less."""
    whole = play({**settings, **PRUNING, "run-directory": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        play({**settings, **PRUNING}, listener=interrupted_at("round", 2))
    resumed = play({**settings, **PRUNING, "resume-from": settings["run-directory"]})
    assert adapter_bytes(whole) == adapter_bytes(resumed)
    ranks = [line["site-rank"] for line in metrics_of(whole)[1:]]
    assert ranks[:2] == [4, 4]
    assert ranks[2] < 4
    assert ranks == [line["site-rank"] for line in metrics_of(resumed)[1:]]
    summary = summary_of(whole)
    assert summary["communication_mib"] < summary["planned_mib"]
    assert read_json(whole / "plan.json")["upper-bound"]
    assert summary["aggregation"]["site_rank"]["first"] == 4
    assert summary["failed_replies"] == 0


EVERYBODY = {
    "strategy.fraction-train": 1.0,
    "data.num-partitions": 8,
    "num-server-rounds": 2,
    "train.training-arguments.max-steps": 1,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fedmedian", {}),
        ("krum", {"strategy.num-malicious-nodes": 1}),
        *(
            pytest.param(name, changes, marks=pytest.mark.slow)
            for name, changes in {
                "fedtrimmedavg": {"strategy.trimmed-share": 0.2},
                "multikrum": {"strategy.num-malicious-nodes": 1},
                "bulyan": {"strategy.num-malicious-nodes": 1},
            }.items()
        ),
    ],
)
def test_a_robust_rule_survives_a_site_that_sends_a_thousand_times_its_update(
    name: str, changes: Settings, settings: Settings
) -> None:
    hostile = with_updates(lambda update: -1000 * update, {5})
    lines = metrics_of(play(settings, hostile, **EVERYBODY, **{"strategy.name": name, **changes}))
    assert lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]


@pytest.mark.parametrize("largest", [0.0, 3.0])
def test_plain_averaging_survives_it_only_with_a_bound_relative_to_the_median_norm(
    largest: float, settings: Settings
) -> None:
    hostile = with_updates(lambda update: -1000 * update, {5})
    lines = metrics_of(play(settings, hostile, **EVERYBODY, **{"defence.largest-norm": largest}))
    survives = lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]
    assert survives == (largest > 0)
    if largest:
        assert all(line["updates-bounded"] >= 1 for line in lines[1:])
        own = sorted(norm for site, norm in lines[1]["update-norms"].items() if site != "5")
        assert lines[1]["norm-bound"] <= 3 * own[-1]


def test_the_norm_bound_holds_a_site_that_sends_a_thousand_times_its_update(
    settings: Settings,
) -> None:
    hostile = with_updates(lambda update: 1000 * update, {5})
    run = play(settings, hostile, **EVERYBODY, **{"defence.update-norm-bound": 0.05})
    lines = metrics_of(run)
    assert lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]
    assert lines[1]["update-norms"]["5"] > 1
    assert all(line["updates-bounded"] >= 1 for line in lines[1:])


def test_a_site_with_an_inverted_update_is_excluded_and_reported(settings: Settings) -> None:
    hostile = with_updates(lambda update: -update, {5})
    run = play(settings, hostile, **EVERYBODY, **{"defence.min-cosine": 0.0})
    for line in metrics_of(run)[1:]:
        assert list(line["failed"]) == ["5"]
        assert "cosine of -" in line["failed"]["5"]
        assert "5" not in line["good"]
        assert line["update-cosines"]["5"] < 0 < line["update-cosines"]["0"]
    assert summary_of(run)["failed_replies"] == 2


def test_updates_that_are_not_finite_are_excluded(settings: Settings) -> None:
    hostile = with_updates(lambda update: update * np.float32("nan"), {5})
    run = play(settings, hostile, **EVERYBODY, **{"strategy.name": "fedmedian"})
    assert all("not finite" in line["failed"]["5"] for line in metrics_of(run)[1:])


@pytest.mark.parametrize(
    "name",
    [
        "fedprox",
        "flora",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("fedadam", "product")),
    ],
)
def test_an_implausibly_large_update_is_excluded(name: str, settings: Settings) -> None:
    hostile = with_updates(lambda update: np.full_like(update, 3e38), {5})
    run = play(settings, hostile, **EVERYBODY, **{"strategy.name": name})
    lines = metrics_of(run)
    assert all("no training can produce" in line["failed"]["5"] for line in lines[1:])
    assert lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]


def test_a_site_that_the_preset_screens_out_is_reported_once(settings: Settings) -> None:
    hostile = with_updates(lambda update: -update, {5})
    heard: list[tuple[int, bool]] = []

    def listen(event: str, data: Mapping[str, Any]) -> None:
        if event == "reply":
            heard.append((data["partition"], data["failure"] is not None))

    run = play(settings, hostile, listen, **EVERYBODY, **{"defence.preset": "robust"})
    lines = metrics_of(run)[1:]
    assert heard == [(p, str(p) in line["failed"]) for line in lines for p in range(8)]
    for line in lines:
        assert len(line["failed"]) <= 2
        assert "above defence.largest-spread = 1.4" in line["failed"]["5"]
    card = (run / summary_of(run)["adapter"] / "README.md").read_text()
    assert "preset robust: updates scaled down to 3 times the median norm" in card


LIES: dict[str, tuple[str, dict[str, float | int]]] = {
    "a cursor from an evaluation": ("evaluate", {"cursor": 5}),
    "an incomplete process record": ("evaluate", {"process-id": 1}),
    "a negative number of tokens": ("evaluate", {"tokens": -100_000}),
    "a negative loss": ("evaluate", {"nll-sum": -1.0}),
    "a huge cursor": ("train", {"cursor": 1e30}),
    "a coverage above one": ("train", {"coverage": 7.0}),
    "a huge loss": ("train", {"train-loss": 1e300}),
}


@pytest.mark.parametrize("lie", LIES)
def test_impossible_metrics_do_not_end_the_run(lie: str, settings: Settings) -> None:
    kind, said = LIES[lie]

    def sites(message: Message, context: Context) -> Message:
        reply = GOOD_SITES(message, context)
        site = context.node_config["partition-id"]
        if message.metadata.message_type == kind and site in (0, 1):
            reply.content.metric_records["metrics"].update(said)
        return reply

    run = play(
        settings,
        sites,
        **{"num-server-rounds": 1, "strategy.fraction-train": 1.0, "strategy.fraction-evaluate": 1},
    )
    text = (run / "metrics.jsonl").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    assert all(line["held-out-loss"] > 5 for line in metrics_of(run))


def test_a_site_whose_reply_was_lost_is_brought_up_to_date(
    settings: Settings,
) -> None:
    """One bit both ways; site 1's reply of round 1 is lost. When it trains again, a start that does
    not match the server's record would be rejected and counted as a failed reply."""

    def sites(message: Message, context: Context) -> Message:
        reply = GOOD_SITES(message, context)
        config = message.content.config_records["config"]
        if context.node_config["partition-id"] == 1 and config.get("round") == 1:
            raise RuntimeError("the line broke")
        return reply

    run = play(settings, sites, **of_encoding("one bit"), **{"strategy.fraction-train": 1.0})
    lines = metrics_of(run)
    assert list(lines[1]["failed"]) == ["1"]
    assert [list(line["failed"]) for line in lines[2:]] == [[], []]
    assert lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]
