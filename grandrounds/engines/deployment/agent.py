"""The site's agent: a long-lived process that answers the site's ClientApps, one visit at a time.

    grandrounds site serve --config site.toml

It holds the base model, which Flower's processes would reload for every message, and is the only
process that can read the data. It runs only installed code, none that came with a run.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import ipaddress
import os
import re
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.supercore.task_identity import TaskIdentity

from grandrounds.client_app import VISITS
from grandrounds.engines.deployment.set_up import place_of
from grandrounds.errors import ConfigError, GrandRoundsError, ReplyError, first_line
from grandrounds.site.custody import audit, faults
from grandrounds.site.custody import frames as wire
from grandrounds.site.custody.node import SITE
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.wire import messages
from grandrounds.wire.messages import CLIENT_APP_RAISED

MIB = 2**20

READ_SECONDS = 60.0
"""Time limit for receiving a request."""

SEND_SECONDS = 300.0
"""Time limit for sending an answer."""

MOST_CONNECTIONS = 4
"""Concurrent connections, each of which may hold a whole message; others wait in the kernel."""

Told = Callable[[str], None]


class Agent:
    """Answers requests on a listening socket until it is stopped."""

    def __init__(
        self,
        site: SiteFile,
        told: Told,
        visits: Mapping[str, Callable[[Message, Context], Message]] = VISITS,
    ) -> None:
        self._site, self._told, self._visits = site, told, visits
        self._one_visit = threading.Lock()  # there is one base model with one adapter
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._stopping = threading.Event()
        SiteState(self._folder).close()  # fails now if the folder is unusable

    @property
    def _folder(self) -> Path:
        return self._site.place(self._site.agent.state)

    def serve(self) -> None:
        """Answer requests until `stop` is called; a visit in progress is completed first."""
        # Flower's runtimes set these before an app starts; Message() reads them.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        with listening(self._site) as (listener, secured):
            listener.settimeout(0.2)
            self._told(f"site {self._site.name!r} listens on {place_of(self._site)}")
            while not self._stopping.is_set():
                if not self._places.acquire(timeout=0.2):
                    continue
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    self._places.release()
                    continue
                thread = threading.Thread(
                    target=self._handle, args=(connection, secured), daemon=True
                )
                thread.start()
        with self._one_visit:  # wait for the visit in progress
            for connection in list(self._open):
                hang_up(connection)
        for _ in range(MOST_CONNECTIONS):
            self._places.acquire()
        self._told("stopped")

    def stop(self) -> None:
        """Make `serve` return."""
        self._stopping.set()

    def _handle(self, plain: socket.socket, secured: ssl.SSLContext | None) -> None:
        """Answer one connection; no failure of it ends the agent."""
        connection = plain
        self._open.add(connection)
        try:
            if secured is not None:
                connection = secured.wrap_socket(
                    plain, server_side=True, do_handshake_on_connect=False
                )
                self._open.add(connection)
            if (request := self._read(connection)) is None:
                return
            with self._one_visit:
                if self._stopping.is_set() or is_closed(connection):
                    return
                reply = self._answer(*request)
                connection.settimeout(SEND_SECONDS)
                connection.sendall(wire.pack_answer(reply))
        except (OSError, wire.ClosedError) as error:
            self._told(f"connection closed early: {first_line(error)}")
        finally:
            self._open.discard(plain)
            self._open.discard(connection)
            connection.close()
            self._places.release()

    def _read(self, connection: socket.socket) -> tuple[Message, Context] | None:
        """Return a request, or None if it is rejected; a TLS handshake counts towards its time."""
        in_time = threading.Timer(READ_SECONDS, hang_up, (connection,))
        in_time.daemon = True
        in_time.start()
        try:
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            return wire.read_request(connection, self._site.agent.max_message_mib * MIB)
        except ReplyError as error:
            self._refuse(str(error))
            wire.refuse(connection, str(error))
            return None
        finally:
            in_time.cancel()

    def _answer(self, message: Message, context: Context) -> Message:
        """Return the answer to a request; an error or a crash becomes an error reply."""
        kind = message.metadata.message_type
        if kind not in self._visits or not message.has_content():
            reason = f"{kind[:40]!r} is not a message type of a site: {', '.join(self._visits)}"
            self._refuse(reason)
            return Message(messages.failure(ReplyError(reason)), reply_to=message)
        context.node_config = {SITE: str(self._site.path)}
        number = re.sub(r"[^\w.-]", "", message.metadata.group_id)[:20]
        try:
            reply = self._visits[kind](message, context)
        except Exception as error:  # its text may quote data: neither the journal nor the server
            why = faults.written(error, with_text=self._site.agent.log_errors_with_text)
            self._told(f"{kind}, round {number}: crashed: {why['error']} at {why['where']}")
            audit.write(self._folder, {"asked": kind, "outcome": "crashed", **why})
            return Message(Error(CLIENT_APP_RAISED, faults.told(error)), reply_to=message)
        self._told(f"{kind}, round {number}: {outcome_of(reply)}")
        return reply

    def _refuse(self, reason: str) -> None:
        self._told(f"refused: {reason}")
        audit.write(self._folder, {"asked": "", "outcome": "refused", "reason": reason})


def hang_up(connection: socket.socket) -> None:
    """Shut down a connection that another thread may be waiting on."""
    with contextlib.suppress(OSError):  # already closed
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def is_closed(connection: socket.socket) -> bool:
    """Whether the peer has closed the connection; not detectable over TLS."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def outcome_of(reply: Message) -> str:
    """Return the outcome of a visit for the log."""
    try:
        messages.raise_failure(reply)
    except GrandRoundsError as error:
        return str(error)
    return "answered"


