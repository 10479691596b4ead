"""Paths of the checkout and of the shared data."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

SHARED = ROOT.parent / "shared" / "data"
"""Real data and recorded outputs beside the checkout; tests that need them are skipped without."""
