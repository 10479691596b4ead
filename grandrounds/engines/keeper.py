"""Starts a program and ends every process that comes of it, however the command before it ends.

Run as a program of its own, in its own session, with the command's end of a pipe as standard input:

    python -P keeper.py FOLDER PROGRAM ARGUMENT...

It ends what it started, and then itself,

- on SIGTERM: the command has finished, failed or was interrupted, and removes FOLDER itself,
  unless it is killed while it waits;
- at the end of its standard input: the command was killed; FOLDER is removed here;
- when the program ends by itself.

Neither names nor environments decide what belongs to it, since Ray's agents overwrite both. On
Linux the keeper is a *subreaper* (prctl(2)): a process below it whose parent ends, in whatever
session, becomes its child. Nothing below it is left once it has no children. Other systems lack
this: there, all that descends from it when the end begins, and all that carries `MARKER` in a
readable environment, is ended.

The `flwr` commands that a killed command has left are not below it: they are found by `MARKER`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

MARKER = "GRANDROUNDS_RUNTIME"
"""Environment variable of all processes below a keeper: its folder."""

PATIENCE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""

END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def adopt_orphans() -> bool:
    """Become the parent of every orphan below this process; return whether the system can do it."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def marked_processes(marker: str) -> list[psutil.Process]:
    """Return the living processes that carry `marker` in an environment that can be read."""
    found = []
    for process in psutil.process_iter():
        # Other users' processes, and zombies, have no environment to read.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == marker:
                found.append(process)
    return found


def below_this_process() -> list[psutil.Process]:
    """Return the processes that descend from this one."""
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def reaped(ended: dict[int, int]) -> bool:
    """Note the status of children that have ended; return whether any child is left."""
    try:
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended[child[0]] = child[1]
    except ChildProcessError:
        return False
    return True


def end_all(others: Callable[[], list[psutil.Process]]) -> None:
    """End all processes below this one, and others; return once none is left.

    Parameters
    ----------
    others
        Returns the processes beside those below this one that are to be ended and still live.
    """
    asked: set[int] = set()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        has_children = reaped({})
        living = below_this_process() + others()
        if not (has_children or living):
            return
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline:
                    process.kill()
                elif process.pid not in asked:
                    process.terminate()
            asked.add(process.pid)
        time.sleep(0.05)


def keep(folder: str, command: list[str]) -> int:
    """Run a program until it ends or is to end; return the exit code for this process."""
    adopts = adopt_orphans()
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    for number in (*END, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # the number comes through the pipe
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL).pid
    ended: dict[int, int] = {}
    is_asked = is_abandoned = False
    while not (is_asked or is_abandoned or program in ended):
        ready, _, _ = select.select([woken, sys.stdin], [], [])
        is_abandoned = sys.stdin in ready
        is_asked = woken in ready and bool({*os.read(woken, 4096)} & {*END})
        reaped(ended)

    seen = [] if adopts else below_this_process()

    def others() -> list[psutil.Process]:
        if adopts and not is_abandoned:
            return []
        marked = [one for one in marked_processes(folder) if one.pid != os.getpid()]
        return marked + [one for one in seen if one.is_running()]

    end_all(others)
    if not is_abandoned and sys.stdin in select.select([sys.stdin], [], [], 0)[0]:
        is_abandoned = True  # the command was killed while it waited for this
        end_all(others)
    if is_abandoned:
        shutil.rmtree(folder, ignore_errors=True)
    code = os.waitstatus_to_exitcode(ended[program]) if program in ended else 0
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
