"""Recompute every figure of pages, cards, trackers and evaluations from the raw files of runs.

    python scripts/check_figures runs/first                      its page, cards and event files
    python scripts/check_figures runs/first runs/second --page three.html
    python scripts/check_figures comparisons/wards
    python scripts/check_figures runs/first/evaluation --printed evaluate.txt

Nothing of the package is used but the files; statistics are SciPy's, and epsilons dp-accounting's.
A number on a page that no rule explains is a finding.
Exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.check_figures.check import EVALUATION, check


def main() -> int:
    """Check what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", type=Path, help="runs, a comparison, an evaluation")
    parser.add_argument("--page", type=Path, help="default: report.html in the first source")
    parser.add_argument("--calls", type=Path, help="recorded calls of a tracker, JSON lines")
    parser.add_argument("--printed", type=Path, help="what grandrounds evaluate has printed")
    given = parser.parse_args()
    page = given.page or given.sources[0] / "report.html"
    if not page.is_file() and not (given.sources[0] / EVALUATION).is_file():
        parser.error(f"{page} is not there: write it with grandrounds report, or give --page.")
    findings = 0
    for name, sheet in check(given.sources, page, given.calls, given.printed).items():
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(sheet.checked.items()) if n)
        print(f"{name}: {sheet.checked.total():,} figures right ({kinds})")
        for finding in sheet.findings:
            print(f"  {finding}")
        findings += len(sheet.findings)
    print(f"{findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