@contextlib.contextmanager
def listening(site: SiteFile) -> Iterator[tuple[socket.socket, ssl.SSLContext | None]]:
    """Yield the agent's listening socket, and the TLS context of a network socket.

    Raises
    ------
    ConfigError
        If the address is in use or unusable, or the certificates are wrong.
    """
    if site.agent.address:
        secured = server_context(site)
        with _network_socket(site) as listener:
            yield listener, secured
        return
    path = site.place(site.agent.socket)
    with _unix_socket(site, path) as listener:
        try:
            yield listener, None
        finally:
            path.unlink(missing_ok=True)


def _unix_socket(site: SiteFile, path: Path) -> socket.socket:
    """Return a listening Unix socket of mode 0600, or 0660 if it has a group."""
    if path.exists():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ConfigError(
                    f"agent.socket = {path}: another agent is listening there. Stop it, or use "
                    "another socket."
                )
        if not path.is_socket():
            raise ConfigError(
                f"agent.socket = {path} exists and is not a socket; use another path."
            )
        path.unlink()  # left by a killed agent
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        if site.agent.socket_group:
            os.chown(path, -1, grp.getgrnam(site.agent.socket_group).gr_gid)
            path.chmod(0o660)
    except (OSError, KeyError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or f"no group {site.agent.socket_group!r}"
        raise ConfigError(
            f"agent.socket = {path} cannot be created ({reason}). Use a path of at most 100 "
            "characters in a folder of the agent's user, and a group that it belongs to."
        ) from error
    finally:
        os.umask(before)
    listener.listen()
    return listener


def _network_socket(site: SiteFile) -> socket.socket:
    """Return a listening TCP socket on a loopback address."""
    host, port = loopback_address(site)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        raise ConfigError(
            f"agent.address = {site.agent.address!r} cannot be used ({error.strerror}). "
            f"{'Stop the process that listens there, or use' if taken else 'Use'} another port."
        ) from error
    listener.listen()
    return listener


def loopback_address(site: SiteFile) -> tuple[str, int]:
    """Return host and port of the agent's network socket.

    Raises
    ------
    ConfigError
        If it is not a loopback address with a port.
    """
    host, _, port = site.agent.address.rpartition(":")
    host = host.strip("[]")
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"agent.address = {site.agent.address!r} must be a loopback address with a port, such "
            "as 127.0.0.1:9443: the agent serves this machine only."
        )
    return host, int(port)


def server_context(site: SiteFile) -> ssl.SSLContext:
    """Return a TLS context that requires a client certificate signed by `client-ca`."""
    agent = site.agent
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(site.place(agent.certificate), site.place(agent.key))
        context.load_verify_locations(site.place(agent.client_ca))
    except OSError as error:  # SSLError too
        raise ConfigError(
            f"agent.certificate, agent.key and agent.client-ca cannot be used "
            f"({getattr(error, 'strerror', None) or error}). Check their paths and permissions."
        ) from error
    return context
