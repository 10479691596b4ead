"""A consortium on one machine: taken ports, programs that fail, and a command that is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.engines.deployment import launcher, local
from grandrounds.errors import ConfigError, EngineError
from grandrounds.study import consortium_demo
from tests.end_to_end.test_docs import shell_commands
from tests.processes import counted, short_folder
from tests.real import wait_for

SERVER = """
import socket, sys, time
with socket.socket() as listener:
    try:
        listener.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError as error:
        sys.exit(f"[Errno {error.errno}] error while attempting to bind: {error.strerror.lower()}")
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[local.Processes]:
    """A launcher, ended with what it has started."""
    (tmp_path / "logs").mkdir()
    with subprocess.Popen([sys.executable, "-P", launcher.__file__, str(tmp_path)]) as process:
        try:
            yield local.Processes(tmp_path, tmp_path / "logs")
        finally:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()


def python(code: str, *words: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, words)]


def test_a_program_whose_port_was_taken_meanwhile_is_started_on_another(
    running: local.Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1], local.free_port(2)]
        monkeypatch.setattr(local, "free_port", lambda _: ports.pop(0))
        begun = running.begin("server", lambda port: python(SERVER, port))
        program = running.finish(begun, lambda one: "up" in running.said(one))
    assert (begun.attempt, program.attempt) == (1, 2)
    assert program.port != begun.port
    assert "already in use" in running.said(program)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (python("import sys; sys.exit('no key')"), "server ended with code 1; .* no key"),
        (["/nowhere/program"], "server ended with code 127; .* No such file or directory"),
    ],
    ids=["it fails", "it is not there"],
)
def test_a_program_that_fails_is_told_with_the_end_of_its_log(
    running: local.Processes, command: list[str], told: str
) -> None:
    with pytest.raises(EngineError, match=told):
        running.finish(running.begin("server", lambda _: command), lambda _: False)


def test_a_folder_whose_sockets_would_be_too_long_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than the 100 bytes"):
        local.check_place(tmp_path / ("x" * 90), ["hospital-0"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sites", "13"], "the packaged formulary has 1,500 rows, and a site needs 120"),
        (["--folder", "full"], "exists and is not an empty folder"),
    ],
)
def test_bad_input_of_the_demonstration_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / "of").mkdir(parents=True)
    done = CliRunner().invoke(app, ["consortium", "demo", *words])
    assert done.exit_code == 2
    [line] = done.output.splitlines()
    assert told in line


def test_lines_are_wrapped_below_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said: list[str] = []
    teller = consortium_demo.Teller(lambda *lines: said.extend(lines))
    teller.line("word " * 30, "hospital-0")
    assert all(len(line) <= 80 for line in said)
    assert said[0].startswith("  hospital-0    word")
    assert {line[: len(consortium_demo.INDENT)] for line in said[1:]} == {consortium_demo.INDENT}


COMMAND = """
import sys, time
from pathlib import Path
from grandrounds.engines.deployment import local
from grandrounds.engines.folders import own_folder

PROGRAM = '''
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    time.sleep(600)
print("up", flush=True)
time.sleep(600)
'''
with own_folder() as folder, local.processes(folder, Path(sys.argv[1])) as running:
    words = [sys.executable, "-S", "-c", PROGRAM]
    begun = [running.begin(name, lambda _: words) for name in ("one", "two")]
    print("starting", flush=True)
    for program in begun:
        running.finish(program, lambda one: "up" in running.said(one))
    print("running", flush=True)
    sys.stdin.readline()
"""


def kill(command: subprocess.Popen[bytes]) -> None:
    command.kill()


def kill_while_it_cleans_up(command: subprocess.Popen[bytes]) -> None:
    command.send_signal(signal.SIGINT)
    time.sleep(0.5)  # the programs ignore SIGTERM for five seconds
    assert command.poll() is None
    command.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "end"),
    [("starting", kill), ("running", kill), ("running", kill_while_it_cleans_up)],
    ids=["while it starts", "while it runs", "while it cleans up"],
)
def test_of_a_killed_command_nothing_is_left(
    tmp_path: Path, line: str, end: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    with (
        short_folder() as place,
        counted() as living,
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(tmp_path)],
            env={**os.environ, "TMPDIR": str(place)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as command,
    ):
        assert command.stdout is not None
        while command.stdout.readline().decode().strip() != line:
            assert command.poll() is None
        end(command)
        wait_for(lambda: not (living() or [*place.iterdir()]), 20, f"left: {living()}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_hospitals_on_one_machine_as_the_tutorial_has_them() -> None:
    """Its commands, line by line: all processes are real, the refusals are the agents', and
    nothing is left but the folder."""
    short, kept, *later = shell_commands("three-hospitals.md", "grandrounds")
    assert short == ["grandrounds", "consortium", "demo"]
    assert kept == [*short, "--keep", "--folder", "rehearsal"]
    with short_folder() as place, counted() as living:
        environment = {**os.environ, "TMPDIR": str(place), "COLUMNS": "200"}

        def run(words: list[str]) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", *words]
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, cwd=place
            )

        done = run([*kept, "--rounds", "1"])
        assert done.returncode == 0, done.stdout + done.stderr
        assert living() == []
        assert [file.name for file in place.iterdir()] == ["rehearsal"]
        said = " ".join(done.stdout.split())
        for told in (
            "waiting for approval: site 'hospital-0' has not approved recipe",
            "max-rank = 32, requested 64",
            "it requests the base 'example/another-base'",
            "the server asked to connect with a node key that nobody admitted: refuses status 412",
            "train, round 1 of run",
            "the log is whole",
            "TLS around them",
            "connected 3 of 3",
            "last run round 1 of 1, completed",
            "all processes have ended",
        ):
            assert told in said, (told, done.stdout)
        assert " problem " not in said  # SuperNode and agent are connected
        assert not done.stderr
        home = place / "rehearsal"
        assert (home / "run" / "peft_1" / "adapter_model.safetensors").is_file()
        rows = (home / "hospital-2" / "cards.jsonl").read_text().splitlines()
        assert len(rows) >= consortium_demo.LEAST_ROWS
        assert [run(words).returncode for words in later] == [0] * len(later)
        assert run(["grandrounds", "site", "status", "rehearsal/hospital-0"]).returncode == 1
        assert (home / "run" / "report.html").is_file()
