"""`grandrounds consortium`, `grandrounds site` and the deployment engine on the command line."""

from __future__ import annotations

import logging
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.engines.deployment import keys, set_up
from grandrounds.engines.deployment import superlink as deployment
from grandrounds.errors import ConfigError, EngineError
from grandrounds.server.admitted import registered_nodes
from grandrounds.server.listeners.plain import PlainReporter
from tests.own_sites import make_site, write_partition
from tests.real import FORMULARY


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def complaint(result: Result, exit_code: int = 2) -> str:
    """Return the one line on stderr of a command that failed."""
    assert result.exit_code == exit_code, result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("grandrounds: ")
    return line


@pytest.fixture
def flower_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for Flower's configuration."""
    home = tmp_path / "flwr"
    home.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(home))
    return home


def test_the_way_from_nothing_to_an_admitted_site(tmp_path: Path, flower_home: Path) -> None:
    """The four commands that docs/deployment.md gives, and what each says to do next."""
    consortium, site = tmp_path / "consortium", tmp_path / "site"
    made = run(
        *("consortium", "init", "--name", "trial", "--host", "trial.example.org"),
        *("--dir", consortium),
    )
    assert made.exit_code == 0, made.output
    assert f"connection, to add to {flower_home / 'config.toml'}:" in made.stdout
    assert '[superlink.trial]\naddress = "127.0.0.1:8001"' in made.stdout
    [line] = [line for line in made.stdout.splitlines() if line.startswith("authority for sites")]
    authority = line.split()[3]

    renewed = run("consortium", "renew", "--dir", consortium)
    assert f"{consortium / 'server.crt'} is valid for 825 days" in renewed.stdout

    asked = run("site", "init", "--name", "st-elsewhere", "--dir", site)
    assert asked.exit_code == 0, asked.output
    [line] = [line for line in asked.stdout.splitlines() if line.startswith("node key")]
    node = line.split()[2]
    text = (site / "site.toml").read_text()
    text = text.replace('source = ""', 'source = "cards.csv"')
    (site / "site.toml").write_text(f'{text}\n[bases.formulary]\npath = ""\n')

    admitted = run(
        *("consortium", "admit", site / "request.json", "--partition-id", 1),
        *("--num-partitions", 3, "--dir", consortium, "--fingerprint", node),
    )
    assert admitted.exit_code == 0, admitted.output
    assert "its key is not registered yet" in admitted.stdout

    joined = run(
        *("site", "join", consortium / "admissions" / "st-elsewhere.json"),
        *("--authority", consortium / "authority.pub", "--config", site / "site.toml"),
    )
    assert joined.exit_code == 0, joined.output
    assert "admitted to 'trial' as site 1 of 3" in joined.stdout
    assert f"signed by {authority}" in joined.stdout
    assert "partition-id=1 num-partitions=3" in joined.stdout
    printed = run("site", "supernode", "--config", site / "site.toml").stdout.strip()
    assert f"SuperNode: {printed}" in joined.stdout
    assert stat.S_IMODE((site / "site.toml").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("consortium", "init", "--name", "a/b", "--host", "h"), "--name 'a/b' is not allowed"),
        (("site", "init", "--name", "../x"), "--name '../x' is not allowed"),
        (
            ("consortium", "admit", "none.json", "--partition-id", 0, "--num-partitions", 1),
            "none.json cannot be read",
        ),
        (("site", "serve", "--config", "none.toml"), "Create one with grandrounds site init"),
        (("site", "check", "--config", "none.toml"), "Create one with grandrounds site init"),
        (("site", "supernode", "--config", "none.toml"), "Create one with grandrounds site init"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in complaint(run(*words))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hooks_of_before() -> Iterator[None]:
    """What `site serve` changes for its whole process is undone: tests after it read logs."""
    before = sys.excepthook, sys.unraisablehook, threading.excepthook, warnings.showwarning
    factory = logging.getLogRecordFactory()
    yield
    sys.excepthook, sys.unraisablehook, threading.excepthook, warnings.showwarning = before
    logging.setLogRecordFactory(factory)


@pytest.mark.usefixtures("hooks_of_before")
def test_the_agent_tells_what_it_has_not_before_it_serves(tmp_path: Path) -> None:
    """Data and bases that cannot work are told at its start, not in the first round."""
    serve = ("site", "serve", "--config", tmp_path / "site" / "site.toml")
    site = make_site(tmp_path / "site", {"formulary": ""}, source="none.jsonl")
    assert "none.jsonl" in complaint(run(*serve), 1)
    write_partition(tmp_path / "site" / "cards.jsonl", FORMULARY, 0)
    make_site(tmp_path / "site", {"formulary": "", "other": "nowhere"})
    assert "nowhere is not a base model" in complaint(run(*serve), 1)
    make_site(tmp_path / "site", {"formulary": ""})
    with site.path.open("a") as file:
        file.write(f'sha256 = "{"0" * 64}"\n')
    assert f"sha256 = {'0' * 64}, but the files in" in complaint(run(*serve), 1)


# --- grandrounds run --engine deployment ----------------------------------------------------------


def test_engine_and_connection_belong_together(flower_home: Path) -> None:
    for words in (("--engine", "deployment"), ("--connection", "trial")):
        line = complaint(run("run", *words))
        assert "--engine deployment and --connection NAME belong together" in line


def test_an_unknown_connection_is_told_with_those_that_are_there(flower_home: Path) -> None:
    words = ("run", "--engine", "deployment", "--connection", "trail")
    line = complaint(run(*words))
    assert "has no [superlink.trail]" in line
    assert "It has: none" in line
    (flower_home / "config.toml").write_text('[superlink.trial]\naddress = "127.0.0.1:9"\n')
    assert "Did you mean 'trial'? It has: trial." in complaint(run(*words))
    (flower_home / "config.toml").write_text("[superlink")
    assert "is not valid TOML" in complaint(run(*words))


def test_a_superlink_elsewhere_needs_a_place_for_the_run(flower_home: Path) -> None:
    (flower_home / "config.toml").write_text(
        '[superlink.trial]\naddress = "trial.example.org:8001"\n'
    )
    line = complaint(run("run", "--engine", "deployment", "--connection", "trial"))
    assert "give its absolute path there with --run-dir" in line


@pytest.mark.parametrize("kept", ["Finished rounds are kept", "No round was finished"])
def test_a_run_elsewhere_that_fails_advises_once_how_to_resume(
    flower_home: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """The server's own note, which ends its error, names no engine and no connection."""
    (flower_home / "config.toml").write_text(
        '[superlink.trial]\naddress = "trial.example.org:8001"\n'
    )
    note = f"{kept}; resume with grandrounds run --resume /runs/a"
    reason = f"ServerApp raised an exception: Round 3 has 1 good reply, of at least 2. {note}"
    monkeypatch.setattr(deployment, "_start", lambda *_: 1)
    monkeypatch.setattr(deployment, "follow", lambda *_: ("failed", f"{reason}\nand more"))
    config = recipes.resolve({"run-directory": "/runs/a", "data.num-partitions": 3})
    with pytest.raises(EngineError) as failed:
        deployment.deploy(config, PlainReporter(config), "trial")
    assert str(failed.value) == (
        "The run ended as failed: Round 3 has 1 good reply, of at least 2. Finished rounds, if "
        "any, are kept; resume with grandrounds run --resume /runs/a --engine deployment "
        "--connection trial"
    )


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:8001", True),
        ("127.8.0.1:8001", True),
        ("[::1]:8001", True),
        ("localhost:8001", True),
        ("10.0.0.1:8001", False),
        ("trial.example.org:8001", False),
    ],
)
def test_whose_machine_an_address_is(address: str, here: bool) -> None:
    assert deployment.is_local(address) == here


