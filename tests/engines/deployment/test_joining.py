"""Joining: what is refused, what an interruption leaves, and how a node key is replaced."""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config.keys import FederationConfig
from grandrounds.config.recipes import resolve
from grandrounds.engines.deployment import admissions, joining, keys, set_up, signed
from grandrounds.engines.deployment import superlink as deployment
from grandrounds.errors import ConfigError, EngineError
from grandrounds.server import admitted
from grandrounds.site.custody import together
from grandrounds.site.custody.site_file import read_site_file


def admit(consortium: Path, site: Path, partition_id: int = 0, name: str = "request.json") -> Path:
    """Admit a site, and return a copy of the admission that stays as it is."""
    admission = admissions.admit(consortium, site / name, partition_id, 5)
    serial = json.loads(admission.read_text())["content"]["serial"]
    copy = consortium.parent / f"admission-{serial}.json"
    copy.write_bytes(admission.read_bytes())
    return copy


def join(consortium: Path, site: Path, admission: Path) -> None:
    joining.join(read_site_file(site / "site.toml"), admission, consortium / "authority.pub")


def content_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a site, without what only marks a change that is under way."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name[0] != "."}


def test_an_old_admission_is_refused_though_its_signature_is_good(
    consortium: Path, site: Path
) -> None:
    """It was accepted: whoever kept one could give a site its old number or server back."""
    first, second = admit(consortium, site, 0), admit(consortium, site, 3)
    join(consortium, site, second)
    before = content_of(site)
    with pytest.raises(ConfigError, match=r"has serial 1, but this site has joined with serial 2"):
        join(consortium, site, first)
    assert content_of(site) == before
    join(consortium, site, second)  # the same again writes the same
    assert content_of(site) == before


def test_an_admission_may_say_how_many_examples_a_site_has(consortium: Path, site: Path) -> None:
    """Its weight in a run is at most that."""
    federation = resolve({"consortium": str(consortium)}).federation
    admit(consortium, site, 3)
    assert admitted.admitted_examples(federation) == {}
    admission = admissions.admit(consortium, site / "request.json", 3, 5, examples=1500)
    join(consortium, site, admission)
    assert admitted.admitted_examples(federation) == {3: 1500}
    damaged(consortium, admission, lambda content: content.update(examples="many"))
    with pytest.raises(ConfigError, match="examples is 'many', not an integer of at least 1"):
        admitted.admitted_examples(federation)


def test_an_expired_admission_is_refused(consortium: Path, site: Path) -> None:
    admission = admissions.admit(consortium, site / "request.json", 0, 1, days=-1)
    before = content_of(site)
    with pytest.raises(ConfigError, match=r"expired at 20.*set this machine's clock"):
        join(consortium, site, admission)
    assert content_of(site) == before


