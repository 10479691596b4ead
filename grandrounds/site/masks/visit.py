"""The exchanges of a masked sum as visits: Flower's records to bytes and back."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from grandrounds.errors import PolicyError, ReplyError
from grandrounds.site.masks.end import SiteEnd
from grandrounds.site.masks.held import RehearsalStore
from grandrounds.site.visit import MOST_ROUNDS, Visit
from grandrounds.wire import messages
from grandrounds.wire.adapter import Adapter, flatten
from grandrounds.wire.masks.attempt import (
    CONFIRM,
    KEYS,
    LEAST_COHORT,
    MASKED,
    MASKS,
    MOST_ATTEMPTS,
    RIDES,
    SHARES,
    UNMASK,
    Attempt,
)
from grandrounds.wire.masks.carried import (
    ATTEMPT,
    MOST_WEIGHT,
    NEXT,
    carried,
    received_digest,
    sent,
)
from grandrounds.wire.masks.fixed_point import COUNT_BITS, numbers_of
from grandrounds.wire.masks.rehearsal import identity_of, roster_of_run

CHANGE = "grandrounds-change"
"""Record of what a site keeps of a run: the change that it has masked last, as one vector."""


def check_kind(visit: Visit, *, masked: bool) -> None:
    """Raise `PolicyError` if a visit's kind is not that of its run: masks are not optional."""
    if visit.config.is_masked != masked:
        how = "masked" if visit.config.is_masked else "plain"
        raise PolicyError(
            f"This run's updates are {how} (secure-aggregation = "
            f"{visit.config.federation.secure_aggregation!r}), and the server asked for another "
            "kind."
        )


def answer(visit: Visit, exchange: str) -> RecordDict:
    """Answer one of the four exchanges that need neither base nor data."""
    end, attempt = _end_of(visit)
    reply = messages.content(arrays=sent(exchange, _said(end, attempt, exchange, visit.content)))
    if exchange in RIDES and NEXT in visit.instruction:
        reply.update(_next_part(visit, end, attempt, RIDES[exchange]))
    return reply


def _said(
    end: SiteEnd,
    attempt: Attempt,
    exchange: str,
    content: RecordDict,
    record: str = messages.ARRAYS,
) -> bytes:
    """Return the answer to one exchange, whose request is in one record of a message."""
    if exchange == KEYS:
        return end.keys(attempt)
    request = carried(content, exchange, record=record)
    answers = {SHARES: end.shares, CONFIRM: end.confirm, UNMASK: end.unmask}
    return answers[exchange](attempt, request)


def _next_part(visit: Visit, end: SiteEnd, attempt: Attempt, exchange: str) -> RecordDict:
    """Return the part of a reply that is about the next round, answered as if it were alone.

    This round's part has been answered, and a refusal of the next one does not take it back: the
    server is told why, and begins the next round without it.
    """
    try:
        number = messages.whole_number(visit.instruction, NEXT, 0, MOST_ATTEMPTS - 1)
        following = end.attempt(attempt.run, attempt.round + 1, number)
        part = _said(end, following, exchange, visit.content, NEXT)
    except (PolicyError, ReplyError) as error:
        return messages.content(config={NEXT: str(error)})
    return RecordDict({NEXT: sent(exchange, part)})


def check_boxes(visit: Visit) -> None:
    """Check what came with a request to train, before the site trains.

    Raises
    ------
    ReplyError, PolicyError
        If the boxes of the other sites do not open, the exchange was answered for another
        request, or the instruction does not say the largest weight.
    """
    check_kind(visit, masked=True)
    _most_weight(visit)
    end, attempt = _end_of(visit)
    end.received(attempt, _boxes(visit), received_digest(visit.content))


def masked(visit: Visit, change: Adapter) -> RecordDict:
    """Return the reply to a request to train: the change in fixed point, under its masks.

    The weight is the number of training examples, or of declared units, and travels in the mask.
    """
    end, attempt = _end_of(visit)
    most = _most_weight(visit)
    weight = visit.weight or len(visit.site.train)
    if visit.mechanism:
        weight = visit.mechanism.declared_units
    values = flatten(change)
    if visit.end:  # another attempt masks the same change, for which nobody trains again
        visit.state[CHANGE] = ArrayRecord({CHANGE: Array(values)})
    numbers = numbers_of(visit.config, visit.rate, end.cohort(attempt), len(values), most)
    vector = numbers.encode(values, weight)
    reply = end.masked(attempt, _boxes(visit), received_digest(visit.content), vector)
    return messages.content(
        arrays=messages.to_payload(MASKED, np.frombuffer(reply, dtype=np.uint8))
    )


def _most_weight(visit: Visit) -> int:
    """Return the largest weight of a site; raise `ReplyError` if the message says none."""
    return messages.whole_number(visit.instruction, MOST_WEIGHT, 1, 2**COUNT_BITS - 1)


def _boxes(visit: Visit) -> bytes:
    return carried(visit.content, MASKED, record=MASKS)


def _end_of(visit: Visit) -> tuple[SiteEnd, Attempt]:
    """Return the site's end, its own or that of a rehearsal, and what attempt a message is of."""
    check_kind(visit, masked=True)
    end = visit.end or _in_a_rehearsal(visit)
    return end, attempt_of(end, visit.instruction)


def attempt_of(end: SiteEnd, instruction: ConfigRecord) -> Attempt:
    """Return the attempt that a message is about; raise `ReplyError` if it does not say."""
    run = instruction.get(messages.RUN)
    if not isinstance(run, str):
        raise ReplyError(f"run is {run!r}, not a key")
    round_number = messages.whole_number(instruction, "round", 1, MOST_ROUNDS)
    number = messages.whole_number(instruction, ATTEMPT, 0, MOST_ATTEMPTS - 1)
    return end.attempt(run, round_number, number)


def _in_a_rehearsal(visit: Visit) -> SiteEnd:
    seed, site = visit.config.federation.seed, visit.site.partition_id
    roster = roster_of_run(seed, visit.config.data.num_partitions)
    store = RehearsalStore(visit.state)
    return SiteEnd(site, identity_of(seed, site), roster, LEAST_COHORT, store)
