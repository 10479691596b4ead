"""Hostile replies: what the robust rules survive, as far as their papers say, and FedAvg not."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.server.aggregation.make import make_rule
from grandrounds.wire.adapter import Adapter
from tests.server.aggregation.adapters import ROBUST, distance, named, play, plus, random_adapter

Replies = list[tuple[Adapter, int]]
SITES = {"fedmedian": (11, 5), "fedtrimmedavg": (12, 3), "krum": (11, 4), "multikrum": (11, 4)}
SITES["bulyan"] = (11, 2)
"""Rule → (replies, the most hostile ones among them that it stands): k < n / 2; beta n with
beta = 1/4; n >= 2 f + 3; n >= 4 f + 3."""

ATTACKS = ("scaled", "flipped", "garbage", "tiny-lie")


def hostile(attack: str, honest: Adapter, rng: np.random.Generator) -> Adapter:
    if attack == "scaled":
        return {n: 1000 * x for n, x in honest.items()}
    if attack == "flipped":
        return {n: -100 * x for n, x in honest.items()}
    if attack == "garbage":
        return {n: rng.normal(0, 1e6, x.shape).astype(np.float32) for n, x in honest.items()}
    return {n: np.full_like(x, 0.5) for n, x in honest.items()}


@pytest.fixture(scope="module")
def start() -> Adapter:
    """An adapter of layers that are not square, as large as those of the embedded base."""
    layers = {"down_proj": (16, 128, 352), "k_proj": (16, 64, 128)}
    return random_adapter(np.random.default_rng(0), 0.1, layers)


def attacked(start: Adapter, attack: str, sites: int, bad: int) -> tuple[Replies, Replies]:
    """Return all replies, and the honest ones; the honest differ by as much as they agree."""
    rng = np.random.default_rng(7)
    common = {n: 0.01 * rng.normal(size=x.shape) for n, x in start.items()}
    honest: Replies = [
        (
            {
                n: (common[n] + 0.01 * rng.normal(size=x.shape)).astype(np.float32)
                for n, x in start.items()
            },
            20,
        )
        for _ in range(sites - bad)
    ]
    return [*((hostile(attack, honest[0][0], rng), 20) for _ in range(bad)), *honest], honest


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_rule_stays_near_the_honest_mean(name: str, attack: str, start: Adapter) -> None:
    """And, in every coordinate, within the range of the honest replies; FedAvg is far outside."""
    sites, bad = SITES[name]
    replies, honest = attacked(start, attack, sites, bad)
    settings = named(name, num_malicious_nodes=bad, num_nodes_to_select=sites - bad)
    good_mean = play(make_rule(named("fedavg")), start, honest)
    farthest = max(distance(plus(start, change), good_mean) for change, _ in honest)
    result = play(make_rule(settings), start, replies)
    plain = distance(play(make_rule(named("fedavg")), start, replies), good_mean)
    assert distance(result, good_mean) < 2 * farthest
    assert plain > 5 * farthest
    for n in start:
        values = start[n] + np.stack([change[n] for change, _ in honest])
        slack = 1e-6
        assert (result[n] >= values.min(0) - slack).all()
        assert (result[n] <= values.max(0) + slack).all()


def test_one_hostile_site_too_many_takes_over_the_trimmed_mean(start: Adapter) -> None:
    """Four of twelve, where three are cut off at either end."""
    replies, honest = attacked(start, "scaled", 12, 4)
    good_mean = play(make_rule(named("fedavg")), start, honest)
    farthest = max(distance(plus(start, change), good_mean) for change, _ in honest)
    assert distance(play(make_rule(named("fedtrimmedavg")), start, replies), good_mean) > (
        5 * farthest
    )
