"""Flower's strategies as aggregation rules: their `aggregate_train` on the sites' changes.

A strategy receives the changes d_i as if they were models trained from w = 0, and its result is
added to w. All strategies used here commute with this shift (f(w + d) = w + f(d)), and it preserves
precision in float32: `multikrum.py` computes distances as |x|^2 + |y|^2 - 2 x y, where changes that
are small relative to w are lost. With 100,000 weights within +-0.1 changed by 1e-4, distances are
off by up to 25 %, and another reply is selected (tests/server/aggregation/test_flower_rule.py).

Checked against flwr 1.41, serverapp/strategy/*.py. Memory grows with the cohort: every reply is
kept until the round ends, and Flower makes two more copies while it computes.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import Bulyan, FedAvg, FedAvgM, FedTrimmedAvg, MultiKrum
from flwr.serverapp.strategy.fedopt import FedOpt
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.errors import ConfigError, RoundError
from grandrounds.server.aggregation.replies import ComparableReplies
from grandrounds.wire.adapter import Adapter

MOMENTS = ("m_t", "v_t")
"""State that FedOpt strategies carry from round to round, by tensor name."""

MOMENTUM = "momentum_vector"
"""State that FedAvgM carries from round to round, as a list in the order of the tensors."""


TOLERATED = "hostile-tolerated"
"""Figure of a round: how many hostile updates the rule tolerates among those that came."""


class FlowerRule(ComparableReplies):
    """A rule computed by a Flower strategy.

    Parameters
    ----------
    strategy
        A strategy whose `aggregate_train` commutes with shifts.
    config
        The strategy's section: the rule's name, and the keys that set the replies it needs.
    """

    def __init__(self, strategy: FedAvg, config: StrategyConfig) -> None:
        self._strategy = strategy
        self._name, self._config = config.name, config
        self._state: dict[str, NDArray[Any]] = {}

    def result(self) -> Adapter:
        """Return the adapter plus the strategy's result."""
        replies = self.enough_replies()
        self._settle(len(replies))
        names = [name for name in self._adapter if name in replies[0].change]
        self._set_start(names)
        answers = [
            message({name: reply.change[name] for name in names}, reply.weight) for reply in replies
        ]
        with quiet_flower(), cheap_collections():
            try:
                record, _ = self._strategy.aggregate_train(self._round, answers)
            except AggregationError as error:
                raise RoundError(
                    f"Round {self._round}: Flower's {self._name} could not aggregate: {error}"
                ) from error
        if record is None:
            raise RoundError(f"Round {self._round}: Flower's {self._name} returned nothing.")
        self._keep_memory(names)
        self._kept = {}
        steps = {name: record[name].numpy() for name in names}
        moved = {
            name: (self._adapter[name] + step).astype(np.float32) for name, step in steps.items()
        }
        return {**self._adapter, **moved}

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the strategy's moments or momentum, as `<attribute>/<tensor name>`."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the moments or the momentum of an earlier instance."""
        self._state = dict(state)

    def _settle(self, count: int) -> None:
        """Give the strategy its settings for this number of replies; report what it tolerates."""
        strategy, settings = self._strategy, self._config.for_replies(count)
        if isinstance(strategy, MultiKrum | Bulyan):
            strategy.num_malicious_nodes = settings.num_malicious_nodes
            self._report = {TOLERATED: settings.num_malicious_nodes}
        if type(strategy) is MultiKrum:  # Krum, which derives from it, selects one
            strategy.num_nodes_to_select = settings.num_nodes_to_select
        if isinstance(strategy, FedTrimmedAvg):
            strategy.beta = settings.trimmed_share
            self._report = {TOLERATED: int(settings.trimmed_share * count)}

    def _set_start(self, names: Sequence[str]) -> None:
        """Set the strategy's start to zero, and restore its state of the last round."""
        strategy = self._strategy
        zeros = {name: np.zeros_like(self._adapter[name]) for name in names}
        memory = {key: array.copy() for key, array in self._state.items()}
        if isinstance(strategy, FedOpt):
            strategy.current_arrays = zeros
            for moment in MOMENTS if memory else ():
                setattr(strategy, moment, {name: memory[f"{moment}/{name}"] for name in names})
        elif isinstance(strategy, FedAvgM):
            strategy.current_arrays = ArrayRecord({n: Array(zero) for n, zero in zeros.items()})
            if memory:
                strategy.momentum_vector = [memory[f"{MOMENTUM}/{name}"] for name in names]

    def _keep_memory(self, names: Sequence[str]) -> None:
        """Copy the state that the strategy needs in the next round."""
        strategy = self._strategy
        if isinstance(strategy, FedOpt):
            self._state = {
                f"{moment}/{name}": np.array(array)
                for moment in MOMENTS
                for name, array in getattr(strategy, moment).items()
            }
        elif isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
            pairs = zip(names, strategy.momentum_vector, strict=True)
            self._state = {f"{MOMENTUM}/{name}": np.array(array) for name, array in pairs}


def message(change: Adapter, weight: int) -> Message:
    """Return a reply as Flower's strategies read it; they use neither ids nor times."""
    arrays = ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in change.items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})})
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type="train",
    )
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload, no-any-return]


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's log lines off the terminal; the conditions they warn of are checked here."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def cheap_collections() -> Iterator[None]:
    """Hide existing objects from the garbage collector.

    Flower's Bulyan calls `gc.collect()` for every tensor of every reply (`to_numpy_ndarrays` with
    `keep_input=False`). With torch loaded, that takes seconds for a handful of tensors; this way,
    milliseconds.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def require(is_right: bool, key: str, value: float, allowed: str) -> None:
    """Raise `ConfigError` for a setting that is out of range."""
    if not is_right:
        raise ConfigError(f"strategy.{key} = {value:g} is not allowed: {allowed}.")
