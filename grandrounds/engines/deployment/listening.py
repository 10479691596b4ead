"""Where the site's agent listens: a Unix socket of its user, or loopback with TLS."""

from __future__ import annotations

import contextlib
import errno
import grp
import ipaddress
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from grandrounds.errors import ConfigError
from grandrounds.site.custody.site_file import SiteFile

WAITING = 512
"""Connections that wait to be accepted; a client that finds no place there tries again."""


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
        with network_socket(site) as listener:
            yield listener, secured
        return
    path = site.place(site.agent.socket)
    with unix_socket(site, path) as listener:
        try:
            yield listener, None
        finally:
            path.unlink(missing_ok=True)


def unix_socket(site: SiteFile, path: Path) -> socket.socket:
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
    listener.listen(WAITING)
    return listener


def network_socket(site: SiteFile) -> socket.socket:
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
    listener.listen(WAITING)
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
