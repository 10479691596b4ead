"""A tracker in a process of its own, so that one that hangs neither holds nor outlives the run.

    python -m grandrounds.server.listeners.tracker_process NAME DESCRIPTOR

Each message names a method of the tracker and gives its arguments; the process answers it. It ends
when the run closes the connection, and so with the run's process, however that one ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from grandrounds.errors import first_line
from grandrounds.server.listeners.tracker_libraries import LIBRARIES, WITHOUT_REPORTS, TrackedRun

ANSWER_SECONDS = 10.0
"""How long the run waits for a tracker, each time."""

LOADING_SECONDS = 60.0
"""How long it waits for a library to be loaded, which asks no server."""

FAILED = "failed"
"""First part of the answer where the tracker failed."""


class Apart:
    """A tracker whose library runs in another process.

    Each method raises TimeoutError where the tracker does not answer in time, and ConnectionError
    where it fails; its process has then been ended.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = 0

    def start(self, run: TrackedRun) -> str:
        """Start the process, and in it the tracker; return where to find the run."""
        self._link, theirs = Pipe()
        paths = os.pathsep.join(filter(None, sys.path))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, self._name, str(theirs.fileno())],
                env=os.environ | WITHOUT_REPORTS | {"PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print is not the run's output
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the run, which then ends the tracker
            )
        try:
            self._ask("prepare", within_seconds=LOADING_SECONDS)
            return str(self._ask("start", run))
        except BaseException:
            self._end()
            raise

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a round."""
        self._ask("log", round_number, dict(figures))

    def finish(self, completed: bool) -> None:
        """Send what is left, and end the process."""
        try:
            self._ask("finish", completed)
            self._link.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # all has been sent
                self._process.wait(ANSWER_SECONDS)
        finally:
            self._end()

    def _ask(self, method: str, *arguments: Any, within_seconds: float | None = None) -> Any:
        """Return what the method of the tracker returns; end the process where it fails."""
        self._number += 1
        seconds = within_seconds or ANSWER_SECONDS
        deadline = time.monotonic() + seconds
        try:
            self._link.send((self._number, method, arguments))
            while self._link.poll(max(0.0, deadline - time.monotonic())):
                number, *answer = self._link.recv()
                if number == self._number:  # else of a question that Ctrl-C cut short
                    return _value(answer)
            raise TimeoutError(f"no answer within {seconds:g} s")
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._end()
            raise ConnectionError(f"its process ended, code {self._process.returncode}") from None
        except OSError:
            self._end()
            raise

    def _end(self) -> None:
        """End the process, and what it has started in its session."""
        self._link.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _value(answer: list[Any]) -> Any:
    if answer[0] == FAILED:
        raise ConnectionError(answer[1])
    return answer[1]


# --- In that process ------------------------------------------------------------------------------


def serve(name: str, link: Connection) -> None:
    """Do what the run asks, until it closes the connection."""
    tracker: Any = LIBRARIES[name]()
    asked: queue.Queue[tuple[int, str, tuple[Any, ...]] | None] = queue.Queue()
    threading.Thread(target=_receive, args=(link, asked), daemon=True).start()
    is_open = False
    while (message := asked.get()) is not None:
        number, method, arguments = message
        try:
            answer = ("done", getattr(tracker, method)(*arguments))
            is_open = method in ("start", "log")
        except Exception as error:  # whatever a library raises is told
            answer = (FAILED, first_line(error))
        with contextlib.suppress(OSError):  # the run has ended; so says the next message
            link.send((number, *answer))
    if is_open:
        tracker.finish(completed=False)


def _receive(link: Connection, asked: queue.Queue[Any]) -> None:
    """Pass messages on; at the end of the connection, end this process however it hangs."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            asked.put(link.recv())
    asked.put(None)
    time.sleep(ANSWER_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1], Connection(int(sys.argv[2])))
