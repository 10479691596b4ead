"""Runs whose modules have ranks and alphas of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MessageType
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from grandrounds.config.recipes import load_recipe, resolve
from grandrounds.errors import ConfigError
from grandrounds.model.base import BaseSpec
from grandrounds.model.saved import lora_spec
from grandrounds.server import saved_start
from grandrounds.server.aggregation.make import make_rule
from grandrounds.study.evaluation.models import Models
from grandrounds.study.evaluation.tasks import Subject
from grandrounds.wire.adapter import A, B
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

RANKS = "model.lora.rank-pattern"

OWN: Settings = {
    RANKS: json.dumps({"layers.0.self_attn.q_proj": 2, "v_proj": 6}),
    "model.lora.alpha-pattern": json.dumps({r"layers\.1\..*v_proj": 3}),
    "strategy.proximal-mu": 0.0,
    "strategy.weighting": "equal",
    "defence.largest-norm": 0.0,
    "train.save-every-round": 1,
}
"""Ranks 2, 4 and 6."""

DORA: Settings = {"strategy.name": "fedavg", "model.lora.peft-use-dora": True}

RULES: dict[str, Settings] = {
    "fedtrimmedavg": {"strategy.trimmed-share": 0.34},
    "fedavg": {"communication.uplink-codec": "int8", "communication.downlink-codec": "int8"},
    "fedexp": {"communication.downlink": "incremental", "communication.downlink-codec": "int4"},
}
"""Rule → what it is played with besides."""

QUICK = ("fedavg", "product", "ffa")

PLAYED = (*QUICK, "fedexp", "rolora", "fedadam", "fedtrimmedavg", "nnm")
"""One rule of each kind."""


@pytest.fixture(scope="module")
def finished(
    federation: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function from a rule to its finished run, which is played once."""

    @cache
    def played(rule: str) -> Path:
        where = {"run-directory": str(tmp_path_factory.mktemp(rule) / "run")}
        how = {"strategy.name": rule, "strategy.fraction-train": 0.75, **RULES.get(rule, {})}
        return play({**federation, **OWN, **how, **where})

    return played


