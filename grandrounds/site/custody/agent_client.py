"""The way from a ClientApp to the site's agent, which its node's configuration names.

agent                "unix:/run/grandrounds/agent.sock", or "tls:127.0.0.1:9443" with
agent-ca             the certificate authority of the agent's certificate
agent-certificate    what this end shows
agent-key            its key
agent-wait-seconds   how long to wait for an agent that is being started again; 60
"""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message

from grandrounds.errors import EngineError
from grandrounds.site.custody import frames as wire

AGENT = "agent"
"""Key of a node's configuration: where its agent listens."""

WAIT_SECONDS = 60.0
RETRY_SECONDS = 0.5
MOST_TIMES = 3
"""How often a request is sent whole: it may be what ends the agent."""

CONNECT_SECONDS = 10.0
MOST_BYTES = 2**31 - 1


def forward(message: Message, context: Context) -> Message:
    """Let the site's agent answer a message.

    An agent that is not there, or ends before it has answered, is waited for and asked again, a few
    times: the server says from which example a visit starts, so that the second answer is what the
    first would have been.

    Raises
    ------
    EngineError
        If it does not answer in time, or is not the one that the configuration trusts.
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
                # A refusal within TLS may come as a mere end.
                trust = "Do both trust each other (agent-ca, agent-certificate, agent-key)? "
                seen = f"ended {times} times over this message" if times else "is not there"
                raise _told(
                    f"The site's agent {seen} ({error or 'it ended in mid-answer'}), and is waited "
                    f"for {patience:g} s. {trust * address.startswith('tls:')}Is grandrounds site "
                    "serve running?",
                    address,
                ) from error
            time.sleep(RETRY_SECONDS)
    if answer.has_error():
        return Message(answer.error, reply_to=message)
    return Message(answer.content, reply_to=message)


def _raise_if_final(error: Exception, address: str) -> None:
    """Raise `EngineError` for what no waiting mends."""
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        raise _told(
            "The site's agent and its SuperNode do not trust each other "
            f"({error.reason or error}). Check agent-ca, agent-certificate and agent-key.",
            address,
        ) from error
    if isinstance(error, PermissionError):
        raise _told(
            "The SuperNode's user may not connect to the site's agent: run it as the same user, or "
            "put it into agent.socket-group of site.toml.",
            address,
        ) from error


def _told(reason: str, place: str) -> EngineError:
    """Return an error for the server, and say here of which place of the site it speaks."""
    print(f"grandrounds: {place}: {reason}", file=sys.stderr, flush=True)
    return EngineError(reason)


def connected(address: str, node: Mapping[str, Any]) -> socket.socket:
    """Return a connection to an agent.

    Raises
    ------
    EngineError
        If the address is none.
    OSError
        If nobody listens there.
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
        connection.settimeout(None)  # a visit takes as long as it takes
        return connection
    host, _, port = place.rpartition(":")
    if kind != "tls" or not host or not port.isdigit():
        raise _told(
            "The agent of the SuperNode's --node-config is no address: write "
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
    """Return the TLS context in which both ends show who they are."""
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
