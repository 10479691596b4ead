"""Lets idle CPU threads sleep instead of spinning, and counts the CPUs that threads may use.

PyTorch's threads meet at the end of every product, and OpenMP's wait there in a busy loop. Beside
other busy processes that loop takes the core that the last thread needs. OpenMP reads its settings
once, when PyTorch is loaded, so the package sets this one when it is imported; processes started
from here inherit it. docs/performance.md has the measurements.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

POLICY = "OMP_WAIT_POLICY"

USERS_OWN = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Settings of GNU's and LLVM's OpenMP for idle threads; any of them is left as it is."""

_is_too_late = False


def wait_passively() -> None:
    """Set `OMP_WAIT_POLICY=PASSIVE` for this process and its children.

    Nothing is changed if the user has chosen how idle threads wait.
    """
    global _is_too_late
    if any(name in os.environ for name in USERS_OWN):
        return
    os.environ[POLICY] = "PASSIVE"
    _is_too_late = "torch" in sys.modules


def is_too_late() -> bool:
    """Whether PyTorch had been loaded before, so that this process's idle threads spin."""
    return _is_too_late


def usable_cpus(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of CPUs that this process may keep busy: its affinity, and the CPU quota of
    its container (cgroup v2)."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else min(count, max(1, int(quota) // int(period)))
