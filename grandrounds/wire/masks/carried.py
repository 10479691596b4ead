"""The bytes of the exchanges in Flower's messages, and the hash of what a site has received."""

from __future__ import annotations

import hashlib

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from grandrounds.errors import ReplyError
from grandrounds.wire import messages
from grandrounds.wire.masks.attempt import MOST_SITES
from grandrounds.wire.masks.packed import SIGNED_KEYS_BYTES, table_bytes

ATTEMPT, MOST_WEIGHT = "attempt", "most-weight"
"""Config keys: number of the attempt, and the largest weight of a site."""

RECIPE = "recipe"
"""Config key: hash of the run's recipe (`config.digest`), so that every site of a sum trains by the
same one."""

NOT_BOUND = ("cursor", messages.THREADS, messages.CPU_MATMUL, "version")
"""Parts of an instruction that differ from site to site, and the number of the server's message,
which counts anew after a resume."""

NEXT = "next"
"""Config key of a message that the next round's part rides on, with the number of its attempt;
record of that part's bytes, both ways; and config key of a reply, why that part was refused."""

MOST_BYTES = table_bytes(SIGNED_KEYS_BYTES, MOST_SITES)
"""The longest request or reply that is no masked vector: a list of keys."""


def sent(exchange: str, data: bytes) -> ArrayRecord:
    """Return bytes as the one array of a record."""
    return messages.to_payload(exchange, np.frombuffer(data, dtype=np.uint8))


def carried(
    content: RecordDict, exchange: str, most_bytes: int = MOST_BYTES, record: str = messages.ARRAYS
) -> bytes:
    """Return the bytes of an untrusted message; raise `ReplyError` if they are none or too many."""
    if record not in content.array_records:
        raise ReplyError(f"the message of the exchange {exchange!r} has no array")
    return messages.from_payload(content.array_records[record], exchange, most_bytes).tobytes()


def received_digest(content: RecordDict) -> bytes:
    """Return the SHA-256 of the adapter and the instruction, the same at server and sites.

    Every part is preceded by its length; what differs all the same (`NOT_BOUND`) is left out.
    """
    found = hashlib.sha256()

    def add(*words: object) -> None:
        for word in words:
            data = word if isinstance(word, bytes) else repr(word).encode()
            found.update(len(data).to_bytes(8) + data)

    for name, value in sorted(messages.instruction_of(content).items()):
        if name not in NOT_BOUND:
            add("instruction", name, value)
    arrays = content.array_records.get(messages.ARRAYS) or ArrayRecord()
    for name, array in arrays.items():
        add("array", name, array.dtype, tuple(array.shape), array.stype, array.data)
    return found.digest()
