"""What was asked and answered, written line by line, so that a stopped evaluation goes on.

settings.json                                what decides the answers
answers_{model}_{benchmark}_{protocol}.jsonl one line an answer, in the order asked
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grandrounds.errors import RunDirectoryError

SETTINGS = "settings.json"
"""File of what decides the answers: equal settings, equal answers."""

RESULT = "evaluation.json"
"""File of the result."""

Record = dict[str, Any]
"""One answer; `row` is the item's, `order` which order of the options was shown (0: published)."""


def answers_name(model: str, benchmark: str, protocol: str) -> str:
    """Return the file name of one model's answers to one benchmark."""
    return f"answers_{model}_{benchmark}_{protocol}.jsonl"


def open_folder(out: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a new evaluation, or check that an old one can go on.

    Raises
    ------
    RunDirectoryError
        If a new evaluation would write over another; if there is none to resume, or it was started
        with other settings, which are named; or if the folder cannot be written.
    """
    file = out / SETTINGS
    if not resume:
        if file.exists() or (out / RESULT).exists():
            raise RunDirectoryError(
                f"{out} holds another evaluation: continue it with --resume, or choose another "
                "folder with --out"
            )
        make_folder(out)
        write_json(file, settings)
        return
    if not file.is_file():
        raise RunDirectoryError(f"{out} holds no evaluation to resume; leave --resume out")
    if found := _differences(_read_settings(file), settings):
        raise RunDirectoryError(
            f"{out} was started with other settings: {'; '.join(found)}. Resume without these "
            "changes, or choose another folder with --out."
        )


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(
            f"{file} cannot be read ({error}); choose another folder with --out"
        ) from error
    return before if isinstance(before, dict) else {}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `setting: old → new` for every setting that differs."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}, ")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder without permission into one clear error."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be written: {error.strerror or error}. Free some space, or choose "
            "another folder with --out; answers that were written are kept (--resume)."
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_json(file: Path, data: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    with writing(file):
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(file)


class AnswerFile:
    """The answers of one model to one benchmark, in memory and on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = self._read()

    def _read(self) -> dict[tuple[int, int], Record]:
        """Return the whole lines by (order, row), and cut off what a kill left half-written."""
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.path, len(whole))
        records = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                records[record["order"], record["row"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise RunDirectoryError(
                    f"{self.path}, line {number}: this is no recorded answer. Remove the line and "
                    "resume; its item is asked again."
                ) from error
        return records

    def append(self, records: Iterable[Record]) -> None:
        """Write down a batch of answers."""
        batch = list(records)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in batch)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
        self.records |= {(record["order"], record["row"]): record for record in batch}

    def ordered(self, order: int = 0) -> list[Record]:
        """Return the answers under one order of the options, by the item's row."""
        return [self.records[key] for key in sorted(self.records) if key[0] == order]
