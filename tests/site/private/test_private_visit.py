"""Private visits and runs: what is released, what is told, and what every key of privacy does."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from peft import get_peft_model_state_dict

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.private import REFUSED_RULES
from grandrounds.config.strategies import STRATEGIES
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.errors import ConfigError, ModelError, PolicyError
from grandrounds.model.loss import answer_nll_sum, attending
from grandrounds.server.guarantees import guarantee_rows
from grandrounds.server.listeners.plain import round_line
from grandrounds.site import visit as visits
from grandrounds.site.local_data import site_of
from grandrounds.site.private import visit as private
from grandrounds.site.private.bases import check_base
from grandrounds.site.private.coins import KeyedCoins, secret_coins
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.site.private.rehearsal import mechanism_of
from grandrounds.site.private.units import grouped
from grandrounds.site.private.visit import released_loss, train_private_visit
from tests.runs import adapter_bytes, metrics_of, play, summary_of
from tests.site.private.visits import (
    MECHANISM,
    PAD,
    UNITS,
    Drawn,
    error,
    factors_of,
    naive_sums,
    private_settings,
)
from tests.site.test_training import CPU, make, norm, recorded_steps, weights
from tests.tiny_models import saved_config

PRIVATE = {
    "privacy.unit-guarantee": "example",
    "privacy.noise-multiplier": 5.0,
    "privacy.declared-units": 27,
}

# --- What is released -----------------------------------------------------------------------------


def visit(tiny_base: Path, units: Any, coins: Any, **changes: Any) -> list[list[torch.Tensor]]:
    """Return the gradients of each step that the optimizer sees."""
    resident = make(tiny_base)
    how = private_settings(**changes)
    with recorded_steps() as taken:
        train_private_visit(resident.model, factors_of(resident), units, how, PAD, coins)
    return [gradients for gradients, _ in taken]


def test_a_step_is_the_clipped_sum_over_the_expected_batch(tiny_base: Path) -> None:
    resident = make(tiny_base)
    sums = naive_sums(resident, factors_of(resident), UNITS, MECHANISM.clipping_norm)
    first, _ = visit(tiny_base, UNITS, Drawn())
    expected = [total / MECHANISM.expected_batch for total in sums]
    assert error([g.double() for g in first], expected) < 1e-5
    assert norm(first) * MECHANISM.expected_batch <= len(UNITS) * MECHANISM.clipping_norm


def test_normaliser_is_public(tiny_base: Path) -> None:
    """Without one of two equal units the mean is half as long: neither count enters the divisor."""
    both, one = (visit(tiny_base, units, Drawn())[0] for units in (UNITS[:1] * 2, UNITS[:1]))
    assert norm(both) == pytest.approx(2 * norm(one), rel=1e-4)
    wider = dataclasses.replace(MECHANISM, declared_units=2 * MECHANISM.declared_units)
    declared = visit(tiny_base, UNITS[:1], Drawn(), mechanism=wider)[0]
    assert norm(declared) == pytest.approx(norm(one) / 2, rel=1e-4)


def test_noise_has_the_deviation_that_is_accounted(tiny_base: Path) -> None:
    """Ten visits to a site without data: the sd of what is released is sigma C / B, within 1 %."""
    mechanism = dataclasses.replace(
        MECHANISM,
        noise_multiplier=1.7,
        clipping_norm=0.3,
        sampling_rate=0.4,
        declared_units=50,
        steps=8,
    )
    made = []
    for _ in range(10):
        for gradients in visit(tiny_base, [], secret_coins(), mechanism=mechanism):
            made += [g.flatten() for g in gradients]
    values = torch.cat(made).double()
    assert len(values) > 70_000  # the standard error of the deviation is then 0.27 %
    assert float(values.std()) == pytest.approx(1.7 * 0.3 / 20, rel=0.01)
    assert float(values.mean()) == pytest.approx(0, abs=4 * 1.7 * 0.3 / 20 / len(values) ** 0.5)


def test_an_empty_batch_is_a_noise_only_step(tiny_base: Path) -> None:
    steps = visit(tiny_base, [], Drawn(noise=1.0))
    assert len(steps) == MECHANISM.steps
    expected = MECHANISM.noise_multiplier * MECHANISM.clipping_norm / MECHANISM.expected_batch
    for gradients in steps:
        assert all(torch.allclose(g, torch.tensor(expected), rtol=1e-5) for g in gradients)


def test_what_is_released_lies_on_a_grid(tiny_base: Path) -> None:
    [gradients, _] = visit(tiny_base, UNITS, KeyedCoins(bytes(32)))
    spacing = MECHANISM.clipping_norm * private.GRID / MECHANISM.expected_batch
    steps = torch.cat([g.flatten() for g in gradients]).double() / spacing
    assert float((steps - steps.round()).abs().max()) < 0.1  # float32 of the last division


def test_the_same_coins_give_the_same_adapter_and_others_another(tiny_base: Path) -> None:
    def trained(coins: Any, **changes: Any) -> list[torch.Tensor]:
        resident = make(tiny_base)
        how = private_settings(**changes)
        train_private_visit(resident.model, factors_of(resident), UNITS, how, PAD, coins)
        return weights(resident)

    first, again = trained(KeyedCoins(bytes(32))), trained(KeyedCoins(bytes(32)))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, trained(secret_coins())))
    pulled = trained(KeyedCoins(bytes(32)), proximal_mu=10.0)
    assert not any(map(torch.equal, first, pulled))


def test_adam_does_not_divide_by_less_than_its_epsilon(tiny_base: Path) -> None:
    """A gradient of two steps of the grid moves a value by lr g / (g + 1e-6), not by lr."""
    resident = make(tiny_base)
    before = weights(resident)
    how = private_settings(dataclasses.replace(MECHANISM, steps=1))
    coins = Drawn(noise=2 * private.GRID)
    train_private_visit(resident.model, factors_of(resident), [], how, PAD, coins)
    gradient = 2 * private.GRID * MECHANISM.clipping_norm / MECHANISM.expected_batch
    moved = before[0] - weights(resident)[0]
    expected = 1e-2 * gradient / (gradient + 1e-6)
    assert float(moved.mean()) == pytest.approx(expected, rel=0.01)


def test_saved_adapter_is_the_trained_one(tiny_base: Path) -> None:
    """PEFT saves under the names of before what was trained; nothing is wrapped."""
    resident = make(tiny_base)
    names = list(get_peft_model_state_dict(resident.model))
    how = private_settings()
    train_private_visit(resident.model, factors_of(resident), UNITS, how, PAD, secret_coins())
    saved = get_peft_model_state_dict(resident.model)
    assert list(saved) == names == list(resident.parameters)
    assert all(torch.equal(saved[n], p) for n, p in resident.parameters.items())
    assert all(p.grad is None for p in resident.parameters.values())


# --- Runs -----------------------------------------------------------------------------------------


# --- A told loss ----------------------------------------------------------------------------------

TELLING = dataclasses.replace(MECHANISM, tells_loss=True, declared_units=14)


def released(means: list[float], coins: Any = None) -> float:
    return released_loss(torch.tensor(means, dtype=torch.float64), TELLING, coins or Drawn())


def test_a_step_tells_the_losses_of_its_units_over_the_expected_batch() -> None:
    """q N is 7: 2.5 + (1 - 2.5 + 4 - 2.5) / 7, and noise of 5 sigma times 2.5."""
    assert released([1.0, 4.0]) == pytest.approx(2.5, abs=1e-6)
    assert released([1.0]) == pytest.approx(2.5 - 1.5 / 7, abs=1e-6)
    assert released([]) == 2.5
    assert released([1.0], Drawn(1.0)) == pytest.approx(2.5 + (12.5 - 1.5) / 7, abs=1e-6)


@pytest.mark.parametrize("loss", [0.0, 1.3, 700.0, math.inf, math.nan, -3.0])
def test_one_unit_moves_a_told_loss_by_at_most_half_of_the_largest(loss: float) -> None:
    moved = abs(released([2.0, loss]) - released([2.0])) * TELLING.expected_batch
    assert moved <= 2.5 + 1e-5


def test_a_visit_tells_the_mean_over_records_of_a_unit_and_then_over_units(tiny_base: Path) -> None:
    resident = make(tiny_base)
    how = private_settings(dataclasses.replace(TELLING, steps=1), microbatch=4)

    def loss_of(example: TokenizedExample) -> float:
        forward = how.training.forward
        with attending(resident.model, forward):
            return answer_nll_sum(resident.model, [example], PAD, CPU, forward).item() / (
                example.answer_tokens
            )

    means = [statistics.fmean(map(loss_of, unit)) for unit in UNITS]
    told = train_private_visit(resident.model, factors_of(resident), UNITS, how, PAD, Drawn())
    by_hand = 2.5 + sum(min(loss, 5.0) - 2.5 for loss in means) / TELLING.expected_batch
    assert told == pytest.approx(by_hand, abs=1e-5)


def test_a_mechanism_that_tells_no_loss_draws_no_coins_for_it(tiny_base: Path) -> None:
    resident, drawn = make(tiny_base), []

    class Counting(Drawn):
        def normals(self, count: int, device: torch.device) -> torch.Tensor:
            drawn.append(count)
            return super().normals(count, device)

    how = private_settings()
    told = train_private_visit(resident.model, factors_of(resident), UNITS, how, PAD, Counting())
    assert told is None
    assert len(drawn) == MECHANISM.steps
    assert 1 not in drawn


@pytest.fixture(scope="module")
def rehearsed(federation: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run of the small federation, with coins of a test."""
    folder = tmp_path_factory.mktemp("private") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visits, "secret_coins", lambda: KeyedCoins(bytes(32)))
        return play({**federation, **PRIVATE, "run-directory": str(folder)})


