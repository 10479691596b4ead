"""Counts processes by ancestry: whatever their name, environment, session or parent has become."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from grandrounds.engines import keeper


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], list[str]]]:
    """Yield a function that names the living processes which were started below this one meanwhile.

    Orphans become children of this process (Linux: prctl(2), PR_SET_CHILD_SUBREAPER), so that a
    process below it stays below it.
    """
    if not keeper.adopt_orphans():
        pytest.skip(f"{sys.platform} does not tell whose orphan a process is")
    before = {process.pid for process in keeper.below_this_process()}

    def living() -> list[str]:
        found = []
        for process in keeper.below_this_process():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid in before:
                    continue
                if process.status() == psutil.STATUS_ZOMBIE:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
                    continue
                found.append(f"{process.pid} {process.name()}")
        return found

    try:
        yield living
    finally:
        ctypes.CDLL(None).prctl(keeper.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Yield an empty folder with a name short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)
