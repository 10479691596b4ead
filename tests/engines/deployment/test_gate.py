"""The gate: nginx itself, with the configuration that `consortium init` writes, and a SuperLink."""

from __future__ import annotations

import http.client
import json
import ssl
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from grandrounds.engines.deployment.set_up import FLEET_CALLS
from tests.places import ROOT
from tests.real import FORMULARY, Consortium, has

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not has("nginx"), reason="nginx is not installed (apt-get install nginx)"),
]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """A SuperLink behind its gate, without sites."""
    settings = {**FORMULARY, "data.num-partitions": 1}
    with Consortium(tmp_path_factory.mktemp("gate") / "c", settings, gate=True) as made:
        made.start_superlink()
        made.start_gate()
        yield made


def connected(consortium: Consortium, port: int) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(consortium.home / "ca.crt"))
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)


def status(
    connection: http.client.HTTPSConnection, path: str, method: str = "POST", body: bytes = b""
) -> int:
    connection.request(method, path, body=body or None)
    response = connection.getresponse()
    response.read()
    return response.status


def paths_of(consortium: Consortium) -> set[str]:
    """Return all paths that the SuperLink itself says that it serves."""
    with closing(connected(consortium, consortium.port + 1)) as inner:
        inner.request("GET", "/openapi.json")
        paths = set(json.loads(inner.getresponse().read())["paths"])
    return paths | {"/docs", "/docs/oauth2-redirect", "/openapi.json"}


def test_nothing_but_what_sites_call_comes_through(consortium: Consortium) -> None:
    """All of /v1/fleet came through, and nobody had said what /v1/runtime is."""
    paths = paths_of(consortium)
    passed = {f"/v1/fleet/{call}" for call in FLEET_CALLS} | {"/health"}
    assert passed <= paths
    assert len(paths) > 70
    gate, inner = (connected(consortium, consortium.port + i) for i in (0, 1))
    with closing(gate), closing(inner):
        for path in sorted(paths - passed):
            assert (status(gate, path), status(gate, path, "GET")) == (404, 404), path
            if path.startswith("/v1/"):
                assert status(inner, path) != 404, path
        for call in FLEET_CALLS:
            path = f"/v1/fleet/{call}"
            assert status(gate, path) == status(inner, path) != 404
            assert status(gate, path, "GET") == 403
        assert status(gate, "/health", "GET") == 200
        for way in (
            "/v1/fleet/../control/list-runs",
            "/v1/fleet/%2e%2e/control/list-runs",
            "/v1/fleet/pull-messages/../../control/list-runs",
            "/v1/fleet/pull-messages/",
            "//v1/control/list-runs",
            "/V1/control/list-runs",
        ):
            assert status(gate, way) == 404, way


def test_every_path_of_the_superlink_is_in_the_documentation(consortium: Consortium) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    for path in paths_of(consortium):
        assert f"`{path.rpartition('/')[2]}`" in text, path


def test_connections_and_requests_of_one_client_are_limited(consortium: Consortium) -> None:
    """Neither was: 40 uploads that never end held 40 connections of the SuperLink."""
    with ExitStack() as stack:
        answers = Counter[int]()
        for _ in range(40):
            upload = stack.enter_context(closing(connected(consortium, consortium.port)))
            upload.putrequest("POST", "/v1/fleet/push-object")
            upload.putheader("Content-Type", "application/protobuf")
            upload.putheader("Content-Length", "1000000")
            upload.endheaders(b"x")
            upload.sock.settimeout(0.02)
            try:
                answers[int(upload.sock.recv(12).split()[1])] += 1
            except TimeoutError:
                answers[0] += 1  # held, as an upload in progress
        assert answers == {0: 32, 503: 8}
    with closing(connected(consortium, consortium.port)) as flood:
        path = "/v1/fleet/pull-messages"  # by GET it would be 403, which costs the gate nothing
        answers = Counter(status(flood, path, "GET") for _ in range(600))
    assert answers[503] > 50
    assert answers[403] > 250


def test_the_database_is_its_owners_alone(consortium: Consortium) -> None:
    files = list(Path(consortium.home).glob("superlink.db*"))
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
