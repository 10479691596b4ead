"""The tiny bases of `benchmarks/architectures.py`, and the script itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.places import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import architectures
import tiny_bases

__all__ = ["architectures", "saved_config", "tiny_bases"]


def saved_config(name: str, folder: Path) -> str:
    """Save the configuration of a tiny base, without weights; return the folder."""
    config: Any = tiny_bases.config_of(tiny_bases.BASES[name])
    config.save_pretrained(folder)
    return str(folder)
