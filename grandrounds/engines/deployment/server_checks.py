"""`grandrounds site check` of the server: certificate, clocks, whether it knows the site's key."""

from __future__ import annotations

import email.utils
import http
import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import psutil
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from grandrounds.engines.deployment import keys
from grandrounds.engines.deployment.findings import Finding, validity
from grandrounds.errors import ConfigError, EngineError, first_line
from grandrounds.site.custody.site_file import SiteFile

CLOCK_SECONDS = 5.0
"""Flower rejects a node whose clock is further ahead of the server's."""

CLOCK_BEHIND_SECONDS = 300.0
"""Flower rejects a node whose clock is further behind."""

CONNECT_SECONDS = 10.0

ACTIVE = http.HTTPStatus.PRECONDITION_FAILED
"""Status with which Flower refuses a node that is connected already, and one that it does not know.
"""

REJECTED = (
    "its key is not registered (grandrounds consortium admit), was revoked or replaced, or its "
    "SuperNode is connected from where this user cannot see it"
)

KEY_OPTION = "--auth-supernode-private-key"
"""Option of `flower-supernode` before the path of the node key."""

SETTLED_SECONDS = 30.0
"""A SuperNode that the server refuses has ended by then."""


def check_server(site: SiteFile) -> Iterator[Finding]:
    """Whether it answers, the certificate is valid, the clocks agree and it knows our key."""
    host, _, port = site.node.superlink.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"node.superlink = {site.node.superlink!r} must be host:port.")
    ca = site.place(site.node.root_certificates)
    if not ca.is_file():
        return  # already reported under authority
    try:
        status, ahead, certificate = asked_over_tls(host.strip("[]"), int(port), ca)
    except ssl.SSLCertVerificationError as error:
        raise EngineError(
            f"the certificate of {site.node.superlink} is not valid ({error.verify_message}): "
            f"check that {ca.name} is the consortium's, that the certificate covers the name in "
            "node.superlink, and that it has not expired"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise EngineError(
            f"{site.node.superlink} cannot be reached ({first_line(error)}): check that the "
            "SuperLink runs and that no firewall blocks that port"
        ) from error
    if status != http.HTTPStatus.OK:
        raise EngineError(
            f"{site.node.superlink} answers with status {status}: the SuperLink behind the gate "
            "does not run or cannot be reached. Tell the consortium."
        )
    yield Finding("ok", "server", f"{site.node.superlink} answers, its certificate is valid")
    yield validity("server", "server's certificate", certificate)
    yield _clock(ahead)
    yield accepted(site, ca)


def asked_over_tls(host: str, port: int, ca: Path) -> tuple[int, float | None, float]:
    """Return a server's health status, our clock's lead in seconds, and certificate days left."""
    context = ssl.create_default_context(cafile=ca)
    connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=context)
    with closing(connection):
        connection.connect()
        peer = connection.sock.getpeercert()
        expires = ssl.cert_time_to_seconds(str((peer or {})["notAfter"]))
        connection.request("GET", "/health")
        response = connection.getresponse()
        stamp = response.getheader("Date")
        response.read()
    ahead = None
    if stamp:
        ahead = time.time() - email.utils.parsedate_to_datetime(stamp).timestamp()
    return response.status, ahead, (expires - time.time()) / 86400


def _clock(ahead: float | None) -> Finding:
    if ahead is None:
        return Finding("warning", "clock", "not compared: the server sends no time")
    side = "ahead of" if ahead > 0 else "behind"
    told = f"this machine's clock is {abs(ahead):.0f} s {side} the server's"
    if not -CLOCK_BEHIND_SECONDS < ahead < CLOCK_SECONDS:
        return Finding(
            "error", "clock", f"{told}: Flower rejects its signatures. Set it (chrony, NTP)."
        )
    return Finding("ok", "clock", told)


def accepted(site: SiteFile, ca: Path) -> Finding:
    """Whether the server knows the site's key, or its SuperNode is connected with it."""
    try:
        status = activation(site, ca)
    except (httpx.HTTPError, socket.gaierror) as error:
        return Finding("error", "registration", f"the server did not answer ({first_line(error)})")
    if status == http.HTTPStatus.OK:
        return Finding("ok", "registration", "the server knows this site's key")
    process = supernode_process(site) if status == ACTIVE else None
    if process is not None:
        level, told = connection_of(process)
        return Finding(level, "registration", told)
    return Finding("error", "registration", f"the server rejects this node ({status}): {REJECTED}")


def activation(site: SiteFile, ca: Path) -> int:
    """Activate and deactivate the node once, the only way to learn whether its key is known.

    Returns
    -------
    int
        200, or the status with which the server refuses: `ACTIVE` also if the key is not known.

    Raises
    ------
    httpx.HTTPError, socket.gaierror
        If the server does not answer.
    """
    key = keys.read_private_key(site.place(site.node.private_key))
    public = public_key_to_bytes(key.public_key())
    signing = NodeAuthHttpInterceptor(key, key.public_key())
    try:
        with FleetHttpClient.from_server_address(
            site.node.superlink, False, str(ca), interceptors=[signing]
        ) as client:
            asked = ActivateNodeRequest(public_key=public, heartbeat_interval=30.0)
            node = client.ActivateNode(asked)
            client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return http.HTTPStatus.OK


def supernode_process(site: SiteFile) -> psutil.Process | None:
    """Return the process of the site's SuperNode on this machine, by the node key that it names."""
    key = str(site.place(site.node.private_key))
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if KEY_OPTION in words[:-1] and words[words.index(KEY_OPTION) + 1] == key:
            return process
    return None


def connection_of(process: psutil.Process) -> tuple[str, str]:
    """Return whether a SuperNode whose key the server refuses twice is connected, and in words.

    Flower refuses an unknown key with the same status as one that is connected already. A SuperNode
    that is refused ends; one that has run for a while is the connected one.
    """
    seconds = time.time() - process.create_time()
    if seconds < SETTLED_SECONDS:
        return (
            "warning",
            f"its SuperNode (process {process.pid}) started {seconds:.0f} s ago: whether it is "
            f"accepted shows once it has run for {SETTLED_SECONDS:.0f} s",
        )
    return "ok", f"its SuperNode is connected with this site's key (process {process.pid})"