def test_a_private_run_tells_no_figure_of_the_data(rehearsed: Path) -> None:
    told = [line for line in metrics_of(rehearsed) if line["round"]]
    for line in told:
        hidden = ("train-loss", "proximal-penalty", "coverage", "examples", "tokens")
        assert [line[name] for name in (*hidden, "padding-tokens", "visit-seconds")] == [None] * 7
        assert set(line["weights"].values()) == {27}
    sites = json.loads((rehearsed / "sites.json").read_text())
    assert {site["train-examples"] for site in sites} == {27}


def test_a_run_on_named_data_is_called_a_rehearsal(rehearsed: Path) -> None:
    told = summary_of(rehearsed)["privacy"]
    assert (told["mode"], told["unit"], told["noise_multiplier"]) == ("rehearsal", "record", 5.0)
    assert 0 < told["epsilon"] <= told["reserved_epsilon"]


def test_two_private_runs_of_one_seed_differ(
    rehearsed: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = {"num-server-rounds": 1, "strategy.fraction-evaluate": 0.0}
    other = play({**settings, **PRIVATE}, **once)
    known = Path(settings["run-directory"]).with_name("known")
    monkeypatch.setattr(visits, "secret_coins", lambda: KeyedCoins(bytes(32)))
    same = play({**settings, **PRIVATE, "run-directory": str(known)}, **once)
    assert adapter_bytes(other) != adapter_bytes(same)
    again = known.with_name("again")
    repeated = play({**settings, **PRIVATE, "run-directory": str(again)}, **once)
    assert adapter_bytes(repeated) == adapter_bytes(same)


def test_a_run_that_asks_for_losses_tells_them_with_their_noise(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"num-server-rounds": 1, "strategy.fraction-evaluate": 0.0}
    run = play({**settings, **PRIVATE}, **asked, **{"privacy.report-train-loss": True})
    last, sites = metrics_of(run)[-1], json.loads((run / "sites.json").read_text())
    noise = 5 * 5.0 * 2.5 / sites[0]["sampling-rate"] / 27 / math.sqrt(sites[0]["visit-steps"])
    assert sites[0]["train-loss-deviation"] == pytest.approx(noise)
    assert last["train-loss-deviation"] == pytest.approx(noise / math.sqrt(len(last["good"])))
    assert 0 <= last["train-loss"] <= 5
    assert f"(noise {last['train-loss-deviation']:.2f})" in round_line(last, 1)
    assert ("training loss", f"told with noise: +- {noise:.2g} nats a visit") in guarantee_rows(
        summary_of(run)["privacy"]
    )


def test_more_visits_than_the_noise_is_calibrated_for_are_refused(
    federation: dict[str, Any],
) -> None:
    config = recipes.resolve(federation, PRIVATE)
    mechanism = mechanism_of(config)
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), config.flat())
    given = ConfigRecord({"cursor": mechanism.visits * config.examples_per_step * 2, "round": 3})
    now = visits.Visit.here(RecordDict({"config": given}), context)
    with pytest.raises(PolicyError, match="Visit 3 of a run whose noise is calibrated for 2"):
        visits.train_privately(now, mechanism, None)  # type: ignore[arg-type]


