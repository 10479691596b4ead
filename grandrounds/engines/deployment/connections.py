"""The connections of the site's agent: whole requests in, whole answers out, within limits.

One event loop serves them all. A connection that says nothing, sends slowly or does not read what
it is sent occupies no thread and delays no other; it is closed when its time is up, or earlier if
another one needs its place or its memory.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from grandrounds.errors import first_line
from grandrounds.site.custody import frames as wire

FIRST_SECONDS = 10.0
"""Time limit for the TLS handshake, and again for the header of a request."""

BLOCK_BYTES = 1 << 20
BLOCK_SECONDS = 10.0
"""Time limit for each block of a request, and for its shorter last one."""

READ_SECONDS = 60.0
"""Time limit for receiving a request."""

SEND_SECONDS = 60.0
"""Time limit for sending an answer."""

MOST_CONNECTIONS = 64
"""Connections at a time; beyond, the one that has been silent longest is closed for a new one."""

MOST_UNSENT = 4
"""Answers being sent at a time; beyond, the oldest is dropped: whoever asks reads at once."""

MESSAGES_IN_MEMORY = 3
"""Memory for requests that are read or wait for their turn, in messages of the largest size."""

SILENT_SECONDS = 1.0
"""A request that has not grown for so long gives its memory to one that needs it."""

RETRY_SECONDS = 0.2
"""How long to accept no connection if there is no file descriptor for one."""

QUIET_SECONDS = 10.0
"""At most one line of the log in so many seconds tells of connections that were closed early."""

Told = Callable[[str], None]
Handle = Callable[["Link"], Awaitable[None]]


@dataclass(eq=False)
class Link:
    """One connection to the agent."""

    socket: socket.socket
    reader: asyncio.StreamReader = field(default_factory=lambda: asyncio.StreamReader(BLOCK_BYTES))
    transport: asyncio.Transport | None = None
    task: asyncio.Task[None] = field(init=False)
    writer: asyncio.StreamWriter = field(init=False)
    moved: float = field(default_factory=time.monotonic)
    """When the connection was accepted or last completed a block."""
    held_bytes: int = 0
    """Memory that its request takes."""
    is_receiving: bool = True
    """Whether its request is incomplete."""
    is_answered: bool = False
    """Whether nothing is left to do but to close it."""

    def hang_up(self) -> None:
        """End the connection."""
        self.task.cancel()

    def is_closed(self) -> bool:
        """Whether the peer has closed the connection; not detectable over TLS."""
        if self.socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self.socket, 0)
        return any(event & select.POLLHUP for _, event in poll.poll(0))


class Connections:
    """Accepts connections, and reads and sends within the limits; belongs to one event loop."""

    def __init__(self, most_message_bytes: int, told: Told) -> None:
        self._most_message_bytes = most_message_bytes
        self._most_held_bytes = MESSAGES_IN_MEMORY * most_message_bytes
        self._links: set[Link] = set()
        self._unsent: list[Link] = []
        self._is_closing = False
        self._told = _Seldom(told)

    def listen(
        self, listener: socket.socket, secured: ssl.SSLContext | None, handle: Handle
    ) -> None:
        """Run `handle` for each connection from now on, until `close`."""
        self._listener = listener
        listener.setblocking(False)
        loop = asyncio.get_running_loop()

        def accept() -> None:
            try:
                plain, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of file descriptors: the listener stays readable
                self._told(f"no connection accepted: {first_line(error)}")
                loop.remove_reader(listener)
                loop.call_later(RETRY_SECONDS, begin)
                return
            if len(self._links) >= MOST_CONNECTIONS and not self._drop_most_silent(0.0):
                plain.close()
                return
            link = Link(plain)
            self._links.add(link)
            link.task = loop.create_task(self._run(link, secured, handle))
            link.task.add_done_callback(lambda _: self._release(link))

        def begin() -> None:
            if not self._is_closing:
                loop.add_reader(listener, accept)

        begin()

    async def close(self) -> None:
        """End all connections but those that are being sent an answer; wait for these."""
        self._is_closing = True
        asyncio.get_running_loop().remove_reader(self._listener)
        for link in self._links - set(self._unsent):
            link.hang_up()
        if self._links:
            await asyncio.wait([link.task for link in self._links])

    async def _run(self, link: Link, secured: ssl.SSLContext | None, handle: Handle) -> None:
        """Serve one connection; no failure of it ends the agent."""
        protocol = asyncio.StreamReaderProtocol(link.reader)
        loop = asyncio.get_running_loop()
        try:
            link.transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                link.socket,
                ssl=secured,
                ssl_handshake_timeout=FIRST_SECONDS if secured else None,
            )
            # Drained means sent; TLS would pause for ever with nothing to send if `high` were 0.
            link.transport.set_write_buffer_limits(high=1, low=0)
            link.writer = asyncio.StreamWriter(link.transport, protocol, link.reader, loop)
            await handle(link)
            link.is_answered = True
        except _SilentError:
            pass  # a look whether the agent is there: `grandrounds site status`, another agent
        except TimeoutError:
            self._told("connection closed early: it was too slow")
        except (OSError, EOFError) as error:
            self._told(f"connection closed early: {first_line(error)}")
        except asyncio.CancelledError:
            self._told("connection closed early: another one needed its place, or the agent stops")

    def _release(self, link: Link) -> None:
        """Close a connection whose task has ended, or was cancelled before it began."""
        self._links.discard(link)
        if link in self._unsent:
            self._unsent.remove(link)
        if link.transport is None:
            link.socket.close()
        elif link.is_answered:
            link.transport.close()
        else:
            link.transport.abort()

    # --- Requests ---------------------------------------------------------------------------------

    async def read(self, link: Link) -> tuple[bytes, bytes]:
        """Return context and message of a request, both still packed.

        Raises
        ------
        ReplyError
            If it is not a request, or is too large.
        OSError, EOFError
            If the connection ends or is too slow.
        """
        async with asyncio.timeout(READ_SECONDS):
            async with asyncio.timeout(FIRST_SECONDS):
                try:
                    header = await link.reader.readexactly(wire.HEADER_BYTES)
                except asyncio.IncompleteReadError as error:
                    raise error if error.partial else _SilentError from error
            lengths = wire.lengths_of(header, self._most_message_bytes)
            context, message = [await self._body(link, length) for length in lengths]
        link.is_receiving = False
        return context, message

    async def _body(self, link: Link, length: int) -> bytes:
        """Return the next bytes of a request; memory grows as they come, not as announced."""
        body = bytearray()
        while len(body) < length:
            count = min(BLOCK_BYTES, length - len(body))
            await self._hold(link, count)
            async with asyncio.timeout(BLOCK_SECONDS):
                body += await link.reader.readexactly(count)
            link.moved = time.monotonic()
        return bytes(body)

    async def _hold(self, link: Link, count: int) -> None:
        """Wait for memory; a silent request gives way."""
        while sum(each.held_bytes for each in self._links) + count > self._most_held_bytes:
            self._drop_most_silent(SILENT_SECONDS, but=link)
            await asyncio.sleep(0.02)
        link.held_bytes += count

    def _drop_most_silent(self, seconds: float, but: Link | None = None) -> bool:
        """Close the connection whose request has not grown for longest; return whether one was.

        Parameters
        ----------
        seconds : float
            How long it must have been silent.
        """
        before = time.monotonic() - seconds
        silent = [x for x in self._links if x.is_receiving and x is not but and x.moved <= before]
        if not silent:
            return False
        most_silent = min(silent, key=lambda link: link.moved)
        most_silent.is_receiving = False  # chosen once only
        most_silent.hang_up()
        self._links.discard(most_silent)
        return True

    # --- Answers ----------------------------------------------------------------------------------

    async def send(self, link: Link, content: bytes) -> None:
        """Send an answer.

        Raises
        ------
        OSError
            If the connection ends, or the peer does not read in time.
        """
        link.held_bytes = 0
        self._unsent.append(link)
        if len(self._unsent) > MOST_UNSENT:
            self._unsent.pop(0).hang_up()
        async with asyncio.timeout(SEND_SECONDS):
            for start in range(0, len(content), BLOCK_BYTES):
                link.writer.write(content[start : start + BLOCK_BYTES])
                await link.writer.drain()
        self._unsent.remove(link)

    async def refuse(self, link: Link, reason: str) -> None:
        """Send the reason for a refusal, and read on until the peer has received it."""
        await self.send(link, wire.refusal(reason))
        link.is_receiving, link.moved = True, time.monotonic()
        if link.writer.can_write_eof():
            link.writer.write_eof()
        async with asyncio.timeout(READ_SECONDS):
            while await link.reader.read(BLOCK_BYTES):
                pass


class _SilentError(EOFError):
    """A connection that ended before it said anything."""


class _Seldom:
    """Tells of connections that were closed early, and counts those that there is no line for."""

    def __init__(self, told: Told) -> None:
        self._told, self._next, self._untold = told, 0.0, 0

    def __call__(self, line: str) -> None:
        if (now := time.monotonic()) < self._next:
            self._untold += 1
            return
        more = f" ({self._untold} more since the last such line)" if self._untold else ""
        self._told(line + more)
        self._next, self._untold = now + QUIET_SECONDS, 0
