"""The site's agent: a long-lived process that answers the site's ClientApps, one visit at a time.

    grandrounds site serve --config site.toml

It holds the base model, which Flower's processes would reload for every message, and is the only
process that can read the data. It runs only installed code, none that came with a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.supercore.task_identity import TaskIdentity

from grandrounds.client_app import VISITS
from grandrounds.engines.deployment.connections import Connections, Link, Told
from grandrounds.engines.deployment.listening import listening
from grandrounds.engines.deployment.set_up import place_of
from grandrounds.errors import GrandRoundsError, PolicyError, ReplyError, ThrottledError
from grandrounds.site.custody import faults, kept_masks, refusals
from grandrounds.site.custody import frames as wire
from grandrounds.site.custody.node import SITE
from grandrounds.site.custody.request import RUN_KEY
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState, opened
from grandrounds.wire import messages
from grandrounds.wire.messages import CLIENT_APP_RAISED

MIB = 2**20


class Agent:
    """Answers requests on a listening socket until it is stopped."""

    def __init__(
        self,
        site: SiteFile,
        told: Told,
        visits: Mapping[str, Callable[[Message, Context], Message]] = VISITS,
    ) -> None:
        self._site, self._told, self._visits = site, told, visits
        self._stopping = threading.Event()
        self._wake: Callable[[], object] = lambda: None
        with opened(self._folder) as state:  # fails now if the folder is unusable
            state.tidy()
            kept_masks.tidy(state)

    @property
    def _folder(self) -> Path:
        return self._site.place(self._site.agent.state)

    def serve(self) -> None:
        """Answer requests until `stop` is called; a visit in progress is completed first."""
        # Flower's runtimes set these before an app starts; Message() reads them.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        with listening(self._site) as (listener, secured):
            self._told(f"site {self._site.name!r} listens on {place_of(self._site)}")
            asyncio.run(self._serve(listener, secured))
        self._told("stopped")

    def stop(self) -> None:
        """Make `serve` return; may be called from a signal handler or another thread."""
        self._stopping.set()
        with contextlib.suppress(RuntimeError):  # it has stopped already
            self._wake()

    async def _serve(self, listener: socket.socket, secured: ssl.SSLContext | None) -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(woken.set)
        connections = Connections(self._site.agent.max_message_mib * MIB, self._told)
        turn = asyncio.Lock()  # first come, first served: there is one base with one adapter
        with ThreadPoolExecutor(1, "visit") as thread:

            async def handle(link: Link) -> None:
                if (request := await self._request(connections, link)) is None:
                    return
                async with turn:
                    if self._stopping.is_set() or link.is_closed():
                        return
                    answer = await loop.run_in_executor(thread, self._answer, *request)
                await connections.send(link, answer)

            connections.listen(listener, secured, handle)
            if not self._stopping.is_set():
                await woken.wait()
            async with turn:  # wait for the visit in progress
                pass
            await connections.close()

    async def _request(
        self, connections: Connections, link: Link
    ) -> tuple[Message, Context] | None:
        """Return a request, or None if it is refused."""
        try:
            packed = await connections.read(link)
            return await asyncio.to_thread(wire.unpack_request, *packed)
        except ReplyError as error:
            await asyncio.to_thread(self._refuse, str(error))
            await connections.refuse(link, str(error))
            return None

    def _answer(self, message: Message, context: Context) -> bytes:
        """Return the packed answer to a request."""
        return wire.pack_answer(self._reply(message, context))

    def _reply(self, message: Message, context: Context) -> Message:
        """Return the reply to a message; an error or a crash becomes an error reply."""
        kind = message.metadata.message_type
        if kind not in self._visits or not message.has_content():
            reason = f"{kind[:40]!r} is not a message type of a site: {', '.join(self._visits)}"
            self._refuse(reason)
            return Message(messages.failure(ReplyError(reason)), reply_to=message)
        context.node_config = {SITE: str(self._site.path)}
        number = re.sub(r"[^\w.-]", "", message.metadata.group_id)[:20]
        started = time.monotonic()

        def tell(outcome: str) -> None:
            after = f"{time.monotonic() - started:.1f} s"
            self._told(f"{kind}, round {number}: {outcome} ({after}{_of_run(message)})")

        try:
            reply = self._visits[kind](message, context)
        except Exception as error:  # its text may quote data: neither the journal nor the server
            why = faults.written(error, with_text=self._site.agent.log_errors_with_text)
            tell(f"crashed: {why['error']} at {why['where']}")
            self._record({"asked": kind, "outcome": "crashed", "run": "", **why})
            return Message(Error(CLIENT_APP_RAISED, faults.told(error)), reply_to=message)
        if outcome := outcome_of(reply):
            tell(outcome)
        return reply

    def _refuse(self, reason: str) -> None:
        line = {"run": "", "asked": "", "outcome": "refused", "reason": reason}
        if self._record(line):
            self._told(f"refused: {reason}")

    def _record(self, line: Mapping[str, object]) -> bool:
        """Count a refusal or a crash; return whether its line was written to the audit log."""
        with closing(SiteState(self._folder)) as state:
            return refusals.recorded(state, "", line)


def _of_run(message: Message) -> str:
    """Return the beginning of the run's key for the log, as `site log` shows it."""
    run = str(messages.instruction_of(message.content).get(messages.RUN, ""))
    return f", run {run[:8]}" if RUN_KEY.fullmatch(run) else ""


def outcome_of(reply: Message) -> str:
    """Return the outcome of a visit for the log; empty if the log could be flooded with it."""
    try:
        messages.raise_failure(reply)
    except ThrottledError:
        return ""
    except GrandRoundsError as error:
        return f"{'refused' if isinstance(error, PolicyError) else 'failed'}: {error}"
    return "answered"
