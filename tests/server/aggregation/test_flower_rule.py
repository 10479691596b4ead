"""Flower's strategies as rules: against formulas in float64, a resume, and Flower's own traps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam
from flwr.serverapp.strategy.multikrum import compute_distances

from grandrounds.errors import RoundError
from grandrounds.server.aggregation import fedavgm
from grandrounds.server.aggregation.flower_rule import message
from grandrounds.server.aggregation.make import make_rule
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import Adapter
from tests.server.aggregation.adapters import OPTIMIZERS, ROBUST, named, play, random_adapter, same

Replies = list[tuple[Adapter, int]]
X = "m.lora_A.weight"
TAU = 1e-3
"""Of the settings, and so the usual learning rate."""


def rounds_of_replies(seed: int, rounds: int, sites: int = 4) -> tuple[Adapter, list[Replies]]:
    rng = np.random.default_rng(seed)
    adapter = random_adapter(rng)
    return adapter, [
        [(random_adapter(rng, 0.01), int(rng.integers(1, 30))) for _ in range(sites)]
        for _ in range(rounds)
    ]


def mean(replies: Replies, name: str) -> Any:
    total = sum(weight for _, weight in replies)
    return sum(w / total * c[name].astype(float) for c, w in replies)


def stack(replies: Replies, name: str) -> np.ndarray:
    return np.stack([c[name].astype(float) for c, _ in replies])


def momentum_step(d: np.ndarray, memory: dict[str, np.ndarray], t: int) -> Any:
    memory["v"] = 0.5 * memory["v"] - d if "v" in memory else -d
    return -fedavgm.USUAL_SERVER_LEARNING_RATE * memory["v"]


def adam_step(d: np.ndarray, memory: dict[str, np.ndarray], t: int) -> Any:
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * d
    memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * d**2
    rate = TAU * np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
    return rate * memory["m"] / (np.sqrt(memory["v"]) + TAU)


def yogi_step(d: np.ndarray, memory: dict[str, np.ndarray], t: int) -> Any:
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * d
    v = memory.get("v", np.zeros_like(d))
    memory["v"] = v - 0.01 * d**2 * np.sign(v - d**2)
    return TAU * memory["m"] / (np.sqrt(memory["v"]) + TAU)


def adagrad_step(d: np.ndarray, memory: dict[str, np.ndarray], t: int) -> Any:
    memory["v"] = memory.get("v", 0) + d**2
    return TAU * d / (np.sqrt(memory["v"]) + TAU)


STEPS: dict[str, Callable[[np.ndarray, dict[str, np.ndarray], int], Any]] = {
    "fedavgm": momentum_step,
    "fedadam": adam_step,
    "fedyogi": yogi_step,
    "fedadagrad": adagrad_step,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_the_server_agrees_with_its_formula_over_three_rounds(name: str) -> None:
    adapter, rounds = rounds_of_replies(1, 3)
    rule = make_rule(named(name))
    expected = {n: x.astype(float) for n, x in adapter.items()}
    memories: dict[str, dict[str, np.ndarray]] = {n: {} for n in adapter}
    for t, replies in enumerate(rounds, 1):
        adapter = play(rule, adapter, replies, t)
        for n in adapter:
            expected[n] = expected[n] + STEPS[name](mean(replies, n), memories[n], t)
            assert np.allclose(adapter[n], expected[n], rtol=1e-5, atol=1e-6)


def test_changes_small_beside_tau_move_fedadagrad_as_fedavg_by_its_usual_learning_rate() -> None:
    adapter, [replies] = rounds_of_replies(1, 1)
    start = {n: np.zeros_like(x) for n, x in adapter.items()}
    average = play(make_rule(named("fedavg")), start, replies)
    for tau, tolerance in ((100.0, 1e-3), (1e4, 1e-5)):
        moved = play(make_rule(named("fedadagrad", tau=tau)), start, replies)
        for n in adapter:
            assert np.allclose(moved[n], average[n], rtol=tolerance, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_rule_gives_the_same_next_rounds_bit_for_bit(name: str) -> None:
    adapter, rounds = rounds_of_replies(2, 4)
    rule = make_rule(named(name))
    for t in (1, 2):
        adapter = play(rule, adapter, rounds[t - 1], t)
    saved = {key: array.copy() for key, array in rule.state().items()}
    resumed = make_rule(named(name))
    resumed.restore(dict(sorted(saved.items(), reverse=True)))  # a file may have another order
    assert saved
    assert same(resumed.state(), saved)
    one, other = adapter, adapter
    for t in (3, 4):
        one = play(rule, one, rounds[t - 1], t)
        other = play(resumed, other, rounds[t - 1], t)
        assert same(one, other)
    forgetful = play(make_rule(named(name)), adapter, rounds[2], 3)
    assert not same(forgetful, play(_restored(name, saved), adapter, rounds[2], 3))


def _restored(name: str, saved: dict[str, np.ndarray]) -> Rule:
    rule = make_rule(named(name))
    rule.restore(saved)
    return rule


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_resume_needs_are_float32_tensors_of_the_adapter(name: str) -> None:
    adapter, [replies] = rounds_of_replies(3, 1)
    rule = make_rule(named(name))
    assert rule.state() == {}
    play(rule, adapter, replies)
    kinds = ("momentum_vector",) if name == "fedavgm" else ("m_t", "v_t")
    state = rule.state()
    assert set(state) == {f"{kind}/{n}" for kind in kinds for n in adapter}
    for key, array in state.items():
        assert array.dtype == np.float32
        assert array.shape == adapter[key.partition("/")[2]].shape


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_rule_has_nothing_to_resume(name: str) -> None:
    adapter, [replies] = rounds_of_replies(3, 1, sites=7)
    rule = make_rule(named(name))
    play(rule, adapter, replies)
    assert rule.state() == {}


def test_the_median_agrees_with_numpy() -> None:
    adapter, [replies] = rounds_of_replies(4, 1, sites=6)
    result = play(make_rule(named("fedmedian")), adapter, replies)
    for n in adapter:
        assert np.allclose(result[n], adapter[n] + np.median(stack(replies, n), 0), atol=1e-6)


def test_the_trimmed_mean_leaves_out_a_share_at_either_end() -> None:
    """A quarter of 8 replies is 2 at either end."""
    adapter, [replies] = rounds_of_replies(5, 1, sites=8)
    result = play(make_rule(named("fedtrimmedavg")), adapter, replies)
    for n in adapter:
        kept = np.sort(stack(replies, n), axis=0)[2:6]
        assert np.allclose(result[n], adapter[n] + kept.mean(0), atol=1e-6)


def test_krum_multikrum_and_bulyan_agree_with_their_papers_in_float64() -> None:
    """Seven replies, one of them hostile. Bulyan: 5 by score, then 3 nearest to the median."""
    adapter, [replies] = rounds_of_replies(6, 1, sites=7)
    flat = np.stack([np.concatenate([c[n].ravel() for n in c]).astype(float) for c, _ in replies])
    squared = ((flat[:, None] - flat[None]) ** 2).sum(-1)
    scores = np.sort(squared, axis=1)[:, 1 : 1 + 7 - 1 - 2].sum(1)
    ranked = np.argsort(scores)
    krum = play(make_rule(named("krum")), adapter, replies)
    several = play(make_rule(named("multikrum")), adapter, replies)
    bulyan = play(make_rule(named("bulyan")), adapter, replies)
    selected = [replies[i] for i in ranked[:5]]
    for n in adapter:
        assert np.allclose(krum[n], adapter[n] + replies[ranked[0]][0][n], atol=1e-6)
        three = mean([replies[i] for i in ranked[:3]], n)
        assert np.allclose(several[n], adapter[n] + three, atol=1e-6)
        values = stack(selected, n)
        nearest = np.argsort(np.abs(values - np.median(values, 0)), axis=0)[:3]
        expected = np.take_along_axis(values, nearest, 0).mean(0)
        assert np.allclose(bulyan[n], adapter[n] + expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "setting", "needed"),
    [
        ("krum", {"num_malicious_nodes": 2}, 7),
        ("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}, 5),
        ("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 6}, 7),
        ("bulyan", {"num_malicious_nodes": 1}, 7),
        ("fedtrimmedavg", {"trimmed_share": 0.2}, 5),
        ("fedtrimmedavg", {"trimmed_share": 0.3}, 4),
        ("fedtrimmedavg", {"trimmed_share": 0.0}, 1),
        ("fedmedian", {}, 1),
    ],
)
def test_with_fewer_replies_than_planned_a_rule_tolerates_fewer_hostile_ones(
    name: str, setting: dict[str, float], needed: int
) -> None:
    """Two sites of seven that answered with an error ended a run of multi-Krum."""
    settings = named(name, **setting)
    assert settings.needed_replies == needed
    adapter, [replies] = rounds_of_replies(7, 1, sites=needed)
    for count in range(settings.fewest_replies, needed + 1):
        rule = make_rule(settings)
        play(rule, adapter, replies[:count])
        hostile = settings.for_replies(count).num_malicious_nodes
        if name == "fedtrimmedavg":
            hostile = 1 if settings.trimmed_share else 0
        assert rule.report() == ({} if name == "fedmedian" else {"hostile-tolerated": hostile})
    if needed > 1:
        assert settings.fewest_replies == 3
        with pytest.raises(RoundError, match=r"at least 3 good replies.*got 2"):
            play(make_rule(settings), adapter, replies[:2])


@pytest.mark.parametrize(("name", "per"), [("krum", 2), ("multikrum", 2), ("bulyan", 4)])
def test_hostile_sites_that_send_nothing_weaken_no_rule(name: str, per: int) -> None:
    """Of n = 2 f + 3 sites with f hostile ones, j of which send nothing, f - j are left."""
    for f in range(4):
        settings = named(name, num_malicious_nodes=f, num_nodes_to_select=f + 3)
        assert settings.for_replies(per * f + 3) == settings
        for j in range(f + 1):
            lowered = settings.for_replies(per * f + 3 - j)
            assert f - j <= lowered.num_malicious_nodes <= f
            assert lowered.needed_replies <= per * f + 3 - j


@pytest.mark.parametrize("count", [3, 4])
def test_a_trimmed_mean_of_few_trims_one_at_each_end(count: int) -> None:
    adapter, [replies] = rounds_of_replies(7, 1, sites=count)
    replies[0] = ({n: np.full_like(t, 1e30) for n, t in replies[0][0].items()}, 1)
    found = play(make_rule(named("fedtrimmedavg", trimmed_share=0.2)), adapter, replies)
    for name, tensor in adapter.items():
        middle = np.sort(stack(replies, name), axis=0)[1:-1].mean(axis=0)
        assert np.allclose(found[name], tensor + middle, atol=1e-6)


def test_a_share_that_rounds_down_to_nobody_needs_one_reply_more() -> None:
    """int(1/49 * 49) is 0 in floating point."""
    assert int(1 / 49 * 49) == 0
    assert named("fedtrimmedavg", trimmed_share=1 / 49).needed_replies == 50


def test_flower_logs_nothing_and_its_logger_is_left_as_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    adapter, [replies] = rounds_of_replies(8, 1, sites=7)
    level = logging.getLogger("flwr").level
    for name in OPTIMIZERS + ROBUST:
        play(make_rule(named(name)), adapter, replies)
    assert logging.getLogger("flwr").level == level
    assert capfd.readouterr() == ("", "")


def test_flowers_distances_drown_where_models_are_given_instead_of_changes() -> None:
    """Why the strategies are given changes: |x|^2 + |y|^2 - 2 x y in float32."""
    rng = np.random.default_rng(0)
    start = rng.uniform(-0.1, 0.1, 100_000).astype(np.float32)
    changes = [(1e-4 * rng.normal(size=start.size)).astype(np.float32) for _ in range(6)]
    flat = np.stack(changes).astype(float)
    exact = np.array([[np.sum((x - y) ** 2) for y in flat] for x in flat])

    def worst(models: list[np.ndarray]) -> float:
        measured = compute_distances([ArrayRecord({X: Array(model)}) for model in models])
        return float(np.abs(measured - exact).max() / exact.max())

    assert worst([start + change for change in changes]) > 0.05
    assert worst(changes) < 1e-5


def test_flowers_fedadam_returns_float64_and_the_rule_float32() -> None:
    strategy = FedAdam()
    strategy.current_arrays = {X: np.zeros(3, np.float32)}
    record, _ = strategy.aggregate_train(1, [message({X: np.ones(3, np.float32)}, 1)])
    assert record is not None
    if record[X].dtype != "float64":  # Flower has mended it
        pytest.skip("flwr returns float32 now")
    adapter, [replies] = rounds_of_replies(9, 1)
    result = play(make_rule(named("fedadam")), adapter, replies)
    assert {x.dtype for x in result.values()} == {np.dtype(np.float32)}
