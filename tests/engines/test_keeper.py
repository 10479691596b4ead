"""However a command ends, no process and no folder of it is left.

The command is a small one on the same means as a simulation: a folder, a keeper, and below it a
program that starts daemons as Ray does, which leave their session, their parent and their
environment. `tests/engines/test_simulation.py` counts the same way after real simulations.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from grandrounds.engines import folders
from grandrounds.engines.keeper import MARKER, marked_processes
from tests.processes import counted, short_folder
from tests.real import wait_for

PROGRAM = """
import ctypes, os, pathlib, signal, sys, time

def a_daemon(name):
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # of the environment
    ctypes.memset(start, 0, end - start)
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path("../new-" + name).write_text(str(os.getpid()))
    os.rename("../new-" + name, "../" + name)
    time.sleep(600)
    os._exit(0)

a_daemon("one")
a_daemon("two")
while not (os.path.exists("../one") and os.path.exists("../two")):
    time.sleep(0.01)
pathlib.Path("../up").touch()
time.sleep(0 if "ends" in sys.argv else 600)
"""

COMMAND = """
import sys, time, typer
from grandrounds.cli import end_in_order, reported_in_one_line
from grandrounds.engines.flower import Link, kept, quiet, require_alive
from grandrounds.engines.folders import own_folder
from grandrounds.engines.keeper import MARKER
from grandrounds.errors import EngineError

def command(program, how):
    with reported_in_one_line(), own_folder() as folder:
        environment = {**quiet(), MARKER: str(folder.path)}
        words = [sys.executable, "-c", program, how]
        with kept(folder, environment, "superlink.log", words) as keeper:
            while not (folder.path / "up").exists():
                time.sleep(0.01)
            print(keeper.pid, flush=True)
            if how == "fails":
                raise EngineError("failed")
            while how != "finishes":
                require_alive(Link(folder.path, environment, "", keeper))
                time.sleep(0.05)
                print("at work", flush=True)

end_in_order()
try:
    command(*sys.argv[1:])
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the folders of a test's commands are; nobody else's are there."""
    with short_folder() as folder:
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        yield folder


@contextlib.contextmanager
def started(place: Path, how: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start the command and wait until all its processes are up; yield it, and its keeper."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, PROGRAM, how],
        env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as command:
        assert command.stdout is not None
        yield command, int(command.stdout.readline())


ENDS = {
    "finishes": (0, b""),
    "fails": (1, b"grandrounds: failed\n"),
    "SIGINT": (130, b"grandrounds: interrupted\n"),
    "SIGTERM": (130, b"grandrounds: interrupted\n"),
    "SIGHUP": (130, b"grandrounds: interrupted\n"),
    "SIGKILL": (-9, b""),
    "closed pipe": (141, b""),
    "ends": (1, b"grandrounds: Flower's SuperLink ended with code 0"),  # the program below
    "stubborn": (130, b"grandrounds: interrupted\n"),
}
"""How it ends: the exit code, and what is said."""


@pytest.mark.parametrize("how", ENDS)
def test_no_process_and_no_folder_is_left(place: Path, how: str) -> None:
    with counted() as living, started(place, how) as (command, _):
        (folder,) = place.iterdir()
        hidden = {int((folder / name).read_text()) for name in ("one", "two")}
        assert hidden.isdisjoint(process.pid for process in marked_processes(str(folder)))
        assert command.stdout is not None
        assert command.stderr is not None
        if how == "closed pipe":
            command.stdout.close()
        elif how == "stubborn" or how.startswith("SIG"):
            command.send_signal(signal.SIGINT if how == "stubborn" else signal.Signals[how])
        code, said = ENDS[how]
        assert command.wait(60) == code
        assert command.stderr.read().startswith(said)
        if how == "SIGKILL":  # the keeper is left to end the rest, and itself
            wait_for(lambda: not living(), 20)
        assert living() == []
        assert [*place.iterdir()] == []


def test_what_is_left_where_the_keeper_is_killed_too_is_named_at_the_next_start(
    place: Path,
) -> None:
    with counted() as living, started(place, "") as (command, keeper):
        (folder,) = place.iterdir()
        assert folders.left_behind() == []  # in use
        command.kill()
        psutil.Process(keeper).kill()
        wait_for(lambda: len(living()) == 3, 20)
        (line,) = folders.left_behind()
        for process in living():
            assert process.split()[0] in line
        advice = line.partition("To end them: ")[2].split("; then remove their folder: ")
        subprocess.run(["sh", "-c", advice[0]], check=True)
        wait_for(lambda: not living(), 20)
        assert folders.left_behind() == [f"removed {folder}, which a killed run had left"]
        assert [*place.iterdir()] == []


def test_a_folder_of_somebody_else_is_left_alone(place: Path) -> None:
    (place / "gr-mine").mkdir()
    (place / "gr-mine" / "thesis.tex").touch()
    assert folders.left_behind() == []
    assert (place / "gr-mine" / "thesis.tex").exists()


def test_a_long_temporary_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 10)))
    assert folders.place() == Path("/tmp")


def test_an_ignored_hang_up_stays_ignored(place: Path) -> None:
    """As under nohup; SIGTERM still ends the command."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with started(place, "") as (command, _):
            command.send_signal(signal.SIGHUP)
            time.sleep(0.2)
            assert command.poll() is None
            command.terminate()
            assert command.wait(60) == 130
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_mark_is_in_the_environment() -> None:
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, env={MARKER: "a test"}, stdin=subprocess.PIPE) as process:
        wait_for(lambda: [one.pid for one in marked_processes("a test")] == [process.pid], 20)
