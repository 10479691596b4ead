"""The rule `hetlora` against zero-padded factors in float64, and the ranks that it prunes."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.server.aggregation.make import make_rule
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.low_rank import cut
from tests.server.aggregation.adapters import LAYERS, named, play, plus, product, random_adapter

RANKS = (4, 2, 3)


def a_round(ranks: tuple[int, ...] = RANKS) -> tuple[Adapter, list[tuple[Adapter, Adapter]]]:
    """Return the server's adapter, and what each site received and changed."""
    rng = np.random.default_rng(11)
    adapter = random_adapter(rng)
    return adapter, [(cut(adapter, r), random_adapter(rng, 0.3, rank=r)) for r in ranks]


def padded(tensor: np.ndarray, like: np.ndarray) -> np.ndarray:
    full = np.zeros(like.shape)
    full[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return full


def test_factors_are_padded_with_zeros_and_weighted_by_the_norms_of_the_models() -> None:
    adapter, visits = a_round()
    rule = make_rule(named("hetlora"))
    rule.begin(1, adapter)
    for site, (received, change) in enumerate(visits):
        rule.add(site, received, change, 7 + site)
    result = rule.result()
    models = [plus(received, change) for received, change in visits]
    norms = [
        np.sqrt(sum(np.sum(product(model, layer) ** 2) for layer in LAYERS)) for model in models
    ]
    for name, tensor in adapter.items():
        expected = sum(
            norm / sum(norms) * padded(model[name], tensor)
            for norm, model in zip(norms, models, strict=True)
        )
        assert np.allclose(result[name], expected, rtol=1e-6, atol=1e-6)
    assert rule.report() == {"site-rank": 3.0}


def test_ranks_that_no_site_of_the_round_has_stay() -> None:
    adapter, visits = a_round((2, 1))
    rule = make_rule(named("hetlora"))
    rule.begin(1, adapter)
    for site, (received, change) in enumerate(visits):
        rule.add(site, received, change, 1)
    for name, tensor in rule.result().items():
        rest = (slice(2, None),) if "lora_A" in name else (slice(None), slice(2, None))
        assert np.array_equal(tensor[rest], adapter[name][rest])
        assert not np.array_equal(tensor, adapter[name])


def test_one_site_is_taken_over_as_it_is() -> None:
    adapter, [(received, change), *_] = a_round()
    result = play(make_rule(named("hetlora")), adapter, [(change, 5)])
    for name, tensor in plus(received, change).items():
        assert np.allclose(result[name], tensor, atol=1e-6)


@pytest.mark.parametrize(("scale", "pruned"), [(-0.5, {0: 3}), (0.5, {})])
def test_a_site_prunes_when_its_last_ranks_have_become_smaller(
    scale: float, pruned: dict[int, int]
) -> None:
    """At 0.75 rank 4 keeps 3: the last rank is halved in both factors, or half as large again."""
    adapter, _ = a_round()
    change = {name: np.zeros_like(tensor) for name, tensor in adapter.items()}
    for name, tensor in adapter.items():
        last = (slice(3, None),) if "lora_A" in name else (slice(None), slice(3, None))
        change[name][last] = scale * tensor[last]
    rule = make_rule(named("hetlora", rank_decay=0.75))
    play(rule, adapter, [(change, 1)])
    assert rule.ranks() == pruned
    again = make_rule(named("hetlora", rank_decay=0.75))
    again.restore(rule.state())
    assert again.ranks() == pruned
    assert make_rule(named("hetlora", rank_decay=1.0)).ranks() == {}


def test_no_site_prunes_without_a_decay() -> None:
    adapter, _ = a_round()
    change = {name: -0.5 * tensor for name, tensor in adapter.items()}
    rule = make_rule(named("hetlora"))
    play(rule, adapter, [(change, 1)])
    assert rule.ranks() == {}
    assert rule.state() == {}
