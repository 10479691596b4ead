"""What every rule promises: names, types, any order of arrival, clear errors, real shapes."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.errors import ConfigError
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.server.aggregation.make import make_rule
from grandrounds.wire.adapter import Adapter, initial_adapter
from tests.server.aggregation.adapters import (
    AVERAGING,
    BY_PRODUCT,
    COMBINING,
    LAYERS,
    OF_B,
    OPTIMIZERS,
    ROBUST,
    distance,
    named,
    play,
    product,
    random_adapter,
    same,
)

ALL_NAMES = AVERAGING + OPTIMIZERS + ROBUST + COMBINING + BY_PRODUCT
"""Rules that train A and B in each round."""

Replies = list[tuple[Adapter, int]]


def a_round(seed: int, sites: int = 8, scale: float = 0.1) -> tuple[Adapter, Replies]:
    rng = np.random.default_rng(seed)
    adapter = random_adapter(rng)
    weights = rng.integers(1, 50, sites)
    return adapter, [(random_adapter(rng, scale), int(w)) for w in weights]


def only(replies: Replies, factor: str) -> Replies:
    return [({n: x for n, x in change.items() if factor in n}, w) for change, w in replies]


@pytest.mark.parametrize("name", [*ALL_NAMES, *OF_B])
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    adapter, replies = a_round(1)
    if name in OF_B:
        replies = only(replies, "lora_B")
    forwards = play(make_rule(named(name)), adapter, replies)
    shuffled = play(make_rule(named(name)), adapter, replies, order=[5, 0, 7, 2, 6, 1, 4, 3])
    assert same(forwards, shuffled)


@pytest.mark.parametrize("name", [*ALL_NAMES, *OF_B])
def test_a_result_has_all_names_in_float32_and_leaves_its_inputs_alone(name: str) -> None:
    adapter, replies = a_round(2)
    if name in OF_B:
        replies = only(replies, "lora_B")
    for tensors in (adapter, *(change for change, _ in replies)):
        for tensor in tensors.values():
            tensor.flags.writeable = False
    result = play(make_rule(named(name)), adapter, replies)
    assert list(result) == list(adapter)
    for tensor_name, tensor in result.items():
        assert tensor.dtype == np.float32
        if name != "flora":
            assert tensor.shape == adapter[tensor_name].shape
    assert distance(result, adapter) > 0 if name != "flora" else True


@pytest.mark.parametrize("name", [*ALL_NAMES, *OF_B])
def test_a_round_without_replies_is_refused(name: str) -> None:
    rule = make_rule(named(name))
    rule.begin(1, random_adapter(np.random.default_rng(0)))
    with pytest.raises(ValueError, match="no client update"):
        rule.result()


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("weight", [0, -3, 2**29])
def test_a_weight_out_of_range_is_refused(name: str, weight: int) -> None:
    adapter, [(change, _), *_] = a_round(3)
    rule = make_rule(named(name))
    rule.begin(1, adapter)
    with pytest.raises(ValueError, match="weight"):
        rule.add(0, adapter, change, weight)


@pytest.mark.parametrize("name", OPTIMIZERS + ROBUST + COMBINING + BY_PRODUCT)
def test_a_site_that_adds_twice_is_refused(name: str) -> None:
    adapter, [(change, _), *_] = a_round(3)
    rule = make_rule(named(name))
    rule.begin(1, adapter)
    rule.add(4, adapter, change, 1)
    with pytest.raises(ValueError, match="partition 4 was added twice"):
        rule.add(4, adapter, change, 1)


@pytest.mark.parametrize("name", AVERAGING + OPTIMIZERS + ROBUST + COMBINING)
def test_a_reply_of_another_rank_is_refused_by_rules_that_cannot_use_it(name: str) -> None:
    """Rank 1 most of all, which numpy would broadcast."""
    rng = np.random.default_rng(0)
    adapter, lower = random_adapter(rng), random_adapter(rng, rank=1)
    rule = make_rule(named(name))
    rule.begin(1, adapter)
    with pytest.raises(ValueError, match="another rank"):
        rule.add(0, lower, lower, 1)


@pytest.mark.parametrize("name", AVERAGING)
def test_the_average_is_the_weighted_mean(name: str) -> None:
    adapter, replies = a_round(4)
    result = play(make_rule(named(name)), adapter, replies)
    total = sum(weight for _, weight in replies)
    for tensor in adapter:
        mean = sum(w / total * c[tensor].astype(float) for c, w in replies)
        assert np.allclose(result[tensor], adapter[tensor] + mean, rtol=2e-7, atol=2e-7)


def test_averaging_is_linear() -> None:
    """Changes of s x + t y move the adapter by s times the move of x plus t times that of y."""
    adapter, first = a_round(5)
    _, second = a_round(6)
    second = [(y, w) for (y, _), (_, w) in zip(second, first, strict=True)]
    start = {n: np.zeros_like(x) for n, x in adapter.items()}
    both = [
        ({n: (0.5 * x[n] - 2 * y[n]).astype(np.float32) for n in x}, w)
        for (x, w), (y, _) in zip(first, second, strict=True)
    ]
    moved = [play(make_rule(named("fedavg")), start, r) for r in (first, second, both)]
    for tensor in adapter:
        expected = 0.5 * moved[0][tensor].astype(float) - 2 * moved[1][tensor]
        assert np.allclose(moved[2][tensor], expected, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "round_number", "factor"),
    [("ffa", 1, "lora_B"), ("ffa", 2, "lora_B"), ("rolora", 1, "lora_B"), ("rolora", 2, "lora_A")],
)
def test_training_one_factor_makes_the_mean_of_the_models_exact(
    name: str, round_number: int, factor: str
) -> None:
    adapter, replies = a_round(7)
    replies = only(replies, factor)
    result = play(make_rule(named(name)), adapter, replies, round_number)
    total = sum(weight for _, weight in replies)
    for layer in LAYERS:
        models = [
            product({n: x.astype(float) + c.get(n, 0) for n, x in adapter.items()}, layer)  # type: ignore[misc]
            for c, _ in replies
        ]
        mean = sum(w / total * p for p, (_, w) in zip(models, replies, strict=True))
        assert np.allclose(product(result, layer), mean, rtol=1e-5, atol=1e-6)
        other = "lora_A" if factor == "lora_B" else "lora_B"
        frozen = f"{layer}.{other}.weight"
        assert result[frozen].tobytes() == adapter[frozen].tobytes()


@pytest.mark.parametrize(
    ("name", "round_number"), [("ffa", 1), ("rolora", 1), ("rolora", 2), ("fedsvd", 2)]
)
def test_a_reply_with_what_is_not_trained_is_refused(name: str, round_number: int) -> None:
    adapter, [(change, weight), *_] = a_round(8)
    rule = make_rule(named(name))
    rule.begin(round_number, adapter)
    with pytest.raises(ValueError, match="partition 3 did not change the tensors trained in this"):
        rule.add(3, adapter, change, weight)


def test_an_unknown_rule_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'krum'"):
        make_rule(named("krumm"))


@pytest.mark.parametrize("name", ["rule", "replies", "defence", "low_rank", "os"])
def test_a_file_that_is_no_rule_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not an aggregation rule"):
        make_rule(named(name))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("fedtrimmedavg", {"trimmed_share": 0.5}),
        ("fedtrimmedavg", {"trimmed_share": -0.1}),
        ("krum", {"num_malicious_nodes": -1}),
        ("multikrum", {"num_nodes_to_select": 0}),
        ("bulyan", {"num_malicious_nodes": -1}),
        ("fedavgm", {"server_momentum": 1.0}),
        ("fedavgm", {"server_learning_rate": -1.0}),
        ("fedadam", {"tau": 0.0}),
        ("fedadam", {"beta_1": 1.0}),
        ("fedyogi", {"beta_2": -0.1}),
        ("fedadagrad", {"tau": -1.0}),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, setting: dict[str, float]) -> None:
    key = next(iter(setting)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"strategy.{key}"):
        make_rule(named(name, **setting))


@pytest.fixture(scope="module")
def real_round() -> tuple[Adapter, Replies]:
    """Seven replies to an adapter of the embedded base."""
    shapes, _ = adapter_layout("formulary", LoraSpec(16, 32, "auto", 0.0))
    rng = np.random.default_rng(0)
    adapter = initial_adapter(shapes, rng)
    replies: Replies = [
        ({n: (1e-3 * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}, 7 + i)
        for i in range(7)
    ]
    return adapter, replies


@pytest.mark.parametrize("name", ALL_NAMES)
def test_an_adapter_of_the_embedded_base_goes_through_every_rule(
    name: str, real_round: tuple[Adapter, Replies]
) -> None:
    adapter, replies = real_round
    result = play(make_rule(named(name, max_rank=64)), adapter, replies)
    assert list(result) == list(adapter)
    assert all(np.isfinite(x).all() for x in result.values())
    if name == "flora":
        assert {x.shape[0] for n, x in result.items() if "lora_A" in n} == {64}
