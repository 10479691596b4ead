"""Setting up: what is written, how a site is admitted, and what cannot be forged on the way."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from grandrounds.engines.deployment import admissions, joining, keys, set_up
from grandrounds.errors import ConfigError
from grandrounds.server import admitted
from grandrounds.site.custody import sequence
from grandrounds.site.custody.site_file import read_site_file


def test_a_consortium_has_its_secrets_for_its_owner_alone(consortium: Path) -> None:
    assert stat.S_IMODE(consortium.stat().st_mode) == 0o700
    for name in ("ca.key", "server.key", "authority.key"):
        assert stat.S_IMODE((consortium / name).stat().st_mode) == 0o600
    command = " ".join(set_up.superlink_command(consortium, 8000))
    assert "--enable-supernode-auth" in command
    assert "--insecure" not in command
    assert "--host 127.0.0.1 --port 8001" in command
    assert command in (consortium / "superlink.service").read_text()
    gate = (consortium / "gate.conf").read_text()
    assert "listen 8000 ssl" in gate
    assert "/v1/fleet/(activate-node|" in gate
    assert "/v1/control" not in gate.split("server {")[1]
    assert stat.S_IMODE((consortium / set_up.DATABASE).stat().st_mode) == 0o600


def test_the_servers_certificate_is_for_its_name_and_for_this_machine(consortium: Path) -> None:
    certificate = keys.read_certificate(consortium / "server.crt")
    names = certificate.extensions.get_extension_for_class(keys.x509.SubjectAlternativeName).value
    assert names.get_values_for_type(keys.x509.DNSName) == ["trial.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(keys.x509.IPAddress)] == [
        "127.0.0.1",
        "::1",
    ]
    certificate.verify_directly_issued_by(keys.read_certificate(consortium / "ca.crt"))


def test_the_servers_certificate_is_renewed_for_the_same_key_and_names(consortium: Path) -> None:
    before = keys.read_certificate(consortium / "server.crt")
    assert set_up.renew(consortium) == pytest.approx(keys.CERTIFICATE_DAYS, abs=1)
    after = keys.read_certificate(consortium / "server.crt")
    assert after.serial_number != before.serial_number
    assert after.public_key() == before.public_key()
    kind = keys.x509.SubjectAlternativeName
    assert after.extensions.get_extension_for_class(kind) == (
        before.extensions.get_extension_for_class(kind)
    )
    after.verify_directly_issued_by(keys.read_certificate(consortium / "ca.crt"))
    (consortium / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key cannot be read"):
        set_up.renew(consortium)


def test_a_site_that_is_admitted_has_all_it_needs(consortium: Path, site: Path) -> None:
    admission = admissions.admit(consortium, site / "request.json", 2, 5)
    name, joined = joining.join(
        read_site_file(site / "site.toml"), admission, consortium / "authority.pub"
    )
    after = read_site_file(site / "site.toml")
    assert (name, joined) == ("trial", after)
    assert (after.node.partition_id, after.node.num_partitions) == (2, 5)
    assert after.node.superlink == "trial.example.org:8000"
    assert (site / "ca.crt").read_bytes() == (consortium / "ca.crt").read_bytes()
    assert (consortium / "admissions" / "st-elsewhere.pub").read_text().split()[:2] == (
        (site / "node.pub").read_text().split()[:2]
    )
    assert sequence.known_sequence(site / "state" / "budget.sequence") == (0, sequence.NOTHING)
    assert (site / "state").stat().st_mode & 0o777 == 0o700
    unit = (site / "supernode.service").read_text()
    assert "--auth-supernode-private-key" in unit
    assert "partition-id=2 num-partitions=5" in unit
    agent = (site / "agent.service").read_text()
    assert "site serve" in agent
    assert "\nMemoryMax=90%\n" in agent
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(set_up.with_value(text, "agent", "max-memory-mib", 24000))
    units = set_up.units(read_site_file(site / "site.toml"))
    assert "\nMemoryMax=24000M\n" in units["agent.service"]
    assert "\nPrivateNetwork=yes\nProtectSystem=strict\n" in agent
    assert (site / "ca.crt").stat().st_mode & 0o777 == 0o644


def test_a_request_that_was_changed_on_its_way_is_refused(consortium: Path, site: Path) -> None:
    request = json.loads((site / "request.json").read_text())
    request["content"]["name"] = "another"
    (site / "request.json").write_text(json.dumps(request))
    with pytest.raises(ConfigError, match="is not signed by SHA256:"):
        admissions.admit(consortium, site / "request.json", 0, 1)
    assert not list((consortium / "admissions").iterdir())


def test_an_admission_by_somebody_else_is_refused(
    consortium: Path, site: Path, tmp_path: Path
) -> None:
    forger = set_up.init_consortium(tmp_path / "forger", "trial", "evil.example.org", 8000)
    forged = admissions.admit(forger, site / "request.json", 0, 1)
    before = (site / "site.toml").read_text()
    with pytest.raises(ConfigError, match="is not signed by"):
        joining.join(read_site_file(site / "site.toml"), forged, consortium / "authority.pub")
    assert (site / "site.toml").read_text() == before
    assert not (site / "ca.crt").exists()


def test_an_admission_for_another_key_is_refused(
    consortium: Path, site: Path, tmp_path: Path
) -> None:
    other = set_up.init_site(tmp_path / "other", "other")
    admission = admissions.admit(consortium, other / "request.json", 0, 2)
    with pytest.raises(ConfigError, match=r"admits node key SHA256:.*this site's is SHA256:"):
        joining.join(read_site_file(site / "site.toml"), admission, consortium / "authority.pub")


def test_no_two_sites_have_one_number_or_name(consortium: Path, site: Path, tmp_path: Path) -> None:
    admissions.admit(consortium, site / "request.json", 0, 2)
    other = set_up.init_site(tmp_path / "other", "other")
    with pytest.raises(ConfigError, match="'st-elsewhere' is already admitted with partition-id"):
        admissions.admit(consortium, other / "request.json", 0, 2)
    with pytest.raises(ConfigError, match="--partition-id 2 must be from 0 to 1"):
        admissions.admit(consortium, other / "request.json", 2, 2)
    admissions.admit(consortium, other / "request.json", 1, 2)


def test_a_site_is_the_node_that_its_key_was_registered_as(
    consortium: Path, site: Path, tmp_path: Path
) -> None:
    """The same key may be admitted again; another, or an admission that is gone, unties them."""
    other = set_up.init_site(tmp_path / "other", "other")
    admissions.admit(consortium, other / "request.json", 0, 2)
    admission = admissions.admit(consortium, site / "request.json", 1, 2)
    assert admitted.registered_nodes(consortium) == {}
    admissions.note_node(admission, 77)
    assert admissions.admit(consortium, site / "request.json", 1, 3) == admission
    assert json.loads(admission.read_text())["content"]["num-partitions"] == 3
    assert admitted.registered_nodes(consortium) == {1: 77}
    with pytest.raises(ConfigError, match="'other' is already admitted with partition-id 0"):
        admissions.admit(consortium, site / "request.json", 0, 3)
    admission.unlink()
    assert admitted.registered_nodes(consortium) == {}
    again = set_up.init_site(tmp_path / "again", "st-elsewhere")
    admissions.admit(consortium, again / "request.json", 1, 2)
    assert admitted.registered_nodes(consortium) == {}
    admission.with_suffix(".node").write_text("seven")
    with pytest.raises(ConfigError, match="holds 'seven', which is not a node id"):
        admitted.registered_nodes(consortium)


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "x" * 64])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--name .* is not allowed"):
        set_up.init_site(tmp_path / "site", name)
    assert not (tmp_path / "site").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        set_up.init_site(tmp_path, "a")
    assert [f.name for f in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("text", ["", "[]", '{"content": 1}', '{"content": {}, "signature": "x"}'])
def test_what_is_no_request_is_told(consortium: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(ConfigError):
        admissions.admit(consortium, tmp_path / "request.json", 0, 1)


def test_a_site_with_tls_has_certificates_for_both_ends(tmp_path: Path) -> None:
    folder = set_up.init_site(tmp_path / "site", "a", tls_port=9443)
    text = (folder / "site.toml").read_text()
    text = set_up.with_value(text, "data", "source", "cards.csv")
    (folder / "site.toml").write_text(f'{text}\n[bases.formulary]\npath = ""\n')
    site = read_site_file(folder / "site.toml")
    assert (site.agent.socket, site.agent.address) == ("", "127.0.0.1:9443")
    ca = keys.read_certificate(folder / "agent-ca.crt")
    for stem in ("agent", "agent-client"):
        keys.read_certificate(folder / f"{stem}.crt").verify_directly_issued_by(ca)
    assert 'agent="tls:127.0.0.1:9443" agent-ca=' in set_up.node_config(site)
