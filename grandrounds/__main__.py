"""The `grandrounds` command; a missing extra is reported in one line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from grandrounds.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        print(
            f"grandrounds: the command line needs {error.name}, which is not installed: "
            'pip install "grandrounds[all]"',
            file=sys.stderr,
        )
        sys.exit(1)
    app()


if __name__ == "__main__":
    main()
