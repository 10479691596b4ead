"""Versions and machine, for the record of a run."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import grandrounds


def environment() -> dict[str, Any]:
    """Return versions and machine, for the record."""
    packages = ("flwr", "torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy")
    return {
        "grandrounds": grandrounds.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: installed_version(p) for p in packages},
    }


def installed_version(package: str) -> str | None:
    """Return a package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