def test_real_sites_are_none_of_the_formularys(
    flower_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty of them take the steps that any other data take, and the report names no division."""
    taken: list[Config] = []
    monkeypatch.setattr(deployment, "deploy", lambda config, *_: taken.append(config))
    result = run("run", "--engine", "deployment", "--connection", "trial")
    assert result.exit_code == 0, result.output
    (config,) = taken
    assert (config.data.partitioner, config.data.num_partitions) == ("iid", 20)
    assert config.arguments.max_steps == 5


@pytest.mark.slow
def test_a_superlink_that_does_not_answer_is_told(flower_home: Path, tmp_path: Path) -> None:
    (flower_home / "config.toml").write_text(
        '[superlink.trial]\naddress = "127.0.0.1:9"\ninsecure = true\n'
    )
    result = run(
        *("run", "--engine", "deployment", "--connection", "trial", "--plain"),
        *("--run-dir", tmp_path / "run"),
    )
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()
    assert "Flower refused `flwr run`: Connection to the SuperLink is unavailable." in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_run_that_completed_behind_a_tunnel_is_no_failure(
    flower_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its run directory is on the SuperLink's machine, though the address is this one's."""
    (flower_home / "config.toml").write_text('[superlink.trial]\naddress = "127.0.0.1:9"\n')
    monkeypatch.setattr(deployment, "_start", lambda *_: 1)
    monkeypatch.setattr(deployment, "follow", lambda *_: ("completed", ""))
    config = recipes.resolve({"run-directory": str(tmp_path / "there")})
    deployment.deploy(config, PlainReporter(config), "trial")
    assert f"{tmp_path / 'there'} is on the SuperLink's machine" in capsys.readouterr().out


def test_a_run_knows_which_nodes_the_sites_were_admitted_as(
    flower_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the consortium beside the connection's certificate, or the one that the user gave."""
    folder = set_up.init_consortium(tmp_path / "consortium", "trial", "trial.example.org", 8000)
    (flower_home / "config.toml").write_text((folder / "flower-config.toml").read_text())
    monkeypatch.setattr(deployment, "register", lambda *_: 77)
    site = set_up.init_site(tmp_path / "site", "st-elsewhere")
    admitted = run(
        *("consortium", "admit", site / "request.json", "--partition-id", 1),
        *("--num-partitions", 3, "--dir", folder, "--connection", "trial"),
        *("--fingerprint", fingerprint_of(site)),
    )
    assert "registered as node 77; no other node can be site 1" in admitted.stdout
    assert registered_nodes(folder) == {1: 77}
    started: list[Any] = []
    monkeypatch.setattr(deployment, "_start", lambda _, flat, __: started.append(flat) or 1)
    monkeypatch.setattr(deployment, "follow", lambda *_: ("completed", ""))
    place = {"run-directory": str(tmp_path / "there"), "data.num-partitions": 3}
    place |= {"strategy.fraction-train": 1.0, "strategy.fraction-evaluate": 0.0}
    for given, sent in (("", str(folder)), ("/elsewhere", "/elsewhere")):
        config = recipes.resolve({**place, "consortium": given})
        deployment.deploy(config, PlainReporter(config), "trial")
        assert started.pop()["consortium"] == sent
    assert "unverified partition ids: 0, 2." in capsys.readouterr().out


def fingerprint_of(site: Path) -> str:
    return keys.fingerprint(keys.read_private_key(site / "node.key").public_key())


def test_nothing_is_signed_before_the_fingerprint_was_compared(tmp_path: Path) -> None:
    folder = set_up.init_consortium(tmp_path / "consortium", "trial", "trial.example.org", 8000)
    site = set_up.init_site(tmp_path / "site", "st-elsewhere")
    words = ("consortium", "admit", site / "request.json", "--partition-id", 0)
    words = (*words, "--num-partitions", 1, "--dir", folder)
    line = complaint(run(*words))
    assert f"has node key {fingerprint_of(site)} and agent key SHA256:" in line
    assert "compare it" in line
    assert "Nothing was signed" in complaint(run(*words, "--fingerprint", "SHA256:other"))
    assert not list((folder / "admissions").iterdir())
    assert run(*words, "--fingerprint", fingerprint_of(site)).exit_code == 0


def test_a_key_that_the_superlink_knows_already_needs_its_node_written_down(
    flower_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower never takes a key twice, and does not tell which node has it."""
    folder = set_up.init_consortium(tmp_path / "consortium", "trial", "trial.example.org", 8000)
    site = set_up.init_site(tmp_path / "site", "st-elsewhere")

    def refuse(*_: object) -> int:
        raise EngineError("Flower refused `flwr supernode`: Public key already in use")

    monkeypatch.setattr(deployment, "register", refuse)
    words = ("consortium", "admit", site / "request.json", "--partition-id", 0, "--dir", folder)
    words = (*words, "--connection", "trial", "--fingerprint", fingerprint_of(site))
    line = complaint(run(*words, "--num-partitions", 1), 1)
    assert "(flwr supernode list trial) to" in line
    (folder / "admissions" / "st-elsewhere.node").write_text("77\n")
    assert "registered as node 77" in run(*words, "--num-partitions", 2).stdout


def test_a_key_is_registered_with_a_known_connection_only(flower_home: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no \[superlink\.trial\]"):
        deployment.register(flower_home / "a.pub", "a", "trial")
