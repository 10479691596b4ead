"""Runs in which each site makes an adapter of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.errors import ConfigError, DataError
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.server.directory import RunDirectory, find_checkpoint
from grandrounds.site.local_data import site_of
from grandrounds.site.own_part import OwnPart, needed_rounds
from grandrounds.site.personal import halves
from grandrounds.site.training import held_out_loss
from grandrounds.study.export import export
from grandrounds.study.personal import check_whole, of_site
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

pytestmark = pytest.mark.slow

NAMES = ("local-tail", "interpolate")

TAIL: Settings = {
    "personalisation.steps": 3,
    "personalisation.learning-rate": 0.01,
    "personalisation.weights": "0,0.5,1",
}

PLAIN_ONLY = (
    "strategy.name",
    "train.training-arguments.max-grad-norm",
    "defence.largest-norm",
)
"""Settings of the tests' runs that a private or masked run sets itself."""


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


def test_a_part_of_another_adapter_is_not_trained_on(settings: Settings, tmp_path: Path) -> None:
    """A shorter A would be put beside the shared one, in fewer ranks, and nobody told."""
    how = {**TAIL, "personalisation.name": "dual", "run-directory": str(tmp_path / "own")}
    config = recipes.resolve({**settings, **how})
    shapes, _ = adapter_layout(config.model.source, LoraSpec.of(config))
    kept = OwnPart(config, 0, RecordDict(), tmp_path / "own" / "sites")
    part = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    name = next(iter(part))
    kept.write(1, {**part, name: part[name][:1].copy()})
    with pytest.raises(DataError, match=r"site-0/000001\.safetensors\) has other tensors"):
        kept.beside({}, shapes, 1)
    with pytest.raises(DataError, match=r"site-0 has nothing of a round up to 0, though site 0"):
        kept.beside({}, shapes, 0, has_trained=True)


def test_a_copy_beside_the_parts_of_a_site_is_none_of_them(
    settings: Settings, tmp_path: Path
) -> None:
    how = {**TAIL, "personalisation.name": "dual", "run-directory": str(tmp_path / "own")}
    run = play(settings, **how)
    before = own(run)
    (run / "sites" / "parts" / "site-0" / "000001 (copy).safetensors").touch()
    config = recipes.resolve({**settings, **how})
    OwnPart(config, 0, RecordDict(), run / "sites").read(99)
    directory = RunDirectory(run)
    assert all(file.stem.isdecimal() for file in directory._parts_after(0))
    assert own(run) == before


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


@pytest.mark.parametrize(
    "changes",
    [
        {
            "privacy.unit-guarantee": "example",
            "privacy.target-epsilon": 8.0,
            "privacy.delta": 1e-4,
            "privacy.declared-units": 400,
            "train.batching": "padded",
            "strategy.fraction-evaluate": 0.0,
        },
        {"secure-aggregation": "masked32", "strategy.fraction-train": 1.0},
    ],
    ids=["private", "masked"],
)
def test_private_and_masked_runs_have_them_too(settings: Settings, changes: Settings) -> None:
    how = {**settings, **TAIL, "personalisation.name": "local-tail", "num-server-rounds": 1}
    how = {key: value for key, value in how.items() if key not in PLAIN_ONLY}
    run = play({**how, **changes})
    personal = summary_of(run)["personal"]
    assert len(set(own(run).values())) == len(personal["sites"]) > 2
    told = {name for site in personal["sites"].values() for name in site}
    assert told == ({"steps"} if config_of(run).is_private else told | {"personal", "weight"})


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


# --- Parts that are trained in the rounds and stay ------------------------------------------------

