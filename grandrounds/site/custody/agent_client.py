"""The connection from a ClientApp to the site's agent, set in the node's configuration.

agent                "unix:/run/grandrounds/agent.sock", or "tls:127.0.0.1:9443" with
agent-ca             the certificate authority of the agent's certificate
agent-certificate    the client certificate
agent-key            the key of the client certificate
agent-wait-seconds   how long to wait for an agent that is restarting; default 60
"""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message

from grandrounds.errors import EngineError, first_line
from grandrounds.site.custody import frames as wire
from grandrounds.site.custody.node import AGENT

WAIT_SECONDS = 60.0
RETRY_SECONDS = 0.5
MOST_TIMES = 3
"""Attempts to send a request in full: the request itself may crash the agent."""

CONNECT_SECONDS = 10.0
MOST_BYTES = 2**31 - 1


def forward(message: Message, context: Context) -> Message:
    """Forward a message to the site's agent, and return its answer.

    If the agent is not running, or ends before it has answered, the request is repeated a few
    times. The server sets the example at which a visit starts, so a second answer equals the first.

    Raises
    ------
    EngineError
        If the agent does not answer in time, or is not the one that the configuration trusts.
    """
    node = context.node_config
    address = str(node[AGENT])
    request = wire.pack_request(message, context)
    patience = float(node.get("agent-wait-seconds", WAIT_SECONDS))
    lost_since = time.monotonic()
    times = 0
    while True:
        try:
            with connected(address, node) as connection:
                connection.sendall(request)
                times += 1
                lost_since = float("inf")
                answer = wire.read_answer(connection, MOST_BYTES)
            break
        except (OSError, wire.ClosedError) as error:
            _raise_if_final(error, address)
            now = time.monotonic()
            lost_since = min(lost_since, now)
            if times == MOST_TIMES or now - lost_since > patience:
                # A TLS refusal may look like a closed connection.
                trust = "Do both trust each other (agent-ca, agent-certificate, agent-key)? "
                seen = f"ended {times} times on this message" if times else "is not running"
                why = first_line(error) if str(error) else "it closed the connection"
                raise _told(
                    f"The site's agent {seen} ({why}); waited "
                    f"{patience:g} s. {trust * address.startswith('tls:')}Is grandrounds site "
                    "serve running?",
                    address,
                ) from error
            time.sleep(RETRY_SECONDS)
    if answer.has_error():
        return Message(answer.error, reply_to=message)
    return Message(answer.content, reply_to=message)


def _raise_if_final(error: Exception, address: str) -> None:
    """Raise `EngineError` for errors that waiting cannot fix."""
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        raise _told(
            "The site's agent and its SuperNode do not trust each other "
            f"({error.reason or error}). Check agent-ca, agent-certificate and agent-key.",
            address,
        ) from error
    if isinstance(error, PermissionError):
        raise _told(
            "The SuperNode's user may not connect to the site's agent: run both as the same user, "
            "or add the user to the group in agent.socket-group of site.toml.",
            address,
        ) from error


def _told(reason: str, place: str) -> EngineError:
    """Return an error for the server, and print it here with the local address or path."""
    print(f"grandrounds: {place}: {reason}", file=sys.stderr, flush=True)
    return EngineError(reason)


def connected(address: str, node: Mapping[str, Any]) -> socket.socket:
    """Return a connection to an agent.

    Raises
    ------
    EngineError
        If the address is invalid.
    OSError
        If nothing listens there.
    """
    kind, _, place = address.partition(":")
    if kind == "unix" and place:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(place)
        except OSError:
            connection.close()
            raise
        connection.settimeout(None)  # a visit has no time limit
        return connection
    host, _, port = place.rpartition(":")
    if kind != "tls" or not host or not port.isdigit():
        raise _told(
            "The agent in the SuperNode's --node-config is not an address: write "
            '"unix:/path/agent.sock" or "tls:127.0.0.1:9443".',
            f"agent = {address!r}",
        )
    host = host.strip("[]")
    context = client_context(node)
    plain = socket.create_connection((host, int(port)), CONNECT_SECONDS)
    try:
        connection = context.wrap_socket(plain, server_hostname=host)
    except OSError:
        plain.close()
        raise
    connection.settimeout(None)
    return connection


def client_context(node: Mapping[str, Any]) -> ssl.SSLContext:
    """Return the TLS context for mutual authentication."""
    names = ("agent-ca", "agent-certificate", "agent-key")
    if missing := [name for name in names if not node.get(name)]:
        raise EngineError(
            f"An agent at a tls: address needs {', '.join(missing)} in the SuperNode's "
            "--node-config."
        )
    ca, certificate, key = (str(node[name]) for name in names)
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate, key)
    except OSError as error:  # SSLError too
        raise _told(
            f"{', '.join(names)} of the SuperNode's --node-config cannot be used "
            f"({getattr(error, 'strerror', None) or type(error).__name__}).",
            ", ".join(str(node[name]) for name in names),
        ) from error
    return context
