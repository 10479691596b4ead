"""The codecs by name, with the properties that a configuration is checked against.

How a codec writes a vector is in `grandrounds/wire/codecs/<file>.py`; this table holds only
what can be validated without loading the codec.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodecKind:
    """Properties of a codec."""

    file: str
    """The file in `grandrounds/wire/codecs/` that writes it."""
    exact: bool = False
    """Whether it is lossless."""
    coarse: bool = False
    """Whether it requires error feedback; such codecs encode changes only."""
    scaled: bool = False
    """Whether `communication.block-size` values share a scale."""


CODECS: dict[str, CodecKind] = {
    "none": CodecKind("plain", exact=True),
    "float32": CodecKind("plain", exact=True),
    "bf16": CodecKind("plain"),
    "int8": CodecKind("blocks", scaled=True),
    "int4": CodecKind("blocks", scaled=True),
    "int2": CodecKind("blocks", scaled=True),
    "ternary": CodecKind("ternary", coarse=True, scaled=True),
    "sign": CodecKind("blocks", coarse=True, scaled=True),
    "topk": CodecKind("topk", coarse=True),
}
"""Name → properties."""

EXACT_CODECS = tuple(name for name, kind in CODECS.items() if kind.exact)
COARSE_CODECS = tuple(name for name, kind in CODECS.items() if kind.coarse)