# --- Keys -----------------------------------------------------------------------------------------

OTHER: dict[str, tuple[Any, Callable[[Config], Any]]] = {
    "privacy.unit-guarantee": ("none", lambda config: site_of(config, 0).units != ()),
    "privacy.target-epsilon": (2.0, lambda config: mechanism_of(config).noise_multiplier),
    "privacy.noise-multiplier": (2.0, lambda config: mechanism_of(config).noise_multiplier),
    "privacy.delta": (1e-3, lambda config: mechanism_of(config).noise_multiplier),
    "privacy.clipping-norm": (0.5, lambda config: mechanism_of(config).clipping_norm),
    "privacy.sampling-rate": (0.5, lambda config: mechanism_of(config).expected_batch),
    "privacy.declared-units": (30, lambda config: mechanism_of(config).declared_units),
    "privacy.unit-column": ("ward", lambda config: max(site_of(config, 0).units)),
    "privacy.max-records-of-unit": (2, lambda config: len(site_of(config, 0).train)),
    "privacy.report-train-loss": (True, lambda config: mechanism_of(config).tells_loss),
}
"""Key → another value, and what it changes."""

CALIBRATED = {
    "privacy.target-epsilon": 1.0,
    "privacy.noise-multiplier": 0.0,
    "privacy.sampling-rate": 1.0,  # PLD of sampled steps takes seconds
}

