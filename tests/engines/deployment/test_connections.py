"""Who occupies the agent's socket delays nobody: silent, slow and deaf connections."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from grandrounds.engines.deployment import connections
from grandrounds.site.custody import agent_client
from grandrounds.site.custody import frames as wire
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.wire import messages
from tests.engines.deployment.test_agent import at, context_of, question, serving
from tests.own_sites import make_site
from tests.runs import Settings

ANSWER_BYTES = 2**20
"""More than a socket's buffers hold."""

PROMPT_SECONDS = 5.0
"""What an honest request may take on a loaded machine; it takes 0.05 s on an idle one."""


def large_answer(message: Message, context: Context) -> Message:
    """Answer as a visit does whose adapter is large; no model is loaded."""
    return Message(messages.content(config={"text": "x" * ANSWER_BYTES}), reply_to=message)


@pytest.fixture
def site(tmp_path: Path) -> SiteFile:
    return make_site(tmp_path / "site", {"formulary": ""}, agent__max_message_mib=4)


@contextlib.contextmanager
def answering(site: SiteFile) -> Iterator[list[str]]:
    with serving(site, visits={"query": large_answer}) as said:
        yield said


def connected(site: SiteFile, stack: ExitStack, content: bytes = b"") -> socket.socket:
    """Return a connection that has sent these bytes and does nothing more."""
    connection = stack.enter_context(socket.socket(socket.AF_UNIX))
    connection.connect(str(site.place(site.agent.socket)))
    connection.settimeout(20)
    connection.sendall(content)
    return connection


def is_closed_by_the_agent(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it had sent something that was not read
        return True


def seconds_of_an_honest_request(site: SiteFile, settings: Settings) -> float:
    """Return how long an honest client waits for its answer, and check the answer."""
    context = context_of(settings, {**at(site), "agent-wait-seconds": PROMPT_SECONDS})
    started = time.monotonic()
    reply = agent_client.forward(question(), context)
    seconds = time.monotonic() - started
    assert len(str(reply.content.config_records[messages.CONFIG]["text"])) == ANSWER_BYTES
    return seconds


def test_a_client_that_never_reads_delays_nobody(settings: Settings, site: SiteFile) -> None:
    """The agent sent under the lock of its visits: the next request waited 300 s for its turn."""
    request = wire.pack_request(question(), context_of(settings, {}))
    with answering(site), ExitStack() as stack:
        for _ in range(3):
            connected(site, stack, request)
        time.sleep(0.3)  # their answers are ready, and nobody reads them
        assert seconds_of_an_honest_request(site, settings) < PROMPT_SECONDS


def test_answers_that_nobody_reads_take_no_more_than_their_share_of_memory(
    settings: Settings, site: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_UNSENT", 2)
    request = wire.pack_request(question(), context_of(settings, {}))
    with answering(site), ExitStack() as stack:
        deaf = [connected(site, stack, request)]
        for _ in range(3):
            assert seconds_of_an_honest_request(site, settings) < PROMPT_SECONDS
            deaf.append(connected(site, stack, request))
        time.sleep(0.5)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while block := deaf[0].recv(1 << 20):
                received += block
    assert len(received) < ANSWER_BYTES


@pytest.mark.parametrize("count", [4, 50, 200])
def test_idle_connections_delay_nobody(settings: Settings, site: SiteFile, count: int) -> None:
    """Four of them kept every request waiting for 60 s; 200 are more than the agent holds."""
    with answering(site), ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(ConnectionError):
                connected(site, stack)
        assert seconds_of_an_honest_request(site, settings) < PROMPT_SECONDS


@pytest.mark.parametrize("count", [4, 50])
def test_slow_senders_delay_nobody_and_are_dropped(
    settings: Settings, site: SiteFile, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Four of them kept every request waiting for 60 s, a byte at a time."""
    monkeypatch.setattr(connections, "BLOCK_SECONDS", 0.5)
    header = wire.REQUEST + struct.pack(">II", 1000, 2**20)
    with answering(site), ExitStack() as stack:
        slow = [connected(site, stack, header) for _ in range(count)]
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                for connection in slow:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert seconds_of_an_honest_request(site, settings) < PROMPT_SECONDS
            assert all(map(is_closed_by_the_agent, slow))
        finally:
            stop.set()
            thread.join()


def test_half_sent_requests_give_their_memory_to_one_that_needs_it(
    settings: Settings, site: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold all that there is, and have been silent for a while."""
    monkeypatch.setattr(connections, "SILENT_SECONDS", 0.2)
    message_bytes = 4 * 2**20
    half_sent = wire.REQUEST + struct.pack(">II", 0, message_bytes) + bytes(message_bytes - 1)
    large: dict[str, Any] = {"round": 0, "run": "ab", "more": "x" * 3 * 2**20}
    context = context_of(settings, {**at(site), "agent-wait-seconds": 0})
    with answering(site), ExitStack() as stack:
        for _ in range(connections.MESSAGES_IN_MEMORY):
            connected(site, stack, half_sent)
        started = time.monotonic()
        reply = agent_client.forward(Message(messages.content(config=large), 1, "query"), context)
        assert time.monotonic() - started < PROMPT_SECONDS
    messages.raise_failure(reply)


def test_many_early_ends_are_told_in_one_line(settings: Settings, site: SiteFile) -> None:
    with answering(site) as said:
        for _ in range(30):
            with ExitStack() as stack:
                connected(site, stack, b"GRQ")
        seconds_of_an_honest_request(site, settings)
    assert sum("closed early" in line for line in said) == 1
