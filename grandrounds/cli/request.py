"""What a command prints before it starts: notes and warnings."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def tell(lines: Iterable[str], kind: str = "note", *, aside: bool = False) -> None:
    """Print notes or warnings, one line each.

    Parameters
    ----------
    aside : bool
        Whether to print on standard error, since standard output is read by a program.
    """
    for line in lines:
        print(f"{kind}: {line}", file=sys.stderr if aside else sys.stdout, flush=True)