BESIDE: dict[str, dict[str, Any]] = {
    "privacy.unit-guarantee": {"privacy.noise-multiplier": 0.0, "privacy.declared-units": 0},
    "privacy.target-epsilon": CALIBRATED,
    "privacy.delta": CALIBRATED,
    "privacy.max-records-of-unit": {"privacy.unit-column": "ward"},
}
"""Key → settings with which it is compared."""


@pytest.mark.parametrize("key", OTHER)
def test_every_key_of_privacy_matters(federation: dict[str, Any], key: str) -> None:
    value, of = OTHER[key]
    values = {**federation, **PRIVATE, **BESIDE.get(key, {})}
    if key == "privacy.unit-guarantee":
        before = recipes.resolve(federation, PRIVATE)
    else:
        before = recipes.resolve(values)
    assert of(before) != of(recipes.resolve({**values, key: value}))


def test_the_keys_that_are_tested_are_all_of_privacy() -> None:
    assert set(OTHER) == {k for k in recipes.defaults() if k.startswith("privacy.")}


def test_the_units_of_a_run_are_those_of_its_column(federation: dict[str, Any]) -> None:
    """30 cards a site of 4 wards, 8 of each at most: a ward is held out as a whole."""
    config = recipes.resolve(federation, PRIVATE, {"privacy.unit-column": "ward"})
    site = site_of(config, 0)
    assert len(grouped(site.units, site.train)) <= 4
    assert max(len(unit) for unit in grouped(site.units, site.train)) <= 8
    by_record = site_of(recipes.resolve(federation, PRIVATE), 0)
    assert by_record.units == tuple(range(len(by_record.train)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"privacy.target-epsilon": 8.0}, "guarantees nothing, without privacy.unit-guarantee"),
        ({"privacy.noise-multiplier": 1.0}, "guarantees nothing, without privacy.unit-guarantee"),
        ({**PRIVATE, "privacy.noise-multiplier": 0.0}, "both 0"),
        ({**PRIVATE, "privacy.noise-multiplier": 0.01}, "is not called private"),
        ({**PRIVATE, "privacy.target-epsilon": 8.0}, "contradict each other"),
        ({**PRIVATE, "privacy.delta": 0.01}, "publishing a few records whole would satisfy it"),
        ({**PRIVATE, "privacy.declared-units": 3}, "below the expected batch of 4 units"),
        ({**PRIVATE, "privacy.unit-column": "input"}, "is the text that is trained on"),
    ],
)
def test_a_heuristic_is_not_called_dp(
    federation: dict[str, Any], values: dict[str, Any], said: str
) -> None:
    """Noise without an accountant, or a target that guarantees nothing, is refused."""
    with pytest.raises(ConfigError, match=said):
        recipes.resolve(federation, values)


