"""Nesterov's momentum on the mean of the updates, against float64 and PyTorch's SGD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grandrounds.server.aggregation.make import make_rule
from grandrounds.wire.adapter import Adapter
from tests.server.aggregation.adapters import named, play, random_adapter, same

NESTEROV = {"outer_nesterov": True, "server_momentum": 0.9, "server_learning_rate": 0.0}
WEIGHTS = (3, 10, 5)


def rounds(count: int) -> tuple[Adapter, list[list[tuple[Adapter, int]]]]:
    rng = np.random.default_rng(7)
    adapter = random_adapter(rng)
    return adapter, [[(random_adapter(rng, 0.1), w) for w in WEIGHTS] for _ in range(count)]


def test_a_run_is_pytorchs_sgd_with_nesterov_on_minus_the_mean_in_float64() -> None:
    adapter, replies = rounds(4)
    rule, found = make_rule(named("fedavg", **NESTEROV)), adapter
    for number, of_round in enumerate(replies, 1):
        found = play(rule, found, of_round, number)
    for name, start in adapter.items():
        w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        sgd = torch.optim.SGD([w], lr=0.7, momentum=0.9, nesterov=True)
        for of_round in replies:
            total = sum(weight for _, weight in of_round)
            mean = sum(w / total * change[name].astype(float) for change, w in of_round)
            w.grad = -torch.tensor(mean)
            sgd.step()
        assert np.allclose(found[name], w.detach().numpy(), rtol=2e-6, atol=2e-6)


def test_without_momentum_a_rate_of_1_is_the_mean() -> None:
    adapter, [of_round] = rounds(1)
    none = named("fedavg", outer_nesterov=True, server_momentum=0.0, server_learning_rate=1.0)
    plain = play(make_rule(named("fedavg")), adapter, of_round)
    for name, tensor in play(make_rule(none), adapter, of_round).items():
        assert np.allclose(tensor, plain[name], rtol=2e-7, atol=2e-7)


def test_the_order_of_arrival_changes_no_bit() -> None:
    adapter, [of_round] = rounds(1)
    one, other = (
        play(make_rule(named("fedavg", **NESTEROV)), adapter, of_round, order=order)
        for order in ([0, 1, 2], [2, 0, 1])
    )
    assert same(one, other)


@pytest.mark.parametrize("name", ["fedavg", "ffa", "rolora", "la-lora"])
def test_a_restored_rule_goes_on_to_the_bit(name: str) -> None:
    adapter, replies = rounds(4)
    factors = {"ffa": "BBBB", "rolora": "BABA"}.get(name)
    if factors:
        replies = [
            [({n: x for n, x in c.items() if f"lora_{f}" in n}, w) for c, w in of_round]
            for f, of_round in zip(factors, replies, strict=True)
        ]
    rule, whole = make_rule(named(name, **NESTEROV)), adapter
    for number, of_round in enumerate(replies[:3], 1):
        whole = play(rule, whole, of_round, number)
    again = make_rule(named(name, **NESTEROV))
    again.restore({key: value.copy() for key, value in rule.state().items()})
    last = play(rule, whole, replies[3], 4)
    assert same(last, play(again, whole, replies[3], 4))
    forgetful = play(make_rule(named(name, **NESTEROV)), whole, replies[3], 4)
    assert not same(last, forgetful)


def test_a_factor_that_rests_neither_moves_nor_loses_its_momentum() -> None:
    """rolora: B in rounds 1 and 3, A in round 2."""
    adapter, replies = rounds(2)
    rule = make_rule(named("rolora", **NESTEROV))
    of_b = [({n: x for n, x in c.items() if "lora_B" in n}, w) for c, w in replies[0]]
    of_a = [({n: x for n, x in c.items() if "lora_A" in n}, w) for c, w in replies[1]]
    first = play(rule, adapter, of_b, 1)
    before = {key: value.copy() for key, value in rule.state().items()}
    second = play(rule, first, of_a, 2)
    for name in adapter:
        if "lora_B" in name:
            assert second[name].tobytes() == first[name].tobytes()
            assert np.array_equal(rule.state()[f"velocity/{name}"], before[f"velocity/{name}"])
