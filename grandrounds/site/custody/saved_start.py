"""The saved adapter from which a run goes on, as a site in custody receives, checks and keeps it.

The operator has approved its hash with the recipe. The first message to the site has the adapter
itself: before training as what is trained, later beside it. From then on the site compares every
adapter of the run with it, as with a drawn one.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from grandrounds.config.keys import Config
from grandrounds.errors import PolicyError
from grandrounds.wire import downlink
from grandrounds.wire.adapter import (
    Adapter,
    Ranks,
    Shapes,
    adapter_sha256,
    count_parameters,
    flatten,
    unflatten,
)

_KEPT = "grandrounds-start"


def start_of(
    content: RecordDict, kept: RecordDict, own: Config, shapes: Shapes, before: Adapter | None
) -> Adapter | None:
    """Return the saved adapter from which a run goes on, kept from now on; None if it is drawn.

    Parameters
    ----------
    content
        What the server sent.
    kept
        What the site keeps of the run.
    shapes
        The whole adapter's tensors at the configured rank.
    before
        The adapter of the message, if it has not been trained in this run yet.

    Raises
    ------
    PolicyError
        If the adapter does not come with the message, or does not have the recipe's hash.
    ReplyError
        If it cannot be decoded.
    """
    if not own.lora.is_continued:
        return None
    sha256 = own.lora.from_adapter_sha256
    known = _kept(kept, Ranks.of(own).configured(shapes))
    told = before if before is not None else downlink.received_start(content, own, shapes)
    if told is not None and (found := adapter_sha256(told)) != sha256:
        raise PolicyError(
            f"The run goes on from the saved adapter with the SHA-256 {sha256}, and the server "
            f"sent one with {found}."
        )
    if told is None and known is None:
        raise PolicyError(
            f"The run goes on from the saved adapter with the SHA-256 {sha256}, which the server "
            "has not sent to this site: nothing that was trained since can be compared with it."
        )
    if known is None and told is not None:
        kept[_KEPT] = ArrayRecord({"adapter": Array(flatten(told))})
    return known or told


def _kept(kept: RecordDict, shapes: Shapes) -> Adapter | None:
    record = kept.array_records.get(_KEPT)
    if record is None:
        return None
    vector = record["adapter"].numpy()
    if vector.shape != (count_parameters(shapes),):
        return None
    return unflatten(np.asarray(vector, dtype=np.float32), shapes)
