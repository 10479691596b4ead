"""Starts the programs of a local consortium as they are asked for, below one keeper.

Run as a program of its own, by the keeper (`engines/keeper.py`):

    python -P launcher.py FOLDER

FOLDER/start/NAME.json, a JSON object with `command` and `log`, asks for a program; once it has
ended, FOLDER/ended/NAME holds its exit code. Both appear whole, by a rename.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

START, ENDED = "start", "ended"
POLL_SECONDS = 0.1
NOT_STARTED = 127
"""Exit code of a program that cannot be started, by shell convention."""


def launch(folder: Path) -> None:
    """Start what is asked for, and note what ends, until this process is ended."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    (folder / ENDED).mkdir(exist_ok=True)
    seen: set[str] = set()
    while True:
        for file in sorted((folder / START).glob("*.json")):
            if file.name not in seen:
                seen.add(file.name)
                _start(folder, file, running)
        for name, process in [*running.items()]:
            if (code := process.poll()) is not None:
                del running[name]
                note(folder, ENDED, name, str(code))
        time.sleep(POLL_SECONDS)


def _start(folder: Path, file: Path, running: dict[str, subprocess.Popen[bytes]]) -> None:
    asked = json.loads(file.read_text(encoding="utf-8"))
    with Path(asked["log"]).open("ab") as log:
        try:
            running[file.stem] = subprocess.Popen(
                asked["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        except OSError as error:
            log.write(f"{asked['command'][0]}: {error.strerror}\n".encode())
            note(folder, ENDED, file.stem, str(NOT_STARTED))


def note(folder: Path, kind: str, name: str, text: str) -> None:
    """Write a small file so that it appears whole."""
    (folder / kind).mkdir(exist_ok=True)
    partial = folder / f"{kind}-{name}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / kind / name)


if __name__ == "__main__":
    launch(Path(sys.argv[1]))
