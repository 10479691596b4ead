#!/usr/bin/env python3
"""Play the tutorials: every command of their pages, in order, in a fresh folder and offline.

    scripts/tutorials.py                   all of them
    scripts/tutorials.py own-data          some of them, by the names of their pages

Every `bash` and `python` block of a page is run as it stands, without network where a new network
namespace is permitted, else without the model hub. A comment above a block says why one is not run,
and it is counted: `<!-- not run: it needs a GPU -->`. A block after `<!-- with the base NAME -->`
is run where that base is. The first failure ends the script with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ("quickstart", "own-data", "leaderboard-entry", "three-hospitals")
"""Pages of docs/, in the order of the site."""

_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|with the base)[: ]+(?P<what>[^>]*?) -->\n+)?"
    r"^```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    language: str
    """`bash` or `python`."""
    code: str
    not_run: str = ""
    """Why it is not run; empty if it is."""
    base: str = ""
    """The base that it needs; empty if none."""


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page of docs/, in order."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        marked = {match["mark"]: match["what"]}
        not_run, base = marked.get("not run", ""), marked.get("with the base", "")
        found.append(Block(match["language"], match["code"], not_run, base))
    return found


def play(page: str, folder: Path) -> tuple[int, int]:
    """Run a page's blocks in a folder; return how many were run, and how many not.

    Raises
    ------
    subprocess.CalledProcessError
        If one fails.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    began, counts = time.monotonic(), [0, 0]
    for block in blocks_of(page):
        reason = block.not_run
        if block.base and not has_base(block.base):
            reason = f"the base {block.base} is not on this machine"
        counts[bool(reason)] += 1
        print(f"\n== {page}{f', not run: {reason}' if reason else ''}", flush=True)
        print(block.code.rstrip("\n"), flush=True)
        if reason:
            continue
        print("--", flush=True)
        program = ["bash", "-euo", "pipefail", "-c"]
        program = program if block.language == "bash" else [sys.executable, "-c"]
        started = time.monotonic()
        subprocess.run([*offline(), *program, block.code], cwd=folder, env=environment, check=True)
        now = time.monotonic()
        print(f"-- {now - started:.0f} s, {now - began:.0f} s since the start", flush=True)
    return counts[0], counts[1]


def has_base(name: str) -> bool:
    """Whether a base is on this machine."""
    from grandrounds.config.bases import folder_of

    return folder_of(name) is not None


def offline() -> list[str]:
    """Return the words before a command that leave it the loopback network alone, if permitted."""
    alone = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    for words in (["unshare", "-n", *alone], ["unshare", "-rn", *alone]):
        try:
            if not subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
                return words
        except FileNotFoundError:
            break
    return []


def main(arguments: Sequence[str] | None = None) -> None:
    """Play the tutorials, each in a folder of its own that is removed afterwards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", nargs="*", default=list(TUTORIALS), help="names of pages")
    pages = parser.parse_args(arguments).pages
    sums = []
    for page in pages:
        with tempfile.TemporaryDirectory(prefix="tutorial-") as folder:
            try:
                sums.append((page, *play(page, Path(folder))))
            except subprocess.CalledProcessError as error:
                sys.exit(f"{page}: a block ended with exit code {error.returncode}")
    for page, run, not_run in sums:
        print(f"{page}: {run} blocks run, {not_run} not run")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
