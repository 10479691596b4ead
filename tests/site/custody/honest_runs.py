"""Honest runs without a model: real rules, codecs and downlinks, drawn changes of the sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import RecordDict

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.strategies import STRATEGIES
from grandrounds.server.aggregation.make import filled_in, make_rule
from grandrounds.site.custody.reach import adamw_reach
from grandrounds.site.custody.received import ReceivedAdapter, after_round
from grandrounds.wire import downlink, messages, uplink
from grandrounds.wire.adapter import (
    MAGNITUDE,
    A,
    Adapter,
    B,
    Ranks,
    Shapes,
    factor_of,
    is_magnitude,
    shapes_of,
    started_adapter,
)
from grandrounds.wire.codecs.codec import codec_named
from grandrounds.wire.downlink import Parcel, Sender
from grandrounds.wire.schedule import cohort_of, round_learning_rate_of, uplink_generator
from tests.runs import Settings

RANK, WIDTH, HEIGHT = 4, 48, 40
PREFIX = "base_model.model.layers.0."


def layout(rank: int, *, dora: bool = False) -> Shapes:
    """Return the shapes of an adapter on two modules."""
    of_module: dict[str, tuple[int, ...]] = {A: (rank, WIDTH), B: (HEIGHT, rank)}
    of_module |= {MAGNITUDE: (HEIGHT,)} if dora else {}
    return {
        f"{PREFIX}{module}{suffix}": shape
        for module in ("q_proj", "v_proj")
        for suffix, shape in of_module.items()
    }


def configured(settings: Settings) -> Config:
    """Return a run of six sites, three a round, at a learning rate of a real base."""
    return recipes.resolve(
        {
            "data.num-partitions": 6,
            "strategy.fraction-train": 0.5,
            "strategy.proximal-mu": 0.0,
            "strategy.name": "fedavg",
            "num-server-rounds": 6,
            "model.lora.peft-lora-r": RANK,
            "model.lora.peft-lora-alpha": 2 * RANK,
            "train.learning-rate-max": 1e-3,
            "train.training-arguments.max-steps": 4,
            **settings,
        }
    )


@dataclass
class Honest:
    """A run whose sites move their adapters as AdamW can."""

    config: Config
    seed: int
    """Draws the sites' changes."""
    mood: str
    """`aligned`: every value moves nearly its whole reach in one direction; `random`: each visit in
    its own; `sparse`: most values hardly move; `steady`: in part common to all sites."""

    def __post_init__(self) -> None:
        lora = self.config.lora
        self.shapes = layout(lora.peft_lora_r, dora=lora.peft_use_dora)
        self.magnitudes = {
            name: np.linspace(0.5, 9, HEIGHT, dtype=np.float32)
            for name in filter(is_magnitude, self.shapes)
        }
        seed = self.config.federation.seed
        self.start = started_adapter(self.shapes, seed, self.magnitudes)
        self.ranks = Ranks.of(self.config)
        self.states = [RecordDict() for _ in range(self.config.data.num_partitions)]
        self.draw = np.random.default_rng(self.seed)
        self.common: dict[str, Any] = {}

    def received(self) -> Iterator[tuple[int, str, int, ReceivedAdapter]]:
        """Yield (site, kind, round, adapter) for every message that a site receives."""
        config, how = self.config, self.config.communication
        sender = Sender(self.ranks, how, self.start, config.federation.seed)
        rule, adapter = make_rule(filled_in(config)), self.start
        yield from self._evaluated(sender, adapter, 0)
        for number in range(1, config.federation.num_server_rounds + 1):
            cohort = cohort_of(config, number)
            parcels = {p: sender.parcel(number, p, adapter, trains=True) for p in cohort}
            rule.begin(number, adapter)
            for p, parcel in parcels.items():
                arrived = self._decoded(p, parcel)
                yield p, "train", number, self.seen(arrived, "train", number)
                begun = self.ranks.start_of(arrived, self.shapes, config.federation.seed, number)
                change = self._change(p, number, begun)
                sent = self._sent(p, number, change)
                rule.add(p, begun, sent, 10 + p)
            adapter = rule.result()
            sender.pruned = rule.ranks()
            sender.settle(parcels, cohort)
            yield from self._evaluated(sender, adapter, number)

    def seen(self, adapter: Adapter, kind: str, number: int) -> ReceivedAdapter:
        """Return an adapter as a site checks it."""
        steps = self.config.arguments.max_steps
        after = after_round(kind, number)
        return ReceivedAdapter(adapter, self.config, self.shapes, after, steps, self.magnitudes)

    def _evaluated(
        self, sender: Sender, adapter: Adapter, number: int
    ) -> Iterator[tuple[int, str, int, ReceivedAdapter]]:
        parcels = {0: sender.parcel(number, 0, adapter, trains=False)}
        arrived = self._decoded(0, parcels[0])
        yield 0, "evaluate", number, self.seen(arrived, "evaluate", number)
        sender.settle(parcels, [0])

    def _decoded(self, site: int, parcel: Parcel) -> Adapter:
        content = messages.content(arrays=parcel.arrays, config=parcel.config)
        state = self.states[site]
        return downlink.receive(content, state, self.config, self.shapes, self.magnitudes)

    def _change(self, site: int, number: int, begun: Adapter) -> dict[str, Any]:
        rate = round_learning_rate_of(self.config, number)
        most = rate * adamw_reach(self.config.arguments.max_steps)
        factors = STRATEGIES[self.config.strategy.name].trained(number)
        change = {}
        for name, tensor in begun.items():
            if factor_of(name) not in factors:
                continue
            common = self.common.setdefault(
                f"{name}{tensor.shape}", self.draw.choice([-1.0, 1.0], tensor.shape)
            )
            own = self.draw.uniform(-1, 1, tensor.shape)
            moves = {
                "aligned": lambda common=common, own=own: common * (1 - 0.01 * np.abs(own)),
                "random": lambda own=own: own,
                "steady": lambda common=common, own=own: 0.7 * common + 0.3 * own,
                "sparse": lambda own=own: np.sign(own) * np.abs(own) ** 12,
            }[self.mood]()
            change[name] = (most * moves).astype(np.float32)
        if self.ranks.site_ranks or self.ranks.strategy.stacks:
            return change
        return {name: change[name] for name in self.shapes if name in change}

    def _sent(self, site: int, number: int, change: Adapter) -> Adapter:
        how, memory = self.config.communication, None
        if STRATEGIES[self.config.strategy.name].error_feedback:
            memory = uplink.ErrorMemory(self.states[site], number - 1, number)
            cursors = self.states[site].config_records.get("grandrounds-memory-cursors")
            if cursors is not None:  # the site's last visit, whichever round it was
                cursors["grandrounds-memory"] = number - 1
        generator = uplink_generator(self.config.federation.seed, number, site)
        arrays = uplink.encode_change(change, how, memory, generator)
        codec = codec_named(how.uplink_codec, how)
        return uplink.decode_change(arrays, codec, shapes_of(change))
