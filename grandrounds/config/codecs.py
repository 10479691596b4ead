"""The codecs by name, and what a configuration must know of them. One line per codec.

How a codec writes a vector is in `grandrounds/wire/codecs/<file>.py`; here stands only what is
checked without loading it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodecKind:
    """What a codec is like."""

    file: str
    """The file in `grandrounds/wire/codecs/` that writes it."""
    exact: bool = False
    """Whether it loses nothing."""
    coarse: bool = False
    """Whether what it loses must be sent later: then only for changes, not for a whole adapter."""
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
"""Name → what it is like."""

EXACT_CODECS = tuple(name for name, kind in CODECS.items() if kind.exact)
COARSE_CODECS = tuple(name for name, kind in CODECS.items() if kind.coarse)
