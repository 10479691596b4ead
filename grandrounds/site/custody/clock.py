"""A clock for quotas that runs with the machine: no jump of the wall clock locks or frees them.

Between two readings under one boot, the seconds since boot count. Over a reboot nothing better is
known than the wall clock, which then counts forwards only, and at most one day.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

DAY_SECONDS = 24 * 3600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def utc_text() -> str:
    """Return the time now in UTC, as the logs of a site write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(frozen=True)
class Reading:
    """What the clocks showed at one moment, in seconds."""

    site: float
    """Seconds since the site's first message; never goes back."""
    wall: float
    """Seconds since 1970, as the machine believes."""
    boot: float
    """Seconds since the machine booted, suspension included."""
    boot_id: str
    """Identifies the boot; empty where the system does not tell."""


def first_reading() -> Reading:
    """Return the clocks now, the site's own at 0."""
    return Reading(0.0, time.time(), _since_boot(), _boot())


def next_reading(last: Reading) -> Reading:
    """Return the clocks now, the site's own advanced by what has passed since the last reading."""
    return _advanced(last, time.time(), _since_boot(), _boot())


def _advanced(last: Reading, wall: float, boot: float, boot_id: str) -> Reading:
    if boot_id == last.boot_id and boot >= last.boot:
        passed = boot - last.boot
    else:  # another boot: it began after the last reading, so its seconds have passed for certain
        passed = max(boot, min(max(wall - last.wall, 0.0), DAY_SECONDS))
    return Reading(last.site + passed, wall, boot, boot_id)


def _since_boot() -> float:
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