PARTS = ("shared-a", "dual")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_stays_and_what_travels_is_planned_to_the_byte(
    settings: Settings, name: str
) -> None:
    told: list[tuple[str, set[str], set[int]]] = []

    def watched(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        for content in (message.content, reply.content):
            for record in content.array_records.values():
                ranks = {array.shape[0] for n, array in record.items() if n.endswith(A)}
                factors = {A if n.endswith(A) else B for n in record}
                told.append((message.metadata.message_type, factors, ranks))
        return reply

    how = {**settings, **TAIL, "personalisation.name": name}
    run = play(how, watched)
    rank = config_of(run).lora.peft_lora_r
    assert told
    assert all(ranks == {rank} for _, _, ranks in told)
    assert all(factors == ({A} if name == "shared-a" else {A, B}) for _, factors, _ in told)
    ledger = read_json(run / "ledger.json")["totals"]
    assert ledger == read_json(run / "plan.json")["totals"]
    assert ("formulary.down" in ledger) is False
    assert len(set(own(run).values())) == config_of(run).data.num_partitions


@pytest.mark.parametrize("name", PARTS)
def test_a_run_whose_sites_keep_a_part_resumes_to_the_bit(
    settings: Settings, name: str, tmp_path: Path
) -> None:
    how = {**settings, **TAIL, "personalisation.name": name, "train.save-every-round": 2}
    whole = play({**how, "run-directory": str(tmp_path / "whole")})
    run = Path(settings["run-directory"])
    stopped = 0

    def stopping(message: Message, context: Context) -> Message:
        nonlocal stopped
        reply = client_app.app(message, context)
        if message.metadata.message_type == "train":
            stopped += 1
            if stopped == 6:  # the site has trained, and nobody knows
                raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        play(how, stopping)
    play({**how, "run-directory": "", "resume-from": str(run)})
    assert own(run) == own(whole)
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_a_private_adapter_lies_beside_the_shared_one(settings: Settings) -> None:
    run = play({**settings, **TAIL, "personalisation.name": "dual"})
    shared = load_file(run / summary_of(run)["adapter"] / "adapter_model.safetensors")
    made = load_file(run / "sites" / "site-1" / "adapter_model.safetensors")
    for name, tensor in shared.items():
        rank = len(tensor) if name.endswith(A) else tensor.shape[1]
        first = made[name][:rank] if name.endswith(A) else made[name][:, :rank]
        np.testing.assert_array_equal(first, tensor)
        second = made[name][rank:] if name.endswith(A) else made[name][:, rank:]
        assert second.shape == tensor.shape
        assert second.any()


def test_the_server_of_shared_a_has_no_whole_adapter_and_says_so(settings: Settings) -> None:
    run = play({**settings, **TAIL, "personalisation.name": "shared-a"})
    saved = load_file(run / summary_of(run)["adapter"] / "adapter_model.safetensors")
    assert all(name.endswith(A) for name in saved)
    with pytest.raises(ConfigError, match="no whole adapter: A is shared") as caught:
        check_whole(find_checkpoint(run))
    assert "--site 0" in str(caught.value)
    chosen = of_site(find_checkpoint(run), "2")
    made = load_file(chosen.folder / "adapter_model.safetensors")
    assert {name for name in made if name.endswith(A)} == set(saved)
    assert all(np.array_equal(made[name], saved[name]) for name in saved)
    card = export(chosen).joinpath("README.md").read_text()
    assert "A is shared by all sites, B is one site's own" in card
    with pytest.raises(ConfigError, match="is no site of this run"):
        of_site(find_checkpoint(run), "77")


def test_old_parts_go_and_those_that_a_resume_needs_stay() -> None:
    assert needed_rounds([1, 2], 8) == {1, 2}
    assert needed_rounds([1, 5, 7, 9, 12, 20, 23], 8) == {7, 12, 20, 23}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({"personalisation.name": name, **changes}, said)
            for name in PARTS
            for changes, said in (
                ({"strategy.name": "ffa"}, "strategy.name = 'ffa'"),
                ({"strategy.name": "product"}, "recomputes both from their products"),
                (
                    {"secure-aggregation": "masked32", "strategy.fraction-train": 1.0},
                    "of whole adapters",
                ),
                (
                    {
                        "privacy.unit-guarantee": "example",
                        "privacy.target-epsilon": 4.0,
                        "privacy.declared-units": 5000,
                        "strategy.name": "fedprox",
                    },
                    "trained without a guarantee",
                ),
            )
        ),
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
