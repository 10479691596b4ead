"""The same request again gets the reply that it got before, byte for byte.

So a resumed run ends with the bits of one that was not interrupted, no example is used up twice,
and asking again tells nothing new. A request is the same if run, kind, round, tensors and
instruction are; another run, or a round played again from another adapter, is a new request.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from grandrounds.config.keys import Config
from grandrounds.errors import ConfigError
from grandrounds.site.custody import budget, kept_runs, order
from grandrounds.site.custody.kept_runs import new_file, read_kept
from grandrounds.site.custody.request import Request
from grandrounds.site.custody.state import REPLIES, STATES, SiteState
from grandrounds.wire.masks.attempt import MASKS
from grandrounds.wire.masks.carried import ATTEMPT
from grandrounds.wire.messages import START

ROUNDS_KEPT = 2
"""Rounds of a run whose replies are kept: the last, and the one before it."""

_VERSION = "version"
"""Number of the server's message. It counts anew after a resume, and matters only where the next
message builds on this one (`communication.downlink = "incremental"`)."""


def digest_of(request: Request, config: Config, *, of_change: bool = False) -> str:
    """Return the SHA-256 of what a reply depends on: kind, instruction and tensors.

    Parameters
    ----------
    of_change : bool
        Only what the change of the adapter depends on, which is the same in every attempt at a
        masked sum.
    """
    of_masks = (ATTEMPT, MASKS) if of_change else ()
    found = hashlib.sha256()

    def add(*words: object) -> None:
        for word in words:
            data = word if isinstance(word, bytes) else repr(word).encode()
            found.update(len(data).to_bytes(8) + data)

    add(request.kind)
    for name, value in sorted(request.instruction.items()):
        if name in of_masks:
            continue
        if name != _VERSION or config.communication.downlink == "incremental":
            add(name, value)
    for name, record in sorted(request.message.content.array_records.items()):
        if name == START or name in of_masks:  # the reply is the same with and without a start
            continue
        for key, array in record.items():
            add(name, key, array.dtype, tuple(array.shape), array.stype, array.data)
    return found.hexdigest()


def may_have(request: Request) -> bool:
    """Whether a reply to such a request may be cached; cheap, and no more than a hint."""
    query = "select count(*) from requests where run = ? and round = ? and kind = ? and file <> ''"
    return request.state.count(query, request.run, request.round, request.kind) > 0


def cached(request: Request, digest: str) -> Message | None:
    """Return the reply that this request got before; None if there is none.

    A reply whose file is gone or damaged counts as none.
    """
    row = request.state.table.execute(
        "select file from requests where run = ? and digest = ?", (request.run, digest)
    ).fetchone()
    if row is None or not row[0]:
        return None
    try:
        return Message(read_kept(request.state, row[0]), reply_to=request.message)
    except ConfigError:
        return None


def reserve(request: Request, digest: str, num_examples: int, count: int) -> order.Position:
    """Return the position at which a visit's examples start, and move the site's beyond them.

    Called within a transaction that ends before the visit begins. The same request again, after a
    crash, starts at the same position; so its reply is the same.
    """
    table, now = request.state.table, request.state.now()
    row = table.execute(
        "select epoch, place from requests where run = ? and digest = ?", (request.run, digest)
    ).fetchone()
    if row is not None:
        return int(row[0]), int(row[1])
    row = table.execute("select epoch, place from position").fetchone()
    # A lost table must not bring back the orders of before.
    start = (int(row[0]), int(row[1])) if row else (secrets.randbelow(2**40), 0)
    secret = order.secret_of(request.state.folder)
    _, after = order.next_examples(secret, start, num_examples, count)
    table.execute("insert or replace into position values (1, ?, ?)", after)
    table.execute(
        "insert into requests (run, digest, round, kind, at, epoch, place) "
        "values (?, ?, ?, ?, ?, ?, ?)",
        (request.run, digest, request.round, request.kind, now, *start),
    )
    return start


@dataclass(frozen=True)
class Answered:
    """A visit that was answered."""

    digest: str
    """Of its request."""
    kept: RecordDict | None
    """What the site keeps of the run from now on; None: the same as before."""
    reply: Message
    """What the server gets."""
    is_charged: bool = True
    """Whether a private visit was charged for it."""


def keep(request: Request, answered: Answered) -> None:
    """Keep the state of a run after a visit and the visit's reply: both, or neither.

    Raises
    ------
    ConfigError
        If the state folder cannot be written; the request can be made again.
    """
    state, run, now = request.state, request.run, request.state.now()
    kept = answered.kept and new_file(state, STATES, run, answered.kept)
    reply, reply_bytes = new_file(state, REPLIES, run, answered.reply.content)
    with state.lasting() as table:
        gone = kept_runs.name_state(table, run, *kept) if kept else []
        table.execute(
            "insert into requests (run, digest, round, kind, at, epoch, place, file, bytes) "
            "values (?, ?, ?, ?, ?, 0, 0, ?, ?) on conflict (run, digest) "
            "do update set file = excluded.file, bytes = excluded.bytes, at = excluded.at",
            (run, answered.digest, request.round, request.kind, now, reply, reply_bytes),
        )
        if request.mechanism and answered.is_charged:
            budget.answered(table, run, answered.digest)
        old = table.execute(
            "select file from requests where run = ? and round <= ?",
            (run, request.round - ROUNDS_KEPT),
        ).fetchall()
        table.execute(
            "delete from requests where run = ? and round <= ?", (run, request.round - ROUNDS_KEPT)
        )
        gone += [row[0] for row in old]
        gone += _over(state, answered.digest)
    state.discard(gone)
    if request.mechanism:
        state.erase()  # the key of the visit's coins


def _over(state: SiteState, newest: str) -> list[str]:
    """Delete the oldest replies as long as states and replies exceed their bound."""
    size = state.count("select sum(bytes) from kept_runs")
    size += state.count("select sum(bytes) from requests")
    gone = []
    for file, digest, run, held in state.table.execute(
        "select file, digest, run, bytes from requests where file <> '' order by at"
    ).fetchall():
        if size <= kept_runs.MOST_BYTES:
            break
        if digest != newest:
            state.table.execute("delete from requests where run = ? and digest = ?", (run, digest))
            size -= held
            gone.append(file)
    return gone
