"""The rule `lora-fair` against dense matrices in float64, on layers that are not square."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grandrounds.server.aggregation.make import make_rule
from grandrounds.wire.adapter import Adapter
from tests.server.aggregation.adapters import (
    LAYERS,
    distance,
    named,
    play,
    plus,
    product,
    random_adapter,
)

WEIGHTS = (3, 10, 5)


def a_round() -> tuple[Adapter, list[tuple[Adapter, int]]]:
    rng = np.random.default_rng(3)
    return random_adapter(rng), [(random_adapter(rng, 0.3), weight) for weight in WEIGHTS]


def dense(adapter: Adapter, replies: list[tuple[Adapter, int]], layer: str) -> np.ndarray:
    """Return the mean of the models, (out, in)."""
    total = sum(weight for _, weight in replies)
    models = [weight / total * product(plus(adapter, change), layer) for change, weight in replies]
    return np.sum(models, axis=0)


def mean(adapter: Adapter, replies: list[tuple[Adapter, int]], name: str) -> np.ndarray:
    total = sum(weight for _, weight in replies)
    return adapter[name] + sum(w / total * change[name].astype(float) for change, w in replies)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_b_is_the_ridge_regression_of_the_mean_model_on_the_mean_a(ridge: float) -> None:
    """By the stacked least squares that has no normal equations:

    min || [P; 0] - [A^T, sqrt(mu) I]^T D ||   for the residual P - B A
    """
    adapter, replies = a_round()
    result = play(make_rule(named("lora-fair", ridge=ridge)), adapter, replies)
    for layer, (rank, out, _) in LAYERS.items():
        a = mean(adapter, replies, f"{layer}.lora_A.weight")
        b = mean(adapter, replies, f"{layer}.lora_B.weight")
        mu = ridge * np.trace(a @ a.T) / rank
        residual = dense(adapter, replies, layer) - b @ a
        left = np.concatenate([a.T, math.sqrt(mu) * np.eye(rank)])
        right = np.concatenate([residual.T, np.zeros((rank, out))])
        d = np.linalg.lstsq(left, right, rcond=None)[0].T
        assert np.abs(d).max() > 0.01
        assert np.allclose(result[f"{layer}.lora_A.weight"], a, rtol=1e-6, atol=1e-6)
        assert np.allclose(result[f"{layer}.lora_B.weight"], b + d, rtol=1e-5, atol=1e-5)


def test_what_the_correction_leaves_is_measured_and_less_than_without_it() -> None:
    adapter, replies = a_round()
    left = {}
    for ridge in (0.0, 0.01, 100.0):
        rule = make_rule(named("lora-fair", ridge=ridge))
        result = play(rule, adapter, replies)
        error = update = 0.0
        for layer in LAYERS:
            p = dense(adapter, replies, layer)
            error += float(np.sum((p - product(result, layer)) ** 2))
            update += float(np.sum((p - product(adapter, layer)) ** 2))
        assert rule.report() == {
            "correction-error": pytest.approx(math.sqrt(error / update), rel=1e-5)
        }
        left[ridge] = error
    plain = play(make_rule(named("fedavg")), adapter, replies)
    uncorrected = sum(
        float(np.sum((dense(adapter, replies, layer) - product(plain, layer)) ** 2))
        for layer in LAYERS
    )
    assert left[0.0] < left[0.01] < left[100.0] < uncorrected


def test_sites_that_train_the_same_leave_nothing_to_correct() -> None:
    adapter, [(change, _), *_] = a_round()
    result = play(make_rule(named("lora-fair")), adapter, [(change, w) for w in WEIGHTS])
    assert distance(result, plus(adapter, change)) < 1e-5


def test_an_untouched_b_of_zero_stays_zero() -> None:
    adapter = {
        name: np.zeros_like(tensor) if "lora_B" in name else tensor
        for name, tensor in a_round()[0].items()
    }
    still = {name: np.zeros_like(tensor) for name, tensor in adapter.items()}
    result = play(make_rule(named("lora-fair")), adapter, [(still, 1), (still, 2)])
    assert distance(result, adapter) < 1e-6


def test_a_reply_of_another_rank_is_refused() -> None:
    adapter, _ = a_round()
    rule = make_rule(named("lora-fair"))
    rule.begin(1, adapter)
    lower = random_adapter(np.random.default_rng(0), rank=1)
    with pytest.raises(ValueError, match="another rank"):
        rule.add(0, lower, lower, 1)


def test_a_site_that_received_a_rounded_adapter_is_measured_from_what_it_received() -> None:
    """A still site that received rounded factors changes nothing: its share of the mean model is
    that of the server's adapter."""
    adapter, [(change, _), *_] = a_round()
    rounded = {name: np.round(tensor, 1) for name, tensor in adapter.items()}
    rule = make_rule(named("lora-fair", ridge=0.0))
    rule.begin(1, adapter)
    still = {name: np.zeros_like(tensor) for name, tensor in adapter.items()}
    rule.add(0, rounded, still, 1)
    result = rule.result()
    assert distance(result, adapter) < 1e-4
    rule.begin(2, adapter)
    rule.add(0, adapter, change, 1)
    assert distance(rule.result(), plus(adapter, change)) < 1e-4
