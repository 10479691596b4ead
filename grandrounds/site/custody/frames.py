"""A message on its way between a ClientApp and the site's agent: Flower's own protobuf, bounded.

    request   b"GRQ1", two lengths of 4 bytes (big-endian), then Flower's Context and its Message
    answer    b"GRA1", one length of 4 bytes, then Flower's Message
    refusal   b"GRR1", one length of 4 bytes, then in UTF-8 why the request was not read

Lengths are compared with the limit before anything more is read. Nothing is unpickled, and no
array is made from what a message claims of itself: `messages.from_arrays` and `codecs` compare
first. The context's state does not travel: what a site remembers is the agent's.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from google.protobuf.message import DecodeError

from grandrounds.config.values import Scalar
from grandrounds.errors import ReplyError

REQUEST, ANSWER, REFUSAL = b"GRQ1", b"GRA1", b"GRR1"
CONTEXT_BYTES = 1 << 20
"""Most bytes of a context: a run's configuration has about 4 KiB."""

MOST_REASON_BYTES = 4096
"""Of a refusal."""

MOST_RECORDS = 16
"""More records than any message of a run has."""


class ClosedError(Exception):
    """The other end closed the connection in the middle of a message."""


def pack_request(message: Message, context: Context) -> bytes:
    """Return a message and the context that it came with, without its state."""
    bare = Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config={},
        state=RecordDict(),
        run_config=dict(context.run_config),
    )
    packed: list[bytes] = [
        proto.SerializeToString() for proto in (context_to_proto(bare), message_to_proto(message))
    ]
    return REQUEST + struct.pack(">II", *map(len, packed)) + b"".join(packed)


def pack_answer(reply: Message) -> bytes:
    """Return an answer."""
    body: bytes = message_to_proto(reply).SerializeToString()
    return ANSWER + struct.pack(">I", len(body)) + body


def refuse(connection: socket.socket, reason: str) -> None:
    """Send why a request was not read, and take in what is still sent, so that it is heard."""
    body = reason.encode()[:MOST_REASON_BYTES]
    connection.sendall(REFUSAL + struct.pack(">I", len(body)) + body)
    socket.socket.shutdown(connection, socket.SHUT_WR)
    while connection.recv(1 << 16):
        pass


def read_request(connection: socket.socket, most_bytes: int) -> tuple[Message, Context]:
    """Read a request.

    Parameters
    ----------
    most_bytes : int
        Most bytes of its message.

    Raises
    ------
    ReplyError
        If it is no request, is longer than allowed, or cannot be what a run sends.
    ClosedError
        If the other end closed before it was whole.
    """
    header = _exactly(connection, 12)
    if header[:4] != REQUEST:
        raise ReplyError("this is no request of grandrounds")
    context_bytes, message_bytes = struct.unpack(">II", header[4:])
    if context_bytes > CONTEXT_BYTES or message_bytes > most_bytes:
        raise ReplyError(
            f"a context of {context_bytes} and a message of {message_bytes} bytes, where at most "
            f"{CONTEXT_BYTES} and {most_bytes} are allowed (agent.max-message-mib)"
        )
    context_body = _exactly(connection, context_bytes)
    message_body = _exactly(connection, message_bytes)
    try:
        context = context_from_proto(ProtoContext.FromString(context_body))
        message = _message(message_body)
    except ReplyError:
        raise
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReplyError(f"the request is damaged ({type(error).__name__}: {error})") from error
    _check_config(context.run_config)
    return message, context


def read_answer(connection: socket.socket, most_bytes: int) -> Message:
    """Read an answer; raise as `read_request` does, and `ReplyError` with a refusal's reason."""
    header = _exactly(connection, 8)
    (length,) = struct.unpack(">I", header[4:])
    if header[:4] == REFUSAL and length <= MOST_REASON_BYTES:
        reason = _exactly(connection, length).decode(errors="replace")
        raise ReplyError(f"the site's agent did not read the request: {reason}")
    if header[:4] != ANSWER:
        raise ReplyError("this is no answer of a site's agent")
    if length > most_bytes:
        raise ReplyError(f"an answer of {length} bytes, where at most {most_bytes} are allowed")
    body = _exactly(connection, length)
    try:
        return _message(body)
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReplyError(f"the answer is damaged ({type(error).__name__}: {error})") from error


def _message(body: bytes) -> Message:
    """Return a message whose metadata and records are what a run can have sent."""
    proto = ProtoMessage.FromString(body)
    if proto.HasField("content") == proto.HasField("error"):
        raise ReplyError("a message has either content or an error")
    if len(proto.content.items) > MOST_RECORDS:
        raise ReplyError(f"the message has {len(proto.content.items)} records")
    for item in proto.content.items:
        kind = item.WhichOneof("value")
        if kind not in ("config_record", "metric_record", "array_record"):
            raise ReplyError(f"the record {item.key[:40]!r} holds nothing")
        if kind == "array_record":
            continue
        for entry in getattr(item, kind).items:
            value = entry.value.WhichOneof("value")
            if value is None or value == "bytes" or value.endswith("list"):
                raise ReplyError(f"{entry.key[:40]!r} is no single value")
    return message_from_proto(proto)


def _check_config(config: Mapping[str, Scalar]) -> None:
    for key, value in config.items():
        if not isinstance(value, bool | int | float | str):
            raise ReplyError(f"{key[:40]!r} of the run's configuration is no single value")


def _exactly(connection: socket.socket, count: int) -> bytes:
    """Read so many bytes; memory grows with what has come, not with what was announced."""
    parts = bytearray()
    while len(parts) < count:
        block = connection.recv(min(1 << 16, count - len(parts)))
        if not block:
            raise ClosedError
        parts += block
    return bytes(parts)
