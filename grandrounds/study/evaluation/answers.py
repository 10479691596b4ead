"""Answers on disk, appended as they are computed, so that an evaluation can be resumed.

settings.json                                everything that determines the answers
answers_{model}_{benchmark}_{protocol}.jsonl one answer per line, in the order computed
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.errors import ConfigError, RunDirectoryError

SETTINGS = "settings.json"
"""File of the settings that determine the answers."""

RESULT = "evaluation.json"
"""File of the result."""

Record = dict[str, Any]
"""One answer. `row` is the item's row, `order` the order of its options (0: as published)."""


def answers_name(model: str, benchmark: str, protocol: str) -> str:
    """Return the file name of one model's answers to one benchmark."""
    return f"answers_{model}_{benchmark}_{protocol}.jsonl"


def open_folder(out: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Create the folder of a new evaluation, or check that an existing one can be resumed.

    Raises
    ------
    RunDirectoryError
        If a new evaluation would overwrite another; if there is none to resume, or its settings
        differ; or if the folder cannot be written.
    """
    file = out / SETTINGS
    if not resume:
        if file.exists() or (out / RESULT).exists():
            raise RunDirectoryError(
                f"{out} already contains an evaluation: continue it with --resume, or choose "
                "another folder with --out"
            )
        write_json(file, settings)
        return
    if not file.is_file():
        raise RunDirectoryError(f"{out} has no evaluation to resume; omit --resume")
    try:
        before = storage.read_json(file)
    except ConfigError as error:
        raise RunDirectoryError(f"{error} Choose another folder with --out.") from error
    if found := _differences(before, settings):
        raise RunDirectoryError(
            f"{out} was started with other settings: {'; '.join(found)}. Resume without these "
            "changes, or choose another folder with --out."
        )


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


def writing(path: Path) -> AbstractContextManager[None]:
    """Turn a failure to write to `path` into one `RunDirectoryError`."""
    return storage.writing(
        str(path),
        "Free some disk space, or choose another folder with --out; recorded answers are kept "
        "(--resume).",
        RunDirectoryError,
    )


def write_json(file: Path, data: Any) -> None:
    """Write a JSON file atomically, and create its folder if needed."""
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(file, data)


class AnswerFile:
    """The answers of one model to one benchmark, in memory and on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = self._read()

    def _read(self) -> dict[tuple[int, int], Record]:
        """Return the complete lines by (order, row), and truncate a partial last line."""
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
                    f"{self.path}, line {number}: not a recorded answer. Remove the line and "
                    "resume; its item is asked again."
                ) from error
        return records

    def append(self, records: Iterable[Record]) -> None:
        """Record a batch of answers."""
        batch = list(records)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in batch)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
        self.records |= {(record["order"], record["row"]): record for record in batch}

    def ordered(self, order: int = 0) -> list[Record]:
        """Return the answers to one order of the options, by row."""
        return [self.records[key] for key in sorted(self.records) if key[0] == order]
