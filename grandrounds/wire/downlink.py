"""The downlink: how the server sends a site the adapter, and how the site decodes it.

With `downlink-codec = none` a message holds the adapter's float32 tensors. Otherwise it holds an
encoded difference to a reference that both ends know:

    complete      the initial adapter, which every site draws from the seed; for `float32`, which
                  is lossless, zeros
    incremental   what this site received last; the server keeps it for every site, so that the next
                  difference includes what the codec lost (the error memory of the downlink)

Strategies that recompute the factors in every round (`product`, `flora`) send the adapter itself.
While the adapter equals what both ends draw from the seed, an encoded message holds no tensors.

DoRA's magnitudes start as the norms of the base's weights, which each site computes from its own
copy. A message names the hash of the run's start, and a site with another refuses it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from grandrounds.config.keys import CommunicationConfig, Config
from grandrounds.errors import ReplyError
from grandrounds.wire import codecs, messages
from grandrounds.wire.adapter import (
    Adapter,
    Ranks,
    Shapes,
    adapter_sha256,
    count_parameters,
    flatten,
    magnitudes_of,
    of_factors,
    shapes_of,
    started_adapter,
    unflatten,
)
from grandrounds.wire.codecs.codec import codec_named
from grandrounds.wire.codecs.finite import all_finite
from grandrounds.wire.low_rank import cut, truncate
from grandrounds.wire.schedule import downlink_generator

_HELD = "grandrounds-held"
_VERSION = "version"
_MAGNITUDES = "magnitudes"

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Parcel:
    """One message to a site, not yet addressed to a node."""

    arrays: ArrayRecord | None
    """Tensors, or one array of bytes; None if the site needs nothing."""
    config: Mapping[str, int | str]
    """`codec`, `rank`, with DoRA `magnitudes`, and for a difference `holds` and `version`."""
    received: Adapter
    """The tensors that the site holds afterwards, as it decodes them."""
    start: ArrayRecord | None = None
    """The saved adapter from which the run goes on, if the site gets it beside a trained one."""


@dataclass
class Sender:
    """The server's end of the downlink."""

    ranks: Ranks
    """Which tensors each site receives, and at which rank."""
    how: CommunicationConfig
    start: Adapter
    """The initial adapter: the sites draw its factors, and compute its magnitudes."""
    seed: int
    """The run's seed."""
    pruned: Mapping[int, int] = field(default_factory=dict)
    """Partition → the rank that a site has pruned itself to."""
    _held: dict[int, tuple[int, Vector]] = field(default_factory=dict)
    """Partition → version and values of what it holds (`incremental`)."""
    _shared: dict[tuple[int, int, int], Parcel] = field(default_factory=dict)
    """Complete messages of the current adapter, by round, purpose and rank."""
    _adapter: Adapter | None = None
    """The adapter of those messages."""
    _version: int = 0

    def __post_init__(self) -> None:
        magnitudes, self._started_with = magnitudes_of(self.start), dict[str, int | str]()
        if magnitudes and not self.ranks.continued:  # whose start the site has by its hash
            self._started_with[_MAGNITUDES] = adapter_sha256(magnitudes)

    def parcel(self, round_number: int, partition: int, adapter: Adapter, trains: bool) -> Parcel:
        """Return the message that gives a site the adapter.

        Parameters
        ----------
        trains : bool
            Whether the site trains, at its own rank; otherwise it evaluates the whole adapter.
        """
        own = self.ranks.of_adapter(adapter)
        rank = self.ranks.carried(partition, own) if trains else own
        if trains:
            rank = min(rank, self.pruned.get(partition, rank))
        if self.how.downlink == "incremental":
            sent = self._sent(adapter, rank)
            held = self._held.get(partition)
            reference, holds = (held[1], held[0]) if held else (self._reference(sent), 0)
            codec = self.how.downlink_codec if held else self.how.catch_up_codec
            return self._encoded(sent, reference, codec, holds, (round_number, trains, partition))
        if self._adapter is not adapter:
            self._adapter, self._shared = adapter, {}
        key = (round_number, trains, rank)
        if key not in self._shared:
            sent = self._sent(adapter, rank)
            self._shared[key] = (
                self.exact(sent)
                if self.how.downlink_codec == "none"
                else self._encoded(sent, self._reference(sent), self.how.downlink_codec, 0, key)
            )
        return self._shared[key]

    def exact(self, adapter: Adapter) -> Parcel:
        """Return the message that gives a site the exact adapter, in float32."""
        rank = self.ranks.of_adapter(adapter)
        sent = self._sent(adapter, rank)
        if self.how.downlink_codec == "float32":
            return self._encoded(sent, None, "float32", 0, (0, 0, 0))
        config: dict[str, int | str] = {"codec": "none", "rank": rank, **self._started_with}
        return Parcel(messages.to_arrays(sent), config, sent)

    def settle(self, parcels: Mapping[int, Parcel], good: Collection[int]) -> None:
        """Record which sites replied well, and so hold what they were sent.

        The others are assumed to hold nothing: their message may not have arrived.
        """
        for partition, parcel in parcels.items():
            if partition not in good:
                self._held.pop(partition, None)
            elif self.how.downlink == "incremental":
                version = int(parcel.config[_VERSION])
                self._held[partition] = (version, flatten(parcel.received))

    def _sent(self, adapter: Adapter, rank: int) -> Adapter:
        """Return the tensors that travel, at a site's rank."""
        if rank != self.ranks.of_adapter(adapter):
            adapter = (cut if self.ranks.strategy.cuts else truncate)(adapter, rank)
        # in the order of the initial adapter, which the sites use too
        return {n: adapter[n] for n in of_factors(shapes_of(self.start), self.ranks.strategy.sends)}

    def _reference(self, sent: Adapter) -> Vector | None:
        """Return the reference of a complete difference; None if the adapter itself travels."""
        if not self.ranks.strategy.error_feedback or self.how.downlink_codec == "float32":
            return None
        return flatten({name: self.start[name] for name in sent})

    def _encoded(
        self,
        sent: Adapter,
        reference: Vector | None,
        codec_name: str,
        holds: int,
        numbers: tuple[int, int, int],
    ) -> Parcel:
        """Encode tensors as a difference; `numbers` seed the stochastic rounding."""
        self._version += 1
        shapes = shapes_of(sent)
        config: dict[str, int | str] = {"codec": codec_name, "rank": self.ranks.of_adapter(sent)}
        config |= {"holds": holds, _VERSION: self._version, **self._started_with}
        vector = flatten(sent)
        if reference is not None:
            vector = vector - reference
            if not vector.any():
                return Parcel(None, config, unflatten(reference, shapes))
        codec = codec_named(codec_name, self.how)
        payload = codecs.encode(codec, vector, downlink_generator(self.seed, *numbers))
        decoded = codecs.decode(codec, payload, vector.size)
        if reference is not None:
            decoded = reference + decoded
        arrays = messages.to_payload(codec_name, payload)
        return Parcel(arrays, config, unflatten(decoded, shapes))


