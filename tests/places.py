"""Where the checkout and the shared data lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

SHARED = ROOT.parent / "shared" / "data"
"""Real data and recorded outputs beside the checkout; tests that need them skip without."""
