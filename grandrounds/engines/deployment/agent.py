"""The site's agent: a long-lived process that answers the site's ClientApps, one visit at a time.

    grandrounds site serve --config site.toml

It holds the base model, which Flower's processes would load again for each message, and alone can
read the data. It runs the code that is installed beside it and none that came with a run.
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
from grandrounds.errors import ConfigError, GrandRoundsError, ReplyError
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody import audit
from grandrounds.site.custody import frames as wire
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.wire import messages
from grandrounds.wire.messages import CLIENT_APP_RAISED

MIB = 2**20

READ_SECONDS = 60.0
"""How long the other end may take for a request."""

SEND_SECONDS = 300.0
"""How long the other end may take for the answer."""

MOST_CONNECTIONS = 4
"""Connections at a time; more wait in the kernel's queue. Each may hold a whole message."""

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
        self._one_visit = threading.Lock()  # the base is one, and so is its adapter
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._stopping = threading.Event()
        SiteState(self._folder).close()  # a folder that cannot be used is told now

    @property
    def _folder(self) -> Path:
        return self._site.place(self._site.agent.state)

    def serve(self) -> None:
        """Answer until `stop` is called; a visit in progress is finished and answered first."""
        # What Flower's runtimes set before an app starts; Message() reads it.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        with listening(self._site) as (listener, secured):
            listener.settimeout(0.2)
            self._told(f"site {self._site.name!r} serves at {place_of(self._site)}")
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
        with self._one_visit:  # whoever is being answered
            for connection in list(self._open):
                hang_up(connection)
        for _ in range(MOST_CONNECTIONS):
            self._places.acquire()
        self._told("stopped")

    def stop(self) -> None:
        """Let `serve` end."""
        self._stopping.set()

    def _handle(self, plain: socket.socket, secured: ssl.SSLContext | None) -> None:
        """Answer one connection, whatever comes of it."""
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
            self._told(f"a connection ended early: {str(error) or type(error).__name__}")
        finally:
            self._open.discard(plain)
            self._open.discard(connection)
            connection.close()
            self._places.release()

    def _read(self, connection: socket.socket) -> tuple[Message, Context] | None:
        """Return a request; None where it is refused. Both have `READ_SECONDS` in all."""
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
        """Return the answer to a request, an expected error or a crash as Flower reports it."""
        kind = message.metadata.message_type
        if kind not in self._visits or not message.has_content():
            reason = f"{kind[:40]!r} is no question to a site: {', '.join(self._visits)}"
            self._refuse(reason)
            return Message(messages.failure(ReplyError(reason)), reply_to=message)
        context.node_config = {custody.SITE: str(self._site.path)}
        number = re.sub(r"[^\w.-]", "", message.metadata.group_id)[:20]
        try:
            reply = self._visits[kind](message, context)
        except Exception as error:  # a crash is the site's to see; the server learns its kind only
            self._told(f"{kind}, round {number}: crashed: {type(error).__name__}: {error}")
            reason = f"the site's agent crashed ({type(error).__name__}); see its log"
            return Message(Error(CLIENT_APP_RAISED, reason), reply_to=message)
        self._told(f"{kind}, round {number}: {outcome_of(reply)}")
        return reply

    def _refuse(self, reason: str) -> None:
        self._told(f"refused: {reason}")
        audit.write(self._folder, {"asked": "", "outcome": "refused", "reason": reason})


def hang_up(connection: socket.socket) -> None:
    """End a connection that another thread may be waiting for."""
    with contextlib.suppress(OSError):  # it has ended already
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def is_closed(connection: socket.socket) -> bool:
    """Whether nobody waits for the answer any more; over TLS that cannot be seen."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def outcome_of(reply: Message) -> str:
    """Return in words what came of a visit."""
    try:
        messages.raise_failure(reply)
    except GrandRoundsError as error:
        return str(error)
    return "answered"


def place_of(site: SiteFile) -> str:
    """Return the address under which ClientApps find an agent, as their nodes name it."""
    agent = site.agent
    return f"tls:{agent.address}" if agent.address else f"unix:{site.place(agent.socket)}"


@contextlib.contextmanager
def listening(site: SiteFile) -> Iterator[tuple[socket.socket, ssl.SSLContext | None]]:
    """Yield the agent's listening socket, and its TLS where it is a network socket.

    Raises
    ------
    ConfigError
        If another agent listens there, the place cannot be used, or certificates are wrong.
    """
    if site.agent.address:
        secured = server_context(site)
        listener = _network_socket(site)
        try:
            yield listener, secured
        finally:
            listener.close()
        return
    path = site.place(site.agent.socket)
    listener = _unix_socket(site, path)
    try:
        yield listener, None
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def _unix_socket(site: SiteFile, path: Path) -> socket.socket:
    """Return a listening Unix socket: mode 0600, or 0660 where it is given to a group."""
    if path.exists():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ConfigError(
                    f"agent.socket = {path}: an agent listens there already. Stop it, or give "
                    "another socket."
                )
        if not path.is_socket():
            raise ConfigError(f"agent.socket = {path} is a file of another kind; give another.")
        path.unlink()  # left by an agent that was killed
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
            f"agent.socket = {path} cannot be made ({reason}). Give a place in a folder of the "
            "agent's user, of at most 100 characters, and a group that it belongs to."
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
            f"{'Another process listens there: stop it, or' if taken else 'Please'} give another "
            "port."
        ) from error
    listener.listen()
    return listener


def loopback_address(site: SiteFile) -> tuple[str, int]:
    """Return host and port of a network socket.

    Raises
    ------
    ConfigError
        If it is no address of this machine alone.
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
            "as 127.0.0.1:9443: the agent serves this machine alone."
        )
    return host, int(port)


def server_context(site: SiteFile) -> ssl.SSLContext:
    """Return the TLS context in which a ClientApp must show a certificate of `client-ca`."""
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
