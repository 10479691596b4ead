"""The main memory that is left to this process, and files that would fill it."""

from __future__ import annotations

import sys
from pathlib import Path

from grandrounds.errors import DataError


def check_fits(source: str, size_bytes: int, factor: int, why: str) -> None:
    """Raise `DataError` if a file is held in memory as a whole and cannot be.

    Parameters
    ----------
    factor : int
        Bytes of memory for a byte of the file, as measured.
    why : str
        Why it is held as a whole, and what to do, as two sentences.
    """
    import psutil

    needed = factor * size_bytes
    left = min(psutil.virtual_memory().available, container_bytes())
    if needed > left:
        raise DataError(
            f"{source}: the file has {size_bytes / 1e9:.2f} GB, which take about "
            f"{needed / 1e9:.1f} GB of memory, and {left / 1e9:.1f} GB are left. {why}"
        )


def container_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left in the control groups of this process (cgroup v2): the container's, and
    that of its systemd unit; no limit without one."""
    return min(_group_bytes(folder) for folder in _groups(group, Path("/proc/self/cgroup")))


def _groups(root: Path, own: Path) -> list[Path]:
    """Return the folders of the control groups that this process is in, the root's included.

    Parameters
    ----------
    own : Path
        The file that names the process's group, as `0::/system.slice/agent.service`.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    inside = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    parts = [part for part in inside.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:count]) for count in range(len(parts) + 1)]


def _group_bytes(group: Path) -> int:
    """Return the bytes left in a control group; cached files, which it gives back, are left."""
    try:
        limit, used = ((group / f"memory.{n}").read_text().strip() for n in ("max", "current"))
        table = (group / "memory.stat").read_text() if (group / "memory.stat").exists() else ""
    except OSError:
        return sys.maxsize
    if limit == "max":
        return sys.maxsize
    counts = dict(line.split() for line in table.splitlines())
    cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    return max(0, int(limit) - max(0, int(used) - cached))