def damaged(consortium: Path, admission: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change an admission, and sign it again with the authority's key."""
    content = json.loads(admission.read_text())["content"]
    change(content)
    authority = keys.read_private_key(consortium / "authority.key")
    admission.write_text(signed.signed_text(content, authority))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("serial"), "has no serial or no expiry"),
        (lambda c: c.update(expires="soon"), "has no serial or no expiry"),
        (lambda c: c.update(superlink="trial.example.org"), "does not name the server"),
        (lambda c: c.pop("partition-id"), "does not number the site"),
        (lambda c: c.update({"partition-id": 7}), "must be below node.num-partitions"),
        (lambda c: c.pop("consortium"), "does not name the consortium"),
        (lambda c: c.update(ca="hello"), "contains no certificate authority"),
    ],
)
def test_an_admission_that_cannot_be_writes_nothing(
    consortium: Path, site: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    """The certificate authority was replaced before site.toml was found to be wrong."""
    admission = admit(consortium, site)
    damaged(consortium, admission, change)
    before = content_of(site)
    with pytest.raises(ConfigError, match=told):
        join(consortium, site, admission)
    assert content_of(site) == before


def test_a_kill_in_the_middle_leaves_all_files_old_or_all_new(consortium: Path, site: Path) -> None:
    """Killed at each rename in turn; it left the new authority beside the old site.toml."""
    join(consortium, site, admit(consortium, site, 0))
    old = content_of(site)
    admission = admit(consortium, site, 3)
    rename, states = Path.replace, []
    for at in range(20):
        if (child := os.fork()) == 0:
            renamed = iter(range(at))

            def counted(path: Path, target: Path, left: Any = renamed) -> Path:
                if next(left, None) is None:
                    os._exit(9)
                return rename(path, target)

            Path.replace = counted  # type: ignore[method-assign,assignment]
            join(consortium, site, admission)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        number = read_site_file(site / "site.toml").node.partition_id  # finishes what was begun
        states.append(content_of(site))
        assert not (site / together.PENDING).exists()
        assert number == (0 if states[-1] == old else 3)
        if ended == 0:
            break
    assert ended == 0
    assert states[0] == old
    assert states[-1]["joined.json"] != old["joined.json"]
    assert all(state in (old, states[-1]) for state in states)


def test_a_node_key_is_replaced_by_one_that_it_vouches_for(consortium: Path, site: Path) -> None:
    admission = admit(consortium, site, 2)
    join(consortium, site, admission)
    admissions.note_node(consortium / "admissions" / "st-elsewhere.json", 77)
    before = (site / "node.key").read_text()
    request = joining.rotate_key(read_site_file(site / "site.toml"))
    assert (site / "node.key").read_text() == before  # in use until the site joins
    with pytest.raises(ConfigError, match="waits for its admission"):
        joining.rotate_key(read_site_file(site / "site.toml"))
    after = admit(consortium, site, 2, request.name)
    assert admissions.replaced_nodes(consortium / "admissions" / "st-elsewhere.json") == [77]
    assert admitted.registered_nodes(consortium) == {}
    join(consortium, site, after)
    assert (site / "node.key").read_text() != before
    assert stat.S_IMODE((site / "node.key").stat().st_mode) == 0o600
    assert not (site / joining.NEXT_KEY).exists()
    node = keys.fingerprint(keys.read_private_key(site / "node.key").public_key())
    assert json.loads(after.read_text())["content"]["node"] == node
    with pytest.raises(ConfigError, match="is an old admission"):
        join(consortium, site, admission)
    assert admit(consortium, site, 2)  # its request.json is now the one of the new key


def test_a_key_that_does_not_vouch_for_another_is_not_replaced_by_it(
    consortium: Path, site: Path, tmp_path: Path
) -> None:
    """Neither a request without the old key's signature, nor one of a third key."""
    admit(consortium, site)
    request = joining.rotate_key(read_site_file(site / "site.toml"))
    whole = json.loads(request.read_text())
    del whole["second-signature"]
    request.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="the key that it replaces"):
        admit(consortium, site, 0, request.name)
    other = set_up.init_site(tmp_path / "other", "st-elsewhere")
    (other / "site.toml").write_bytes((site / "site.toml").read_bytes())
    joining.rotate_key(read_site_file(other / "site.toml"))
    with pytest.raises(ConfigError, match="'st-elsewhere' is already admitted"):
        admit(consortium, other, 0, joining.NEXT_REQUEST)


def test_a_revoked_site_is_in_a_list_that_the_authority_signed(
    consortium: Path, site: Path, tmp_path: Path
) -> None:
    join(consortium, site, admit(consortium, site, 2))
    admission = consortium / "admissions" / "st-elsewhere.json"
    admissions.note_node(admission, 77)
    with pytest.raises(ConfigError, match=r"No site 'elsewhere' .* Admitted: st-elsewhere"):
        admissions.revoke(consortium, "elsewhere")
    moved = admissions.revoke(consortium, "st-elsewhere")
    assert moved.is_file()
    assert not admission.exists()
    federation: FederationConfig = resolve({"consortium": str(consortium)}).federation
    [reason] = admitted.revoked_nodes(federation).values()
    assert admitted.revoked_nodes(federation).keys() == {77}
    assert "the key of 'st-elsewhere' was revoked at 20" in reason
    admissions.check_revocations(consortium)
    with pytest.raises(ConfigError, match="was revoked: the site must make another one"):
        admit(consortium, site, 2)
    again = set_up.init_site(tmp_path / "again", "st-elsewhere")
    assert admit(consortium, again, 2)
    admissions.revoke(consortium, "st-elsewhere")
    assert len(admitted.revocations(consortium)) == 2
    text = (consortium / admitted.REVOKED).read_text()
    (consortium / admitted.REVOKED).write_text(text.replace("77", "78"))
    with pytest.raises(ConfigError, match="is not signed by SHA256:"):
        admissions.check_revocations(consortium)
    (consortium / admitted.REVOKED).write_text('{"content": {"revoked": [1]}}')
    with pytest.raises(ConfigError, match="is damaged"):
        admitted.revocations(consortium)


