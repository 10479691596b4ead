"""Messages between a ClientApp and the site's agent: Flower's protobuf, with size limits.

    request   b"GRQ1", two lengths of 4 bytes (big-endian), then Flower's Context and its Message
    answer    b"GRA1", one length of 4 bytes, then Flower's Message
    refusal   b"GRR1", one length of 4 bytes, then the reason for the refusal in UTF-8

Lengths are compared with the limits before the rest is read. Nothing is unpickled, and no array is
allocated from a message's own claims: `messages.from_arrays` and `codecs` check them first. The
context's state is not sent, because the agent keeps the site's state.
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
"""Maximum size of a context; a run's configuration takes about 4 KiB."""

MOST_REASON_BYTES = 4096
"""Maximum size of a refusal's reason."""

HEADER_BYTES = 12
"""Size of the header of a request."""

MOST_RECORDS = 16
"""Maximum number of records; no message of a run has as many."""


class ClosedError(Exception):
    """The other end closed the connection in the middle of a message."""


def pack_request(message: Message, context: Context) -> bytes:
    """Pack a message and its context, without the context's state."""
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
    """Pack an answer."""
    body: bytes = message_to_proto(reply).SerializeToString()
    return ANSWER + struct.pack(">I", len(body)) + body


def refusal(reason: str) -> bytes:
    """Pack the reason for a refusal."""
    body = reason.encode()[:MOST_REASON_BYTES]
    return REFUSAL + struct.pack(">I", len(body)) + body


def lengths_of(header: bytes, most_bytes: int) -> tuple[int, int]:
    """Return the lengths in bytes of a request's context and message, from its header.

    Parameters
    ----------
    most_bytes : int
        Maximum size of the message.

    Raises
    ------
    ReplyError
        If it is not a request, or is too large.
    """
    if len(header) != HEADER_BYTES or header[:4] != REQUEST:
        raise ReplyError("this is not a request of grandrounds")
    context_bytes, message_bytes = struct.unpack(">II", header[4:])
    if context_bytes > CONTEXT_BYTES or message_bytes > most_bytes:
        raise ReplyError(
            f"the context has {context_bytes} bytes and the message {message_bytes}; at most "
            f"{CONTEXT_BYTES} and {most_bytes} are allowed (agent.max-message-mib)"
        )
    return context_bytes, message_bytes


def unpack_request(context_body: bytes, message_body: bytes) -> tuple[Message, Context]:
    """Return message and context of a request; raise `ReplyError` if no run can have sent them."""
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
    """Read an answer.

    Raises
    ------
    ReplyError
        With the reason of a refusal, or if it is not an answer, too large or damaged.
    ClosedError
        If the other end closed the connection before the end.
    """
    header = _exactly(connection, 8)
    (length,) = struct.unpack(">I", header[4:])
    if header[:4] == REFUSAL and length <= MOST_REASON_BYTES:
        reason = _exactly(connection, length).decode(errors="replace")
        raise ReplyError(f"the site's agent refused the request: {reason}")
    if header[:4] != ANSWER:
        raise ReplyError("this is not an answer of a site's agent")
    if length > most_bytes:
        raise ReplyError(f"the answer has {length} bytes; at most {most_bytes} are allowed")
    body = _exactly(connection, length)
    try:
        return _message(body)
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReplyError(f"the answer is damaged ({type(error).__name__}: {error})") from error


def _message(body: bytes) -> Message:
    """Parse a message, and check that a run can have sent its metadata and records."""
    proto = ProtoMessage.FromString(body)
    if proto.HasField("content") == proto.HasField("error"):
        raise ReplyError("a message must have either content or an error")
    if len(proto.content.items) > MOST_RECORDS:
        raise ReplyError(
            f"the message has {len(proto.content.items)} records, more than {MOST_RECORDS}"
        )
    for item in proto.content.items:
        kind = item.WhichOneof("value")
        if kind not in ("config_record", "metric_record", "array_record"):
            raise ReplyError(f"the record {item.key[:40]!r} is empty")
        if kind == "array_record":
            continue
        for entry in getattr(item, kind).items:
            value = entry.value.WhichOneof("value")
            if value is None or value == "bytes" or value.endswith("list"):
                raise ReplyError(f"{entry.key[:40]!r} is not a single value")
    return message_from_proto(proto)


def _check_config(config: Mapping[str, Scalar]) -> None:
    for key, value in config.items():
        if not isinstance(value, bool | int | float | str):
            raise ReplyError(f"{key[:40]!r} of the run's configuration is not a single value")


def _exactly(connection: socket.socket, count: int) -> bytes:
    """Read exactly `count` bytes; memory grows with the bytes received, not announced."""
    parts = bytearray()
    while len(parts) < count:
        block = connection.recv(min(1 << 16, count - len(parts)))
        if not block:
            raise ClosedError
        parts += block
    return bytes(parts)
