"""The uplink: a site encodes its change and remembers what the codec lost; the server decodes.

    u = d + e;   send Q(u);   e <- u - Q(u)

d is the change of this visit and e the error memory of the site (error feedback: Seide et al.,
2014; Karimireddy et al., 2019, algorithm 2). Strategies that recompute the factors in every
round keep none, because an old error means nothing to new factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from grandrounds.config.codecs import CODECS
from grandrounds.config.keys import CommunicationConfig
from grandrounds.errors import ReplyError
from grandrounds.wire import codecs, messages
from grandrounds.wire.adapter import (
    Adapter,
    Shapes,
    count_parameters,
    flatten,
    shapes_of,
    unflatten,
)
from grandrounds.wire.codecs.codec import Codec, codec_named
from grandrounds.wire.codecs.finite import all_finite

_MEMORY = "grandrounds-memory"
_BEFORE = "grandrounds-memory-before"
_CURSORS = "grandrounds-memory-cursors"

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class ErrorMemory:
    """What a codec lost of a site's changes, in the state that Flower keeps for the node.

    When a reply is not used, the site's cursor goes back, and the memory with it. Therefore the
    memory of the previous visit is kept too, and the cursor identifies the one to use.
    """

    state: RecordDict
    """The node's state."""
    cursor: int
    """Examples given to the site before this visit."""
    cursor_after: int
    """Examples given to the site, this visit included."""

    def read(self, shapes: Shapes) -> dict[str, Vector]:
        """Return the memory at the start of this visit; zeros if there is none."""
        zeros = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        cursors = self.state.config_records.get(_CURSORS) or ConfigRecord()
        for place in (_MEMORY, _BEFORE):
            if cursors.get(place) == self.cursor:
                arrays = self.state.array_records[place]
                return zeros | {name: array.numpy() for name, array in arrays.items()}
        return zeros

    def write(self, memory: Adapter) -> None:
        """Keep the memory after this visit, and the one before it."""
        state = self.state
        cursors = dict(state.config_records.get(_CURSORS) or ConfigRecord())
        if cursors.get(_MEMORY) == self.cursor:
            state[_BEFORE], cursors[_BEFORE] = state.array_records[_MEMORY], self.cursor
        state[_MEMORY] = ArrayRecord({name: Array(tensor) for name, tensor in memory.items()})
        cursors[_MEMORY] = self.cursor_after
        state[_CURSORS] = ConfigRecord(cursors)


def encode_change(
    change: Adapter,
    how: CommunicationConfig,
    memory: ErrorMemory | None,
    generator: np.random.Generator,
) -> ArrayRecord:
    """Encode a site's change, and keep what the codec lost.

    Parameters
    ----------
    memory : ErrorMemory or None
        None if the strategy uses no error feedback.
    generator
        Source of stochastic rounding.

    Raises
    ------
    ReplyError
        If the change is not finite: training diverged.
    """
    if how.uplink_codec == "none":
        return messages.to_arrays(change)
    codec = codec_named(how.uplink_codec, how)
    if CODECS[how.uplink_codec].exact:
        memory = None
    vector, shapes = flatten(change), shapes_of(change)
    lost_before = memory.read(shapes) if memory else {}
    if lost_before:
        vector = vector + flatten({name: lost_before[name] for name in change})
    if not all_finite(vector):
        raise ReplyError(
            "the change is not finite: training diverged. Lower train.learning-rate-max, or set "
            "train.training-arguments.max-grad-norm"
        )
    payload = codecs.encode(codec, vector, generator)
    if memory:
        lost = vector - codecs.decode(codec, payload, vector.size)
        memory.write({**lost_before, **unflatten(lost, shapes)})
    return messages.to_payload(codec.name, payload)


def decode_change(record: ArrayRecord, codec: Codec, shapes: Shapes) -> Adapter:
    """Decode and check a site's change.

    Raises
    ------
    ReplyError
        If the record is not a valid encoding of tensors with these shapes.
    """
    if codec.name == "none":
        return messages.from_arrays(record, shapes)
    count = count_parameters(shapes)
    payload = messages.from_payload(record, codec.name, codecs.encoded_bytes(codec, count))
    return unflatten(codecs.decode(codec, payload, count), shapes)