@pytest.mark.parametrize(
    "rule",
    [rule if rule in QUICK else pytest.param(rule, marks=pytest.mark.slow) for rule in PLAYED],
)
def test_a_rule_learns_and_sends_what_was_planned(
    rule: str, finished: Callable[[str], Path]
) -> None:
    run = finished(rule)
    summary, lines = summary_of(run), metrics_of(run)
    assert summary["failed_replies"] == 0
    assert summary["communication_mib"] == summary["planned_mib"]
    assert lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]
    tensors = load_file(run / "peft_3" / "adapter_model.safetensors")
    ranks = {name: len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    own = {"layers.0.self_attn.q": 2, "layers.1.self_attn.q": 4, "layers.0.self_attn.v": 6}
    for name, rank in {**own, "layers.1.self_attn.v": 6}.items():
        assert [ranks[n] for n in ranks if name in n] == [rank]


def test_peft_loads_a_checkpoint_and_gives_the_same_answers(
    finished: Callable[[str], Path], tiny_base: Path
) -> None:
    folder = finished("product") / "peft_3"
    described = read_json(folder / "adapter_config.json")
    assert described["rank_pattern"] == json.loads(OWN["model.lora.rank-pattern"])
    assert described["alpha_pattern"] == json.loads(OWN["model.lora.alpha-pattern"])
    spec = lora_spec(folder)
    assert spec.scale_of("model.layers.1.self_attn.v_proj") == 3 / 6
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
    ids = torch.arange(4, 24)[None]
    subject = Subject("tuned", folder, "", "")
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        with theirs.disable_adapter():
            assert not torch.allclose(theirs(ids).logits, expected)
        with Models(BaseSpec(str(tiny_base), 0, "float32"), (subject,)).asked(subject) as model:
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def recorded(settings: Settings) -> tuple[Path, dict[int, list[dict[str, np.ndarray]]]]:
    """A run of fedavg with DoRA, and the updates of its sites by round."""
    updates: dict[int, list[dict[str, np.ndarray]]] = {}

    def sites(message: Message, context: Context) -> Message:
        reply = GOOD_SITES(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            number = int(message.content.config_records["config"]["round"])
            sent = reply.content.array_records["arrays"]
            updates.setdefault(number, []).append({n: a.numpy() for n, a in sent.items()})
        return reply

    return play({**settings, **OWN, **DORA}, sites), updates


def test_the_mean_of_the_updates_is_that_of_float64(recorded: Any) -> None:
    run, updates = recorded
    before, after = (load_file(run / f"peft_{k}" / "adapter_model.safetensors") for k in (2, 3))
    assert len(updates[3]) == 2
    for name, tensor in after.items():
        changes = [update[name].astype(np.float64) for update in updates[3]]
        expected = before[name].astype(np.float64) + np.mean(changes, axis=0)
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-7)


def test_an_interrupted_run_goes_on_to_the_bit(
    finished: Callable[[str], Path], settings: Settings
) -> None:
    how = {"strategy.name": "product", "strategy.fraction-train": 0.75}
    changes = {**settings, **OWN, **how}
    with pytest.raises(KeyboardInterrupt):
        play(changes, listener=interrupted_at("reply", 4))
    run = play({**changes, "resume-from": settings["run-directory"]})
    assert adapter_bytes(run) == adapter_bytes(finished("product"))


def test_the_recipe_of_a_run_keeps_its_tables(finished: Callable[[str], Path]) -> None:
    config = resolve(load_recipe(finished("product") / "config.toml"))
    assert config.lora.ranks_by_pattern == {"layers.0.self_attn.q_proj": 2, "v_proj": 6}
    card = (finished("product") / "peft_3" / "README.md").read_text()
    assert (
        "r = 4 (layers.0.self_attn.q_proj: 2, v_proj: 6), alpha = 8 (layers\\.1\\..*v_proj: 3), on "
        in card
    )


def test_a_stack_keeps_the_scale_of_each_module(settings: Settings) -> None:
    """flora, of rank 8 after a round of two sites: alphas grow with the rank."""
    how = {"strategy.name": "flora", "strategy.proximal-mu": 0.0, "strategy.max-rank": 10}
    alphas = {"model.lora.alpha-pattern": '{"v_proj": 3}'}
    run = play({**settings, **how, **alphas, "num-server-rounds": 1})
    described = read_json(run / "peft_1" / "adapter_config.json")
    assert (described["r"], described["lora_alpha"]) == (8, 16)
    assert described["alpha_pattern"] == {"v_proj": 6}
    assert summary_of(run)["communication_mib"] == summary_of(run)["planned_mib"]


def test_the_product_rule_keeps_each_module_at_its_own_rank() -> None:
    """Against the dense mean of B A in float64, truncated by SVD to the module's rank."""
    rng = np.random.default_rng(3)
    shapes = {"one": (2, 9, 7), "two": (5, 8, 11)}  # rank, in-features, out-features

    def drawn() -> dict[str, np.ndarray]:
        tensors = {}
        for module, (rank, width, height) in shapes.items():
            tensors[module + A] = rng.normal(size=(rank, width)).astype("f4")
            tensors[module + B] = rng.normal(size=(height, rank)).astype("f4")
        return tensors

    start, changes, weights = drawn(), [drawn() for _ in range(3)], (3, 1, 6)
    rule = make_rule(resolve({"strategy.name": "product", "strategy.proximal-mu": 0.0}).strategy)
    rule.begin(1, start)
    for site, (change, weight) in enumerate(zip(changes, weights, strict=True)):
        rule.add(site, start, change, weight)
    result = rule.result()
    for module, (rank, _, _) in shapes.items():
        products = [
            (start[module + B].astype("f8") + c[module + B]) @ (start[module + A] + c[module + A])
            for c in changes
        ]
        u, s, v = np.linalg.svd(np.average(products, axis=0, weights=weights))
        expected = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert result[module + A].shape == start[module + A].shape
        found = result[module + B].astype("f8") @ result[module + A]
        np.testing.assert_allclose(found, expected, atol=1e-5 * s[0])


def test_another_run_goes_on_from_the_adapter_whatever_the_order_of_its_tables(
    finished: Callable[[str], Path], settings: Settings
) -> None:
    saved = saved_start.read_start(str(finished("product")))
    asked = {**settings, **OWN, RANKS: json.dumps({"v_proj": 6, "layers.0.self_attn.q_proj": 2})}
    saved_start.check_settings(saved, resolve(asked))
    with pytest.raises(ConfigError, match=r"of other settings: model\.lora\.rank-pattern"):
        saved_start.check_settings(saved, resolve({**asked, f"{RANKS}.v_proj": 5}))
