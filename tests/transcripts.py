"""What leaves a site, to be compared between runs that draw the same coins."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from flwr.app import Message

from grandrounds.server import lifecycle
from grandrounds.wire import messages
from grandrounds.wire.masks import keys, shamir


@dataclass(frozen=True)
class Left:
    """A reply that left a site."""

    told: tuple[Any, ...]
    """All but the content of arrays: kind, sizes, figures, texts."""
    arrays: bytes


def left(message: Message) -> Left:
    """Return what a reply says, without figures of the process that sent it."""
    content = message.content
    figures = {
        name: value
        for record in content.metric_records.values()
        for name, value in record.items()
        if name not in ("base-loads", "process-id")
    }
    texts = {name: dict(record) for name, record in content.config_records.items()}
    arrays = [array for record in content.array_records.values() for array in record.values()]
    return Left(
        (message.metadata.message_type, messages.tensor_sizes(message), figures, texts),
        b"".join(array.data for array in arrays),
    )


def with_same_coins(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Draw keys, shares, signatures and the run's key from a fixed sequence.

    Returns
    -------
    function
        Begins the sequence anew.
    """
    drawn = itertools.count()

    def coins() -> bytes:
        return hashlib.sha512(str(next(drawn)).encode()).digest()

    def signed(own: keys.Identity, text: bytes) -> bytes:
        how = ec.ECDSA(hashes.SHA384(), deterministic_signing=True)
        r, s = decode_dss_signature(own.sign(text, how))
        return r.to_bytes(48) + s.to_bytes(48)

    def begin() -> None:
        nonlocal drawn
        drawn = itertools.count()

    shares = SimpleNamespace(randbelow=lambda most: int.from_bytes(coins()) % most)
    monkeypatch.setattr(keys, "new_secret", lambda: coins()[:32])
    monkeypatch.setattr(keys, "sign", signed)
    monkeypatch.setattr(shamir, "secrets", shares)
    monkeypatch.setattr(lifecycle, "secrets", SimpleNamespace(token_hex=lambda n: "ab" * n))
    return begin