def test_a_site_tells_that_its_key_was_revoked_or_waits(consortium: Path, site: Path) -> None:
    from grandrounds.engines.deployment import checks

    join(consortium, site, admit(consortium, site))
    own = read_site_file(site / "site.toml")
    joining.rotate_key(own)
    assert [f.level for f in checks._node_key(own)] == ["warning", "ok"]
    admissions.revoke(consortium, "st-elsewhere")
    (site / admitted.REVOKED).write_bytes((consortium / admitted.REVOKED).read_bytes())
    with pytest.raises(ConfigError, match=r"SHA256:\S+ was revoked by the consortium at 20"):
        list(checks._node_key(own))
    forged = json.loads((site / admitted.REVOKED).read_text())
    forged["content"]["revoked"] = []
    (site / admitted.REVOKED).write_text(json.dumps(forged))
    with pytest.raises(ConfigError, match="is not signed by"):
        list(checks._node_key(own))


def test_revoking_and_replacing_unregister_the_node(
    consortium: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the command line, with a SuperLink that takes what it is told."""
    known: set[int] = set()

    def register(*_: object) -> int:
        known.add(77 + len(known))
        return max(known)

    def unregister(node: int, _: str) -> None:
        if node not in known:
            raise EngineError("Flower refused `flwr supernode`: no such node.")
        known.remove(node)

    monkeypatch.setattr(deployment, "register", register)
    monkeypatch.setattr(deployment, "unregister", unregister)
    monkeypatch.setattr(deployment, "entry_of", lambda _: {})

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [*map(str, words), "--dir", str(consortium)])
        assert done.exit_code == 0, done.output
        return done.stdout

    def fingerprint(name: str) -> str:
        return keys.fingerprint(admissions.read_request(site / name).key)

    words = ("--partition-id", 0, "--num-partitions", 1, "--connection", "trial", "--fingerprint")
    run("consortium", "admit", site / "request.json", *words, fingerprint("request.json"))
    assert known == {77}
    CliRunner().invoke(app, ["site", "rotate-key", "--config", str(site / "site.toml")])
    request = site / joining.NEXT_REQUEST
    said = run("consortium", "admit", request, *words, fingerprint(request.name))
    assert "registered as node" in said
    assert len(known) == 1
    [node] = known
    said = run("consortium", "revoke", "st-elsewhere", "--connection", "trial")
    assert f"node {node} is unregistered" in said
    assert known == set()


def test_serials_only_grow(consortium: Path, site: Path) -> None:
    for serial in (1, 2, 3):
        content = json.loads(admit(consortium, site).read_text())["content"]
        assert content["serial"] == serial
        expires = datetime.datetime.fromisoformat(content["expires"])
        left = expires - datetime.datetime.now(datetime.UTC)
        assert 29 < left / datetime.timedelta(days=1) <= admissions.VALID_DAYS
    (consortium / admissions.SERIAL).write_text("three")
    with pytest.raises(ConfigError, match="holds 'three', which is no serial"):
        admit(consortium, site)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("consortium.json", '{"name": 5}'),
        ("consortium.json", "["),
        ("consortium.json", '{"a":' * 100_000),
        ("admissions/other.json", "{}"),
        ("admissions/other.json", '{"content": []}'),
        ("admissions/other.json", '{"content": {"name": "other", "partition-id": 0}}'),
        ("admissions/st-elsewhere.replaced-node", "12x"),
        ("ca.crt", "\udcff"),
        ("serial", "\udcff"),
    ],
)
def test_a_damaged_folder_of_a_consortium_is_told(
    consortium: Path, site: Path, name: str, content: str
) -> None:
    """Each was a traceback."""
    (consortium / name).write_text(content, errors="surrogateescape")
    node = keys.fingerprint(keys.read_private_key(site / "node.key").public_key())
    where = ["--dir", str(consortium), "--partition-id", "0", "--num-partitions", "5"]
    words = ["consortium", "admit", str(site / "request.json"), *where, "--fingerprint", node]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == ConfigError.exit_code
    assert name.rpartition("/")[2] in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("site", "log", "--config"),
        ("site", "init", "--name", "st-e", "--dir"),
        ("consortium", "revoke", "st-e", "--dir"),
    ],
)
def test_the_home_of_an_unknown_user_is_told(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "~nobody-of-this-name/x"])
    assert result.exit_code == ConfigError.exit_code
    assert "~nobody-of-this-name/x begins with the home of a user" in result.stderr
