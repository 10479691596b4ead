"""Runs in which each site makes an adapter of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.errors import ConfigError
from grandrounds.site.local_data import site_of
from grandrounds.site.personal import halves
from grandrounds.site.training import held_out_loss
from grandrounds.wire.adapter import A, B
from grandrounds.wire.personal import PERSONAL
from tests.runs import (
    Settings,
    adapter_bytes,
    config_of,
    play,
    read_json,
    summary_of,
)

NAMES = ("local-tail", "interpolate")

TAIL: Settings = {
    "personalisation.steps": 3,
    "personalisation.learning-rate": 0.01,
    "personalisation.weights": "0,0.5,1",
}


def own(run: Path) -> dict[str, bytes]:
    """Return the personal adapters in a run directory: site → the bytes of its tensors."""
    files = (run / "sites").glob("site-*/adapter_model.safetensors")
    return {file.parent.name: file.read_bytes() for file in sorted(files)}


@pytest.mark.parametrize("name", NAMES)
def test_every_site_has_its_own_and_what_travels_is_as_without(
    settings: Settings, name: str, tmp_path: Path
) -> None:
    plain = play(settings)
    run = play(
        settings, **TAIL, **{"personalisation.name": name, "run-directory": str(tmp_path / "own")}
    )
    assert adapter_bytes(run) == adapter_bytes(plain)
    personal = summary_of(run)["personal"]
    sites = recipes.resolve(settings).data.num_partitions
    assert len(set(own(run).values())) == sites
    assert set(personal["sites"]) == {str(site) for site in range(sites)}
    assert personal["failed"] == {}
    ledger = read_json(run / "ledger.json")["totals"]
    assert ledger == read_json(run / "plan.json")["totals"]
    assert ledger["personal.down"]["messages"] == sites
    assert "personal.up" not in ledger


@pytest.mark.parametrize("name", NAMES)
def test_plain_peft_scores_what_the_site_told(settings: Settings, name: str) -> None:
    run = play(settings, **TAIL, **{"personalisation.name": name})
    config, told = config_of(run), summary_of(run)["personal"]["sites"]["1"]
    folder = run / "sites" / "site-1"
    rank = load_file(folder / "adapter_model.safetensors")
    name_of_a = next(n for n in rank if n.endswith(A))
    times = 2 if name == "interpolate" else 1
    assert len(rank[name_of_a]) == times * config.lora.peft_lora_r
    base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder))
    from grandrounds.model import machine

    reported = halves(site_of(config, 1).held_out, config.weights)[1]
    total, tokens = held_out_loss(model, reported, 4, 0, machine.forward(config))
    assert total / tokens == pytest.approx(told["personal"], rel=1e-4)


def test_a_tail_of_weight_one_is_what_further_training_gives(settings: Settings) -> None:
    """With w = 0 every site has the federated adapter, to the bit."""
    tail = {**TAIL, "personalisation.name": "local-tail", "personalisation.weights": "1"}
    run = play(settings, **tail)
    federated = load_file(run / summary_of(run)["adapter"] / "adapter_model.safetensors")
    made = load_file(run / "sites" / "site-0" / "adapter_model.safetensors")
    assert made.keys() == federated.keys()
    assert any((made[name] != federated[name]).any() for name in made)
    told = summary_of(run)["personal"]["sites"]["0"]
    assert told["weight"] == 1
    assert told["steps"] == 3


def test_a_convex_combination_is_of_the_federated_and_a_local_adapter(settings: Settings) -> None:
    how = {"personalisation.name": "interpolate", "personalisation.weights": "0.25"}
    run = play(settings, **{**TAIL, **how})
    federated = load_file(run / summary_of(run)["adapter"] / "adapter_model.safetensors")
    made = load_file(run / "sites" / "site-2" / "adapter_model.safetensors")
    for name, tensor in federated.items():
        rank = len(tensor) if name.endswith(A) else tensor.shape[1]
        if name.endswith(A):
            np.testing.assert_array_equal(made[name][rank:], tensor)
        elif name.endswith(B):
            np.testing.assert_array_equal(made[name][:, rank:], np.float32(0.75) * tensor)


def test_a_weight_is_not_chosen_on_what_is_reported() -> None:
    examples: Any = list(range(7))
    choosing, reported = halves(examples, (0.0, 1.0))
    assert (choosing, reported) == ((1, 3, 5), (0, 2, 4, 6))
    assert halves(examples, (1.0,)) == ((), tuple(examples))
    assert halves(examples[:1], (0.0, 1.0)) == ((), (0,))


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_end_is_resumed_to_the_bit(
    settings: Settings, name: str, tmp_path: Path
) -> None:
    def stopping(message: Message, context: Context) -> Message:
        if message.metadata.message_type == PERSONAL and context.node_id == 3:
            raise KeyboardInterrupt
        return client_app.app(message, context)

    how = {**settings, **TAIL, "personalisation.name": name}
    whole = play({**how, "run-directory": str(tmp_path / "whole")})
    run = Path(settings["run-directory"])
    with pytest.raises(KeyboardInterrupt):
        play(how, stopping)
    assert list(own(run)) == ["site-0", "site-1"]
    play({**how, "run-directory": "", "resume-from": str(run)})
    assert own(run) == own(whole)
    assert summary_of(run)["personal"] == summary_of(whole)["personal"]


def test_a_site_that_fails_keeps_none_and_is_named(settings: Settings) -> None:
    def sites(message: Message, context: Context) -> Message:
        if message.metadata.message_type == PERSONAL and context.node_id == 2:
            raise RuntimeError("out of disk")
        return client_app.app(message, context)

    run = play(settings, sites, **TAIL, **{"personalisation.name": "local-tail"})
    personal = summary_of(run)["personal"]
    assert list(personal["failed"]) == ["1"]
    assert "site-1" not in own(run)
    assert summary_of(run)["failed_replies"] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy.name": "flora"}, "strategy.name = 'flora'"),
        (
            {"personalisation.name": "interpolate", "personalisation.proximal-mu": 1.0},
            "starts from the run's start",
        ),
        ({"personalisation.weights": "0"}, "a weight of 0 alone"),
        ({"personalisation.weights": "0,1.5"}, "numbers from 0 to 1"),
        ({"personalisation.weights": "half"}, "numbers from 0 to 1"),
        ({"personalisation.steps": 0}, "personalisation.steps = 0"),
        ({"personalisation.name": "local-tale"}, "local-tail"),
        (
            {
                "personalisation.name": "interpolate",
                "model.lora.peft-use-dora": True,
                "strategy.name": "fedavg",
            },
            "two adapters have no exact sum",
        ),
    ],
)
def test_what_cannot_be_is_one_line(settings: Settings, changes: Settings, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipes.resolve({**settings, "personalisation.name": "local-tail", **changes})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_without_personal_adapters_keeps_its_hash(settings: Settings) -> None:
    from grandrounds.config.digest import recipe_sha256

    plain = recipes.resolve(settings)
    other = recipes.resolve({**settings, "personalisation.steps": 99})
    personal = recipes.resolve({**settings, "personalisation.name": "local-tail"})
    assert recipe_sha256(plain) == recipe_sha256(other) != recipe_sha256(personal)
    assert json.dumps(plain.flat())
