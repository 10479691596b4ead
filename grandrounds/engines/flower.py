"""Runs Flower's commands: in our environment, in an empty folder, with their output in a log.

`flwr` always exits with 0; its JSON output says what happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from grandrounds.engines import keeper
from grandrounds.engines.folders import Folder, uninterrupted
from grandrounds.errors import EngineError

COMMAND_TIMEOUT_SECONDS = 120.0  # a `flwr` command takes 1 to 2 seconds
END_PATIENCE_SECONDS = 30.0
"""How long a keeper may take to end all below it: SIGKILL follows SIGTERM after 5 s."""


@dataclass(frozen=True)
class Link:
    """How Flower's commands reach a SuperLink."""

    home: Path
    """Folder of the logs."""
    environment: Mapping[str, str]
    """Environment of the commands; its `FLWR_HOME` holds the config.toml with the connection."""
    connection: str
    """Name of the connection in Flower's config.toml."""
    process: subprocess.Popen[bytes] | None = None
    """The keeper of the SuperLink that was started for this run, if one was."""


def quiet() -> dict[str, str]:
    """Return our environment, with Flower's programs on PATH, and no telemetry or installs."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PYTHONUNBUFFERED": "1",
    }


def tail(path: Path, lines: int = 20) -> str:
    """Return the last lines of a log, without terminal colours and blank lines."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    return "\n".join([line.rstrip() for line in plain if line.strip()][-lines:])


@contextlib.contextmanager
def started(
    home: Path, environment: Mapping[str, str], log_name: str, command: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Flower program until the block ends, with its output in a log.

    Nothing that it starts is ended with it: `kept` is for programs that start others.
    """
    words = [_found(command[0], environment), *command[1:]]
    process = _popen(home, environment, log_name, words, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def kept(
    folder: Folder, environment: Mapping[str, str], log_name: str, command: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Flower program below a keeper, which is yielded; on exit, end all that it started.

    Raises
    ------
    EngineError
        If the program is not installed, or processes cannot be ended.
    """
    program = [_found(command[0], environment), *command[1:]]
    words = [sys.executable, "-P", keeper.__file__, str(folder.path), *program]
    inherited = {"stdin": subprocess.PIPE, "pass_fds": (folder.lock,)}
    process = _popen(folder.path, environment, log_name, words, **inherited)
    assert process.stdin is not None
    try:
        yield process
    finally:
        with uninterrupted():
            process.terminate()
            try:
                process.wait(END_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                left = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
                raise EngineError(
                    f"Flower processes could not be ended; kill them by hand: {left}."
                ) from None
            finally:
                process.stdin.close()  # only now: a keeper takes its end for that of the command


def _found(program: str, environment: Mapping[str, str]) -> str:
    path = shutil.which(program, path=environment["PATH"])
    if path is None:
        raise EngineError(f"{program!r} is not on PATH: pip install 'grandrounds[all]'")
    return path


def _popen(
    home: Path, environment: Mapping[str, str], log_name: str, words: Sequence[str], **more: Any
) -> subprocess.Popen[bytes]:
    (home / "cwd").mkdir(exist_ok=True)
    with (home / log_name).open("wb") as log:
        return subprocess.Popen(
            words,
            env=dict(environment),
            cwd=home / "cwd",  # empty, since Ray's actors import from here first
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
            **more,
        )


def require_alive(link: Link, problem: str = "") -> None:
    """Raise `EngineError` for a problem with this run's own SuperLink, or if it has ended."""
    if link.process is not None and (code := link.process.poll()) is not None:
        problem = f"ended with code {code} (out of memory?)"
    if problem:
        log = tail(link.home / "superlink.log")
        raise EngineError(f"Flower's SuperLink {problem}. Run again. The end of its log:\n{log}")


_PROGRESS = ("Using SuperLink:", "Listing all runs...", "Listing all nodes...")
"""What `flwr` prints before it has asked anything."""


def ask(link: Link, *arguments: str) -> dict[str, Any]:
    """Run one `flwr` command and return its JSON output; raise `EngineError` if it failed."""
    command = ("flwr", *arguments, "--format", "json")
    with (
        contextlib.suppress(subprocess.TimeoutExpired),
        started(link.home, link.environment, "flwr.log", command) as process,
    ):
        process.wait(COMMAND_TIMEOUT_SECONDS)
    text = tail(link.home / "flwr.log", lines=1000)
    found = re.search(r"^\{.*^\}", text, re.MULTILINE | re.DOTALL)  # amid possible warnings
    answer: dict[str, Any] = json.loads(found.group()) if found else {"error-message": text}
    if not answer.get("success"):
        said = str(answer.get("error-message", "")).splitlines()
        why = " ".join(line for line in said if line and not any(p in line for p in _PROGRESS))
        raise EngineError(
            f"Flower refused `flwr {arguments[0]}`: {why or 'no reason given'}{_why_no_run(link)}"
        )
    return answer


def _why_no_run(link: Link) -> str:
    """Return why a SuperLink of this run refused it, which Flower writes to its log only."""
    log = tail(link.home / "superlink.log") if link.process else ""
    found = re.findall(r"Could not start run: (.+)", log)
    return f" {found[-1]}" if found else ""


def follow(
    link: Link,
    run_id: int,
    on_poll: Callable[[], None],
    poll_seconds: float,
    patience_seconds: float = 0.0,
) -> tuple[str, str]:
    """Wait for the end of a run; return Flower's sub-status and reason.

    A child process copies the run's log and ends with the run; only then is `flwr list` called,
    which takes a second of CPU. If merely the log stream broke, it is restarted.

    Parameters
    ----------
    patience_seconds : float
        How long to retry if the SuperLink does not answer.

    Raises
    ------
    EngineError
        If the SuperLink does not answer, or has ended.
    """
    deadline = None
    # That a SuperLink has died shows only once its keeper has ended all that it started.
    patience_seconds = max(patience_seconds, END_PATIENCE_SECONDS if link.process else 0.0)
    command = ("flwr", "log", str(run_id), link.connection)
    while True:
        with started(link.home, link.environment, "run.log", command) as stream:
            while stream.poll() is None:
                require_alive(link)
                on_poll()
                time.sleep(poll_seconds)
        require_alive(link)
        try:
            [run] = ask(link, "list", link.connection, "--run-id", str(run_id))["runs"]
        except EngineError:
            deadline = deadline or time.monotonic() + patience_seconds
            if time.monotonic() >= deadline:
                raise
            time.sleep(poll_seconds)
            continue
        deadline = None
        on_poll()
        status, _, sub_status = run["status"].partition(":")
        if status == "finished":
            return sub_status, run["status-details"].removeprefix("N/A")
