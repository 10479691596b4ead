"""The roster of agent keys: signed by the consortium, accepted by each site."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.engines.deployment import admissions, joining, keys, rosters, set_up, signed
from grandrounds.engines.deployment.checks import _roster
from grandrounds.errors import ConfigError
from grandrounds.site.custody.site_file import SiteFile, read_site_file
from grandrounds.wire.masks.roster import FILE


@pytest.fixture
def sites(consortium: Path, tmp_path: Path) -> list[SiteFile]:
    """Three sites of the consortium, which have joined."""
    return [joined(consortium, tmp_path / f"site-{i}", i) for i in range(3)]


def joined(consortium: Path, folder: Path, number: int) -> SiteFile:
    set_up.init_site(folder, folder.name)
    text = (folder / "site.toml").read_text()
    text = set_up.with_value(text, "data", "source", "cards.csv")
    (folder / "site.toml").write_text(f'{text}\n[bases.formulary]\npath = ""\n')
    return admit(consortium, folder, number)


def admit(consortium: Path, folder: Path, number: int, request: str = "request.json") -> SiteFile:
    admission = admissions.admit(consortium, folder / request, number, 5)
    site = read_site_file(folder / "site.toml")
    return joining.join(site, admission, consortium / "authority.pub")[1]


def roster_file(consortium: Path) -> Path:
    rosters.write_roster(consortium)
    return consortium / FILE


def test_a_site_has_an_agent_key_of_its_own_that_its_request_names(site: Path) -> None:
    assert stat.S_IMODE((site / set_up.IDENTITY).stat().st_mode) == 0o600
    asked = admissions.read_request(site / "request.json")
    own = keys.read_private_key(site / set_up.IDENTITY).public_key()
    assert keys.fingerprint(keys.read_public_text(asked.agent_key)) == keys.fingerprint(own)
    assert keys.fingerprint(asked.key) != keys.fingerprint(own)


def test_every_site_accepts_the_same_roster(consortium: Path, sites: list[SiteFile]) -> None:
    file = roster_file(consortium)
    for site in sites:
        found = rosters.offered(site, file)
        assert (found.before, len(found.changes)) == (None, 3)
        assert rosters.accepted(site) is None
        rosters.accept(site, found)
        kept = rosters.accepted(site)
        assert kept is not None
        assert kept.digest == found.roster.digest
        assert rosters.offered(site, file).changes == []


def test_a_roster_of_somebody_else_or_changed_on_its_way_is_refused(
    consortium: Path, sites: list[SiteFile], tmp_path: Path
) -> None:
    whole = json.loads(roster_file(consortium).read_text())
    changed, forged = tmp_path / "changed.json", tmp_path / "forged.json"
    content = whole["content"]
    content["sites"][1]["agent-key"] = content["sites"][2]["agent-key"]
    changed.write_text(json.dumps(whole))
    forged.write_text(signed.signed_text(content, keys.new_key()))
    for file in (changed, forged):
        with pytest.raises(ConfigError, match="is not signed by"):
            rosters.offered(sites[0], file)


def test_an_old_roster_is_refused(consortium: Path, sites: list[SiteFile], tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_bytes(roster_file(consortium).read_bytes())
    rosters.accept(sites[0], rosters.offered(sites[0], roster_file(consortium)))
    with pytest.raises(ConfigError, match="it is an old roster"):
        rosters.offered(sites[0], old)


@pytest.mark.parametrize("place", [".", "no-such-folder/roster.json"])
def test_a_place_that_cannot_be_written_is_told_and_the_site_stays_readable(
    consortium: Path, sites: list[SiteFile], place: str
) -> None:
    site = replace(sites[0], secure=replace(sites[0].secure, roster=place))
    with pytest.raises(ConfigError, match=r"secure\.roster = .* must be a file in a folder that"):
        rosters.accept(site, rosters.offered(site, roster_file(consortium)))
    assert read_site_file(site.path) == sites[0]


def test_a_roster_without_the_site_is_refused(consortium: Path, sites: list[SiteFile]) -> None:
    file = roster_file(consortium)
    (sites[0].path.parent / set_up.IDENTITY).unlink()
    set_up.new_identity(sites[0].path.parent / set_up.IDENTITY)
    with pytest.raises(ConfigError, match="does not list this site as site 0 with its agent key"):
        rosters.offered(sites[0], file)


def test_a_consortium_of_two_has_no_roster(consortium: Path, sites: list[SiteFile]) -> None:
    admissions.revoke(consortium, sites[2].name)
    serial = (consortium / admissions.SERIAL).read_text()
    with pytest.raises(ConfigError, match="lists 2 sites; a masked sum needs 3"):
        rosters.write_roster(consortium)
    assert (consortium / admissions.SERIAL).read_text() == serial


def test_a_site_of_an_earlier_version_gets_an_agent_key_with_its_next_node_key(
    consortium: Path, sites: list[SiteFile]
) -> None:
    folder, file = sites[0].path.parent, consortium / "admissions" / "site-0.json"
    content: dict[str, Any] = json.loads(file.read_text())["content"]
    del content["agent-key"]
    authority = keys.read_private_key(consortium / "authority.key")
    file.write_text(signed.signed_text(content, authority))
    (folder / set_up.IDENTITY).unlink()
    with pytest.raises(ConfigError, match=r"has no agent key: let 'site-0' run .* rotate-key"):
        rosters.write_roster(consortium)
    joining.rotate_key(sites[0])
    assert stat.S_IMODE((folder / set_up.IDENTITY).stat().st_mode) == 0o600
    site = admit(consortium, folder, 0, joining.NEXT_REQUEST)
    rosters.accept(site, rosters.offered(site, roster_file(consortium)))


def test_an_agent_key_is_replaced_with_the_node_key_and_the_change_is_shown(
    consortium: Path, sites: list[SiteFile]
) -> None:
    for site in sites:
        rosters.accept(site, rosters.offered(site, roster_file(consortium)))
    folder = sites[1].path.parent
    before = (folder / set_up.IDENTITY).read_bytes()
    joining.rotate_key(sites[1], agent_key=True)
    assert (folder / set_up.IDENTITY).read_bytes() == before  # in use until it joins
    admit(consortium, folder, 1, joining.NEXT_REQUEST)
    assert (folder / set_up.IDENTITY).read_bytes() != before
    assert stat.S_IMODE((folder / set_up.IDENTITY).stat().st_mode) == 0o600
    assert not (folder / joining.NEXT_IDENTITY).exists()
    [line] = rosters.offered(sites[0], roster_file(consortium)).changes
    assert line.startswith("site 1 was 'site-1' and is now 'site-1', agent key SHA256:")


def test_a_revoked_site_in_the_roster_is_told(consortium: Path, sites: list[SiteFile]) -> None:
    site = sites[0]
    assert list(_roster(site)) == []
    must = replace(site, privacy=replace(site.privacy, require="masked"))
    with pytest.raises(ConfigError, match=r"privacy.require = 'masked', but there is no .*roster"):
        list(_roster(must))
    rosters.accept(site, rosters.offered(site, roster_file(consortium)))
    found, masks = _roster(site)
    assert found.text.startswith("serial 4, 3 sites, SHA256:")
    assert masks.level == "warning"
    assert "of 5 sites or more (secure.min-cohort), and the roster has 3" in masks.text
    revoked = admissions.revoke(consortium, "site-2").parents[2] / "revoked.json"
    (site.path.parent / "revoked.json").write_bytes(revoked.read_bytes())
    with pytest.raises(ConfigError, match="lists 'site-2', which the consortium has revoked"):
        list(_roster(site))


def test_the_commands_ask_for_the_digest_that_the_other_sites_have(
    consortium: Path, sites: list[SiteFile]
) -> None:
    def run(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    written = run("consortium", "roster", "--dir", consortium)
    assert written.exit_code == 0, written.output
    digest = written.stdout.splitlines()[0].split()[-1]
    accept = ("site", "accept-roster", consortium / "roster.json", "--config", sites[0].path)
    for options, told in (((), "compare it with"), (("--digest", "SHA256:x"), "not SHA256:x")):
        refused = run(*accept, *options)
        assert refused.exit_code == 2
        assert told in refused.stderr
        assert rosters.accepted(sites[0]) is None
    done = run(*accept, "--digest", digest)
    assert done.exit_code == 0, done.output
    assert "site 2 is 'site-2', agent key SHA256:" in done.stdout
    assert rosters.accepted(sites[0]) is not None