def test_all_that_a_private_visit_cannot_cover_is_told_at_once() -> None:
    arguments = "train.training-arguments."
    values = {
        "strategy.name": "fedexp",
        "defence.min-cosine": 0.1,
        "defence.largest-spread": 1.4,
        f"{arguments}max-steps": -1,
        f"{arguments}max-grad-norm": 1.0,
        f"{arguments}torch-compile": True,
        f"{arguments}gradient-accumulation-steps": 2,
        "privacy.sampling-rate": 0.1,
        "model.quantization": 8,
        "train.batching": "length-grouped",
        "train.dynamic-data-seed": False,
        "model.lora.dropout": 0.1,
        "communication.entropy-coding": True,
        "model.lora.peft-use-dora": True,
    }
    with pytest.raises(ConfigError) as refused:
        recipes.resolve(PRIVATE, values)
    text = str(refused.value)
    assert text.count("does not go with privacy.unit-guarantee") == len(values) - 1
    assert all(key in text for key in values)


WHOLE = {"strategy.fraction-train": 1.0}


@pytest.mark.parametrize("name", STRATEGIES)
def test_rules_are_refused_where_noise_would_mislead_them(name: str) -> None:
    beside = {"strategy.proximal-mu": 0.0} if name == "fedavg" else {}
    if name not in REFUSED_RULES:
        assert recipes.resolve(PRIVATE, {"strategy.name": name, **beside, **WHOLE}).is_private
        return
    with pytest.raises(ConfigError) as refused:
        recipes.resolve(PRIVATE, {"strategy.name": name})
    assert REFUSED_RULES[name] in str(refused.value)


def test_fedexp_with_noise_is_refused() -> None:
    """As the default it is replaced instead, and a run says so."""
    with pytest.raises(ConfigError, match="grows with the length of the updates"):
        recipes.resolve(PRIVATE, {"strategy.name": "fedexp"})
    assert recipes.resolve(PRIVATE).strategy.name == "ffa"
    assert any("ffa trains B alone" in note for note in recipes.notes(PRIVATE))


def test_the_formulary_declares_its_own_size() -> None:
    values = {k: v for k, v in PRIVATE.items() if k != "privacy.declared-units"}
    assert recipes.resolve(values).privacy.declared_units == 75
    four = recipes.resolve(values, {"data.num-partitions": 4})
    assert four.privacy.declared_units == 375
    elsewhere = recipes.resolve(values, {"static.dataset.name": "cards.jsonl"})
    with pytest.raises(ConfigError, match=r"privacy\.declared-units = 0"):
        mechanism_of(elsewhere)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_base_with_experts_is_refused_at_the_roll_call(
    tmp_path: Path, federation: dict[str, Any], name: str
) -> None:
    base = saved_config(name, tmp_path / name)
    with pytest.raises(ModelError, match="routes tokens to experts"):
        check_base(recipes.resolve(federation, PRIVATE, {"model.name": base}))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_follow_the_longest_record_are_refused(
    tmp_path: Path, tiny_base: Path, federation: dict[str, Any], kind: str
) -> None:
    described = json.loads((tiny_base / "config.json").read_text())
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    described |= {"rope_parameters": {**rope, "original_max_position_embeddings": 64}}
    described.pop("rope_scaling", None)
    (tmp_path / "config.json").write_text(json.dumps(described))
    values = {**federation, **PRIVATE, "model.name": str(tmp_path)}
    check_base(recipes.resolve(values, {"train.seq-length": 64}))
    with pytest.raises(ModelError, match="beyond 64 tokens"):
        check_base(recipes.resolve(values, {"train.seq-length": 65}))


def test_a_base_that_drops_activations_is_refused(
    tmp_path: Path, federation: dict[str, Any]
) -> None:
    values = {**federation, **PRIVATE, "model.name": saved_config("gpt2", tmp_path)}
    check_base(recipes.resolve(values))
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "resid_pdrop": 0.1}))
    with pytest.raises(ModelError, match=r"resid_pdrop = 0\.1"):
        check_base(recipes.resolve(values))


def test_int8_goes_record_by_record(tiny_base: Path, federation: dict[str, Any]) -> None:
    batch = "train.training-arguments.per-device-train-batch-size"
    values = {**federation, **PRIVATE, "model.quantization": 8}
    with pytest.raises(ConfigError, match="outliers in any record"):
        recipes.resolve(values)
    check_base(recipes.resolve(values, {batch: 1}))


def test_no_setting_reaches_the_coins() -> None:
    assert not any("coin" in key for key in recipes.defaults())
    assert set(Mechanism.__dataclass_fields__) == {
        *("noise_multiplier", "clipping_norm", "sampling_rate", "declared_units"),
        *("steps", "visits", "delta", "tells_loss"),
    }
