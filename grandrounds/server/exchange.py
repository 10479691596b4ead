"""Messages out, replies in, as they arrive."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from grandrounds.errors import EngineError

LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.05, 1.0
"""Between two looks for replies; Flower's engines move messages every 0.1 s."""


def pause(waited_seconds: float) -> float:
    """Return how long to wait before the next look: a twentieth of what was waited already.

    A look is a request for each message that is out, and real sites take minutes.
    """
    return min(max(LEAST_PAUSE_SECONDS, waited_seconds / 20), MOST_PAUSE_SECONDS)


def exchange(
    grid: Grid,
    outgoing: Mapping[int, Message],
    timeout_seconds: float,
    late: set[str] | None = None,
) -> Iterator[tuple[int, Message]]:
    """Send one message per node and yield (node id, reply) as replies arrive.

    Replies are fetched one by one, so that one that waits its turn takes no memory here. Ends when
    all have answered, or after `timeout_seconds` with those who have.

    Parameters
    ----------
    late
        Takes the ids of messages whose replies had not come in time.
    """
    nodes = list(outgoing)
    message_ids = list(grid.push_messages(outgoing.values()))
    if len(message_ids) != len(nodes):
        raise EngineError(
            f"Flower took {len(message_ids)} of {len(nodes)} messages: are they larger than its "
            "server allows? Send less (communication.downlink-codec), or raise its limit."
        )
    # Flower gives no id to a message whose node is gone; nothing will come back from there.
    pending = {i: node for i, node in zip(message_ids, nodes, strict=True) if i}
    started = time.monotonic()
    while pending:
        waiting = len(pending)
        for message_id in list(pending):
            for reply in grid.pull_messages([message_id]):
                yield pending.pop(message_id), reply
        if len(pending) == waiting:
            waited = time.monotonic() - started
            if waited > timeout_seconds:
                (set() if late is None else late).update(pending)
                return
            time.sleep(pause(waited))


def replies_that_came_late(grid: Grid, late: set[str]) -> Iterator[Message]:
    """Yield the replies to earlier messages that are there by now, and wait for them no more."""
    for message_id in sorted(late):
        for reply in grid.pull_messages([message_id]):
            late.discard(message_id)
            yield reply
