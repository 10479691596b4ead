"""`grandrounds site check`: a line for each finding, and for each thing that stands in the way."""

from __future__ import annotations

import datetime
import email.utils
import http.server
import json
import os
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.data import large, sources
from grandrounds.engines.deployment import checks, keys, set_up
from grandrounds.engines.deployment.findings import Finding
from grandrounds.site.custody.site_file import SiteFile, read_site_file
from tests.own_sites import make_site, write_partition
from tests.real import FORMULARY, free_port


@contextmanager
def made_before(days: int) -> Iterator[None]:
    """Let certificates be made as if it had been so many days ago."""

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return super().now(tz) - datetime.timedelta(days=days)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys.datetime, "datetime", Then)
        yield


@contextmanager
def web_server(
    folder: Path,
    *,
    days: int = 90,
    hosts: Sequence[str] = ("127.0.0.1",),
    ahead: float = 0.0,
    status: int = 200,
) -> Iterator[str]:
    """Serve /health with TLS under an authority written to `ca.crt`; return its address.

    It answers as nginx does, with a Date; nothing else of a SuperLink is there.
    """

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return email.utils.formatdate(time.time() - ahead, usegmt=True)

        def log_message(self, *_: Any) -> None:
            pass

    authority_key, server_key = keys.new_key(), keys.new_key()
    authority = keys.new_authority("trial certificate authority", authority_key)
    with made_before(keys.CERTIFICATE_DAYS - days):
        made = keys.new_certificate(
            "trial", hosts, server_key.public_key(), authority, authority_key
        )
    (folder / "ca.crt").write_bytes(keys.certificate_text(authority))
    (folder / "server.crt").write_bytes(keys.certificate_text(made))
    keys.write_private_key(folder / "server.key", server_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def site(tmp_path: Path) -> SiteFile:
    """A site that lacks nothing but a server."""
    folder = tmp_path / "site"
    write_partition(folder / "cards.jsonl", {**FORMULARY, "data.num-partitions": 4}, 0)
    (folder / "cards.jsonl").chmod(0o600)
    keys.write_private_key(folder / "node.key", keys.new_key(), openssh=True)
    authority = keys.new_authority("trial", keys.new_key())
    (folder / "ca.crt").write_bytes(keys.certificate_text(authority))
    return make_site(folder, {"formulary": ""}, node__superlink=f"127.0.0.1:{free_port()}")


def changed(site: SiteFile, **changes: Any) -> SiteFile:
    """Return the site with other values in its file, `section__key`."""
    text = site.path.read_text()
    for name, value in changes.items():
        section, _, key = name.partition("__")
        text = set_up.with_value(text, section, key.replace("_", "-"), value)
    site.path.write_text(text)
    return read_site_file(site.path)


def findings(site: SiteFile, **settings: Any) -> dict[str, Finding]:
    """Return what is found, by subject; of several the one that is no `ok`."""
    found: dict[str, Finding] = {}
    config = recipes.resolve(settings)
    for finding in checks.check(site, config, is_asked=bool(settings)):
        if finding.subject not in found or finding.level != "ok":
            found[finding.subject] = finding
    return found


def problem(site: SiteFile, subject: str, **settings: Any) -> str:
    """Return the text of the one error, which is on this subject."""
    found = findings(site, **settings)
    errors = [name for name, finding in found.items() if finding.level == "error"]
    assert subject in errors, found
    assert set(errors) <= {subject, "server", *(["recipe"] if settings else [])}, found
    return found[subject].text


def test_a_site_that_lacks_nothing_but_a_server(site: SiteFile) -> None:
    found = findings(site)
    assert [name for name, finding in found.items() if finding.level == "error"] == ["server"]
    assert "cannot be reached" in found["server"].text
    assert "0 duplicate" in found["data"].text
    assert "training examples" in found["data"].text
    digest = found["base formulary"].text.split()[1].rstrip(",")
    assert len(digest) == 64
    assert "not compared" in found["base formulary"].text
    assert "median " in found["tokens under formulary"].text
    assert "0 answers truncated at" in found["tokens under formulary"].text
    assert "estimated" in found["memory for formulary"].text
    known = changed(site)
    known.path.write_text(known.path.read_text() + f'sha256 = "{digest}"\n')
    assert "as in site.toml" in findings(read_site_file(known.path))["base formulary"].text


def test_of_a_site_that_is_stored_on_the_disk_some_examples_are_tokenised(
    site: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "STORED_BYTES", 0)
    monkeypatch.setattr(checks, "MOST_TOKENISED", 3)
    sources._load_files.cache_clear()
    told = findings(site)["tokens under formulary"].text
    sources._load_files.cache_clear()
    assert "per example of the first 3, maximum" in told


def test_a_recipe_that_the_site_would_refuse_is_told(site: SiteFile) -> None:
    """Its base, and each limit of the policy."""
    recipe = {"model.name": "another/base"}
    assert "it requests the base 'another/base'" in problem(site, "recipe", **recipe)
    strict = changed(site, policy__max_rank=8, policy__max_steps_per_visit=3)
    asked = {"model.lora.peft-lora-r": 16, "train.training-arguments.max-steps": 6}
    told = problem(strict, "recipe", **asked)
    assert "max-rank = 8, requested 16" in told
    assert "max-steps-per-visit = 3, requested 6" in told
    lenient = changed(site, policy__max_rank=64, policy__max_steps_per_visit=8)
    allowed = findings(lenient, **{"model.lora.peft-lora-r": 16})
    assert "within the policy: base formulary, rank 16" in allowed["recipe"].text


def test_before_the_site_has_joined_it_is_told_to(site: SiteFile) -> None:
    (site.path.parent / "ca.crt").unlink()
    found = findings(site)
    assert "contains it (grandrounds site join)" in found["authority"].text
    assert "server" not in found


def test_data_that_are_not_there_or_empty_are_told(site: SiteFile) -> None:
    assert "nowhere.jsonl" in problem(changed(site, data__source="nowhere.jsonl"), "data")
    (site.path.parent / "empty.jsonl").write_text("")
    assert "empty.jsonl" in problem(changed(site, data__source="empty.jsonl"), "data")


def test_a_column_that_is_not_there_is_told_with_those_that_are(site: SiteFile) -> None:
    told = problem(changed(site, data__question_column="frage"), "data")
    assert "'frage'" in told
    assert "input" in told


def test_data_that_cannot_be_read_are_told(site: SiteFile) -> None:
    if os.getuid() == 0:
        pytest.skip("root reads everything")
    (site.path.parent / "cards.jsonl").chmod(0)
    assert "cards.jsonl" in problem(site, "data")


def test_data_that_every_user_can_read_are_warned_of(site: SiteFile) -> None:
    cards = site.path.parent / "cards.jsonl"
    cards.chmod(0o604)
    assert findings(site)["data"].level == "warning"
    assert f"chmod 600 {cards}" in findings(site)["data"].text
    cards.chmod(0o640)
    assert findings(site)["data"].level == "ok"


def test_fewer_examples_than_the_policy_asks_for_are_told(site: SiteFile) -> None:
    told = problem(changed(site, policy__min_examples=10**6), "policy")
    assert "policy.min-examples = 1000000" in told
    assert "would take part in no run" in told


def test_patients_whose_names_differ_in_case_only_are_told(site: SiteFile) -> None:
    patients = ["P1", "p1", *(f"Q{i}" for i in range(8))]
    rows = [{"input": f"q {p}", "output": f"a {p}", "patient": p} for p in patients]
    (site.path.parent / "cards.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = {"unit_column": "patient", "declared_units": 10, "delta": 1e-5}
    found = findings(changed(site, **{f"privacy__{key}": value for key, value in own.items()}))
    assert found["units"].level == "warning"
    assert "1 name in 'patient' differs from another" in found["units"].text
    assert "'P1' and 'p1'" in found["units"].text
    assert found["privacy"].level == "warning"
    assert "privacy budget --start" in found["privacy"].text


def test_a_base_that_is_not_there_or_another_is_told(site: SiteFile) -> None:
    text = site.path.read_text()
    site.path.write_text(f'{text}sha256 = "{"0" * 64}"\n')
    told = problem(read_site_file(site.path), "base formulary")
    assert f"sha256 = {'0' * 64} in site.toml, but that of its files is" in told
    site.path.write_text(f'{text}\n[bases.other]\npath = "nowhere"\n')
    assert "nowhere" in problem(read_site_file(site.path), "base other")


def test_answers_that_do_not_fit_are_counted(site: SiteFile) -> None:
    told = problem(site, "tokens under formulary", **{"train.seq-length": 8})
    assert "questions leave no room for an answer" in told


def test_a_node_key_that_others_can_read_is_told(site: SiteFile) -> None:
    (site.path.parent / "node.key").chmod(0o640)
    assert "chmod 600" in problem(site, "node key")
    (site.path.parent / "node.key").unlink()
    assert "node.key cannot be read" in problem(site, "node key")


def test_the_consortiums_certificate_must_be_one(site: SiteFile) -> None:
    (site.path.parent / "ca.crt").write_text("hello")
    found = findings(site)
    assert "holds no certificate in PEM format" in found["authority"].text


def test_a_server_that_answers(site: SiteFile) -> None:
    """Its certificate and its clock are looked at, and it is asked whether it knows the key."""
    with web_server(site.path.parent, days=20) as address:
        found = findings(changed(site, node__superlink=address))
    assert found["server"].level == "warning"  # the certificate ends soon
    assert "is valid for 20 more days" in found["server"].text
    assert found["clock"].level == "ok"
    assert found["registration"].level == "error"
    assert "rejects this node (401)" in found["registration"].text


def test_a_gate_without_a_superlink_behind_it_is_told(site: SiteFile) -> None:
    with web_server(site.path.parent, status=502) as address:
        told = problem(changed(site, node__superlink=address), "server")
    assert "answers with status 502: the SuperLink behind the gate does not run" in told


@pytest.mark.parametrize(("ahead", "told"), [(60.0, "ahead of"), (-600.0, "behind")])
def test_a_clock_that_flower_would_refuse_is_told(site: SiteFile, ahead: float, told: str) -> None:
    with web_server(site.path.parent, ahead=ahead) as address:
        clock = findings(changed(site, node__superlink=address))["clock"]
    assert clock.level == "error"
    assert f"{told} the server's: Flower rejects its signatures" in clock.text


@pytest.mark.parametrize(
    ("server", "told"),
    [({"days": -1}, "expired"), ({"hosts": ("other.example",)}, "mismatch")],
    ids=["expired", "another name"],
)
def test_a_servers_certificate_that_is_not_accepted_is_told(
    site: SiteFile, server: dict[str, Any], told: str
) -> None:
    with web_server(site.path.parent, **server) as address:
        found = problem(changed(site, node__superlink=address), "server")
    assert "is not valid (" in found
    assert told in found


def test_an_expired_authority_is_told(site: SiteFile) -> None:
    with made_before(keys.AUTHORITY_DAYS + 3):
        authority = keys.new_authority("trial", keys.new_key())
    (site.path.parent / "ca.crt").write_bytes(keys.certificate_text(authority))
    assert "certificate authority expired 3 days ago" in problem(site, "authority")


def test_a_servers_address_that_is_none_is_told(site: SiteFile) -> None:
    told = problem(changed(site, node__superlink="trial.example.org"), "server")
    assert "must be host:port" in told


def test_the_command_prints_a_line_each_and_fails(site: SiteFile) -> None:
    result = CliRunner().invoke(app, ["site", "check", "--config", str(site.path)])
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warning", "error") for line in lines), lines
    assert any(line.startswith("error   server: 127.0.0.1:") for line in lines)
    assert "Traceback" not in result.output


def test_examples_are_shown_with_what_is_learned(site: SiteFile) -> None:
    words = ["site", "check", "--config", str(site.path), "--examples", "1"]
    shown = CliRunner().invoke(app, words).stdout
    assert shown.count("for this screen only:") == 1
    prompt, answer = shown.partition("example 1, ")[2].split("### Response:⟦ ")
    assert "### Instruction:" in prompt
    assert answer.rstrip().endswith("⟧")


def test_a_database_in_a_file_that_others_read_is_warned_of(site: SiteFile) -> None:
    site.path.chmod(0o644)
    text = site.path.read_text()
    database = f"sqlite:///{site.path.parent / 'a.db'}"
    for key, value in (("source", ""), ("database", database), ("query", "SELECT 1")):
        text = set_up.with_value(text, "data", key, value)
    site.path.write_text(text)
    found = findings(read_site_file(site.path))
    assert found["state"].level == "warning"
    assert "chmod 600" in found["state"].text


def test_a_home_is_hidden_from_the_supernodes_unit() -> None:
    assert checks.is_hidden(Path("/home/jo/site"))
    assert checks.is_hidden(Path("/root/site"))
    assert not checks.is_hidden(Path("/srv/home"))


def test_a_setting_of_the_run_is_checked_like_any_other(site: SiteFile) -> None:
    words = ["site", "check", "--config", str(site.path), "--set", "train.seq-length=-1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "train.seq-length" in result.stderr
