"""The audit log: one JSON line for everything that a site was asked, and what left it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "audit.jsonl"
MOST_CHARACTERS = 2000
"""Of a text, which may be what a message brought."""


def write(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append a line with the time in UTC; it is on disk when this returns.

    The file belongs to the agent alone (mode 0600).
    """
    short = {k: v[:MOST_CHARACTERS] if isinstance(v, str) else v for k, v in entry.items()}
    stamped = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **short}
    line = (json.dumps(stamped) + "\n").encode()  # ASCII: no line break but the last
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
