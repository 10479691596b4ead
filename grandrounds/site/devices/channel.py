"""What two processes of a visit say to each other: JSON, a line each; tensors go another way."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from grandrounds.data.tokenization import TokenizedExample

_LOOPBACK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Channel:
    """One end of a pair of sockets."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._lines = end, end.makefile("rb")

    def tell(self, **message: Any) -> None:
        """Send a message; raises `OSError` if the other end does not take it."""
        self._end.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def told(self, seconds: float | None = None) -> dict[str, Any]:
        """Return the next message; None: wait as long as it takes.

        Raises
        ------
        EOFError
            If the other process has ended.
        TimeoutError
            If it says nothing for so long. The channel cannot be used afterwards.
        """
        self._end.settimeout(seconds)
        try:
            line = self._lines.readline()
        except ConnectionError as error:
            raise EOFError from error
        if not line.endswith(b"\n"):
            raise EOFError
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Close this end: the other process ends."""
        self._lines.close()
        self._end.close()


def packed(examples: Sequence[TokenizedExample]) -> list[list[Any]]:
    """Return examples as JSON values."""
    return [[e.input_ids, e.prompt_tokens, e.earlier] for e in examples]


def unpacked(values: Sequence[Sequence[Any]]) -> list[TokenizedExample]:
    """Return examples from JSON values."""
    return [
        TokenizedExample(tuple(ids), prompt, tuple((start, stop) for start, stop in earlier))
        for ids, prompt, earlier in values
    ]


@contextmanager
def on_loopback() -> Iterator[None]:
    """Keep the sockets of gloo and NCCL within this machine, and let NCCL's failures be raised.

    Without an interface, gloo listens on the address of the host's name.
    """
    name = next((n for _, n in socket.if_nameindex() if n in ("lo", "lo0")), "lo")
    wanted = {**dict.fromkeys(_LOOPBACK, name), "TORCH_NCCL_BLOCKING_WAIT": "1"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