def received_start(content: RecordDict, config: Config, shapes: Shapes) -> Adapter | None:
    """Return the saved adapter that comes beside a trained one; None if none does.

    Raises
    ------
    ReplyError
        If it is not a float32 adapter of these shapes.
    """
    record = content.array_records.get(messages.START)
    if record is None:
        return None
    expected = Ranks.of(config).configured(shapes)
    if config.communication.downlink_codec == "none":
        return messages.from_arrays(record, expected)
    codec, count = codec_named("float32", config.communication), count_parameters(expected)
    payload = messages.from_payload(record, "float32", codecs.encoded_bytes(codec, count))
    return unflatten(codecs.decode(codec, payload, count), expected)


def receive(
    content: RecordDict,
    state: RecordDict,
    config: Config,
    shapes: Shapes,
    magnitudes: Adapter | None = None,
) -> Adapter:
    """Check and decode a message; return the tensors that the site holds afterwards.

    Parameters
    ----------
    content
        What the server sent.
    state
        What the site keeps between messages.
    shapes
        The whole adapter's tensors at the configured rank.
    magnitudes
        With DoRA, where its magnitudes start on the site's base.

    Raises
    ------
    ReplyError
        If the run's configuration does not allow the message, or it builds on something that the
        site does not hold, or on other magnitudes than those of its base.
    """
    instruction = content.config_records.get(messages.CONFIG) or ConfigRecord()
    magnitudes = magnitudes or {}
    ranks, how = Ranks.of(config), config.communication
    if not ranks.continued:
        _check_start(instruction, magnitudes)
    name = str(instruction.get("codec"))
    allowed = {"none", how.downlink_codec}
    if how.downlink == "incremental":
        allowed.add(how.catch_up_codec)
    if name not in allowed:
        raise ReplyError(f"the server sent codec {name!r}; this run allows {sorted(allowed)}")
    rank = messages.whole_number(instruction, "rank", 1, ranks.highest_sent)
    expected = ranks.shapes_down(shapes, rank)
    record = content.array_records.get(messages.ARRAYS)
    if name == "none":
        if record is None:
            raise ReplyError("the server sent no tensors")
        return messages.from_arrays(record, expected)
    count = count_parameters(expected)
    holds = messages.whole_number(instruction, "holds")
    version = messages.whole_number(instruction, _VERSION, 1)
    if holds:
        vector = _held_by(state, holds, count)
    elif ranks.strategy.error_feedback and name != "float32":
        start = started_adapter(shapes, config.federation.seed, magnitudes)
        vector = flatten({name: start[name] for name in expected})
    else:  # the adapter itself travels
        vector = np.zeros(count, dtype=np.float32)
    if record is not None:
        codec = codec_named(name, how)
        payload = messages.from_payload(record, name, codecs.encoded_bytes(codec, count))
        vector = vector + codecs.decode(codec, payload, count)
        if not all_finite(vector):
            raise ReplyError("the difference sent by the server makes the adapter non-finite")
    if how.downlink == "incremental":
        state[_HELD] = ArrayRecord({"adapter": Array(vector)})
        state[f"{_HELD}-{_VERSION}"] = ConfigRecord({_VERSION: version})
    return unflatten(vector, expected)


def _check_start(instruction: ConfigRecord, magnitudes: Adapter) -> None:
    """Raise `ReplyError` unless DoRA's magnitudes start in the run as on this site's base."""
    own = adapter_sha256(magnitudes) if magnitudes else None
    if (told := instruction.get(_MAGNITUDES)) != own:
        raise ReplyError(
            "the norms of this site's base, where DoRA's magnitudes start, have the SHA-256 "
            f"{str(own)[:16]}, and the run started with {str(told)[:16]}: the base's weights, or "
            "the precision of a quantised base, differ from those of the sites that the run took "
            "them from"
        )


def _held_by(state: RecordDict, holds: int, count: int) -> Vector:
    """Return what this site received last, if the server builds on it."""
    record = state.config_records.get(f"{_HELD}-{_VERSION}")
    if record is None or record[_VERSION] != holds:
        has = "nothing" if record is None else f"its message {record[_VERSION]!r}"
        raise ReplyError(
            f"the server builds on its message {holds}, but this site has {has}; it needs a "
            "complete one"
        )
    vector = state.array_records[_HELD]["adapter"].numpy()
    if vector.shape != (count,):
        raise ReplyError(f"this site holds {vector.size} values, but the adapter has {count}")
    return np.asarray(vector, dtype=np.float32)
