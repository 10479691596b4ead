"""The audit log: one JSON line for each request to the site, and what left the site."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "audit.jsonl"
MOST_CHARACTERS = 2000
"""Maximum length of a string, which may come from a message."""


def write(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append a line with the time in UTC, and flush it to disk.

    Only the agent's user can read the file (mode 0600).
    """
    short = {k: v[:MOST_CHARACTERS] if isinstance(v, str) else v for k, v in entry.items()}
    stamped = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **short}
    line = (json.dumps(stamped) + "\n").encode()  # ASCII, with no other line break
    handle = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return all lines."""
    file = folder / FILE
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line]
