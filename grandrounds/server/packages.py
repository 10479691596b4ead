"""The packages installed beside a run's server, for packages.json: name, version, RECORD's hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache

PACKAGES = "packages.json"
"""File of a run directory."""


@cache
def installed() -> tuple[dict[str, str | None], ...]:
    """Return every installed distribution by name, once per process.

    `record-sha256` is the SHA-256 of the distribution's RECORD, which lists its files with theirs;
    None where there is none (PEP 376; packaging.python.org, "Recording installed projects").
    """
    found: dict[str, dict[str, str | None]] = {}
    for one in importlib.metadata.distributions():
        name, record = str(one.metadata["Name"]), one.read_text("RECORD")
        hashed = hashlib.sha256(record.encode()).hexdigest() if record else None
        # the first on the path is the one that is imported
        entry = {"name": name, "version": one.version, "record-sha256": hashed}
        found.setdefault(name.lower(), entry)
    return tuple(found[name] for name in sorted(found))
