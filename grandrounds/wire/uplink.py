"""The way up: a site encodes its change and remembers what was lost; the server decodes.

    u = d + e;   send Q(u);   e <- u - Q(u)

d is the change of this visit and e the error memory of the site (error feedback: Seide et al.,
2014; Karimireddy et al., 2019, algorithm 2). Rules that write the factors anew in every round keep
none, because an old error has no place in new factors.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from numpy.typing import NDArray

from grandrounds.config.keys import EXACT_CODECS, Config
from grandrounds.config.strategies import STRATEGIES
from grandrounds.errors import ReplyError
from grandrounds.wire import codecs, messages, protocol
from grandrounds.wire import schedule as sampling
from grandrounds.wire.adapter import Adapter, Shapes
from grandrounds.wire.codecs import Codec, codec_named
from grandrounds.wire.codecs.finite import all_finite

_MEMORY = "grandrounds-memory"
_BEFORE = "grandrounds-memory-before"
_CURSORS = "grandrounds-memory-cursors"

Vector = NDArray[np.float32]


def encode_change(
    change: Adapter,
    config: Config,
    context: Context,
    round_number: int,
    partition_id: int,
    cursor: int,
    cursor_after: int,
) -> ArrayRecord:
    """Return a site's change as it travels, and keep in `context.state` what the codec lost.

    Parameters
    ----------
    cursor, cursor_after : int
        Examples given to the site before and after this visit. They tell which memory belongs to
        it: after a reply that was not used, the cursor goes back, and the memory with it.

    Raises
    ------
    ReplyError
        If the change is not finite: training diverged.
    """
    how = config.communication
    if how.uplink_codec == "none":
        return messages.to_arrays(change)
    codec = codec_named(how.uplink_codec, how)
    loses = how.uplink_codec not in EXACT_CODECS
    keeps = loses and STRATEGIES[config.strategy.name].error_feedback
    vector = protocol.flatten(change)
    shapes = {name: tensor.shape for name, tensor in change.items()}
    memory = _memory_at(context, cursor, shapes) if keeps else {}
    if memory:
        vector = vector + protocol.flatten({name: memory[name] for name in change})
    if not all_finite(vector):
        raise ReplyError(
            "the change is not finite: training diverged. Lower train.learning-rate-max, or set "
            "train.training-arguments.max-grad-norm"
        )
    generator = sampling.uplink_generator(config.federation.seed, round_number, partition_id)
    payload = codecs.encode(codec, vector, generator)
    if keeps:
        lost = vector - codecs.decode(codec, payload, vector.size)
        _remember(context, {**memory, **protocol.unflatten(lost, shapes)}, cursor, cursor_after)
    return messages.to_payload(codec.name, payload)


def decode_change(record: ArrayRecord, codec: Codec, shapes: Shapes) -> Adapter:
    """Return a site's change, checked.

    Raises
    ------
    ReplyError
        If the record is not what the codec makes of tensors with these shapes.
    """
    if codec.name == "none":
        return messages.from_arrays(record, shapes)
    count = protocol.count(shapes)
    payload = messages.from_payload(record, codec.name, codecs.encoded_bytes(codec, count))
    return protocol.unflatten(codecs.decode(codec, payload, count), shapes)


def _memory_at(context: Context, cursor: int, shapes: Shapes) -> dict[str, Vector]:
    """Return the memory after the visit that ended at this cursor; zeros where there is none."""
    zeros = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    cursors = context.state.config_records.get(_CURSORS) or ConfigRecord()
    for place in (_MEMORY, _BEFORE):
        if cursors.get(place) == cursor:
            arrays = context.state.array_records[place]
            return zeros | {name: array.numpy() for name, array in arrays.items()}
    return zeros


def _remember(context: Context, memory: Adapter, cursor: int, cursor_after: int) -> None:
    """Keep the memory after this visit, and the one before it."""
    state = context.state
    cursors = dict(state.config_records.get(_CURSORS) or ConfigRecord())
    if cursors.get(_MEMORY) == cursor:
        state[_BEFORE], cursors[_BEFORE] = state.array_records[_MEMORY], cursor
    state[_MEMORY] = ArrayRecord({name: Array(tensor) for name, tensor in memory.items()})
    cursors[_MEMORY] = cursor_after
    state[_CURSORS] = ConfigRecord(cursors)
