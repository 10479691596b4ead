"""Adapters and rounds for the tests of the aggregation rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.config.recipes import resolve
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import Adapter

LAYERS = {"first": (4, 11, 7), "second": (4, 5, 13)}
"""Name → (rank, out, in); no layer is square."""

CONFIG = replace(
    resolve({}).strategy,
    max_rank=12,
    num_malicious_nodes=1,
    num_nodes_to_select=3,
    trimmed_share=0.25,
    server_learning_rate=0.0,
    server_momentum=0.5,
    beta_1=0.9,
    beta_2=0.99,
    tau=1e-3,
)

AVERAGING = ("fedavg", "fedprox", "la-lora")
OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
ROBUST = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")
COMBINING = ("geomedian", "nnm")
BY_PRODUCT = ("product", "flora", "lora-fair", "hetlora")
OF_B = ("ffa", "rolora", "fedsvd")
"""Rules that train B alone in round 1."""


def named(name: str, **changed: Any) -> StrategyConfig:
    """Return the strategy's section for a rule."""
    return replace(CONFIG, name=name, **changed)


def random_adapter(
    rng: np.random.Generator,
    scale: float = 1.0,
    layers: Mapping[str, tuple[int, int, int]] = LAYERS,
    rank: int | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Return an adapter of Gaussian numbers."""
    adapter = {}
    for name, (own_rank, out, into) in layers.items():
        r = rank or own_rank
        adapter[f"{name}.lora_A.weight"] = (scale * rng.normal(size=(r, into))).astype(np.float32)
        adapter[f"{name}.lora_B.weight"] = (scale * rng.normal(size=(out, r))).astype(np.float32)
    return adapter


def play(
    rule: Rule,
    adapter: Adapter,
    replies: Sequence[tuple[Adapter, int]],
    round_number: int = 1,
    order: Sequence[int] | None = None,
) -> Adapter:
    """Play one round of (change, weight) by partition, all received being the adapter itself."""
    rule.begin(round_number, adapter)
    for partition in order or range(len(replies)):
        change, weight = replies[partition]
        rule.add(partition, adapter, change, weight)
    return rule.result()


def product(adapter: Adapter, layer: str) -> NDArray[np.float64]:
    """Return the dense B A of a layer."""
    b = adapter[f"{layer}.lora_B.weight"].astype(np.float64)
    return b @ adapter[f"{layer}.lora_A.weight"].astype(np.float64)


def plus(adapter: Adapter, change: Adapter) -> dict[str, NDArray[np.float32]]:
    """Return an adapter after a change, in float64."""
    return {name: x.astype(np.float64) + change[name] for name, x in adapter.items()}  # type: ignore[misc]


def same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def distance(one: Adapter, other: Adapter) -> float:
    """Return the L2 distance of two adapters."""
    return float(np.sqrt(sum(float(np.sum((one[n].astype(float) - other[n]) ** 2)) for n in other)))
