"""The files of a finished run, each read once: its hash, and values with where they stand."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from grandrounds.config.recipes import flatten
from grandrounds.config.words import command
from grandrounds.errors import RunDirectoryError, first_line
from grandrounds.server.described import engine_options
from grandrounds.storage import sha256_of
from grandrounds.study.report.read import RunFiles, read_run
from grandrounds.study.tables import is_number

SUMMARY, SITES, LEDGER, METRICS = "summary.json", "sites.json", "ledger.json", "metrics.jsonl"
CONFIG, PLAN, ENVIRONMENT = "config.toml", "plan.json", "environment.json"

NEEDED = (CONFIG, METRICS, SITES, LEDGER, PLAN, ENVIRONMENT)
"""Files that every run that has ended has, beside its summary."""

EACH = "*"
"""Part of a pointer that stands for every entry of a list."""


ABSENT = " (not in the file)"
"""End of a key that config.toml lacks, since its version had none: what that version did."""


@dataclass(frozen=True)
class Source:
    """Where a line comes from."""

    file: str
    """Relative to the run directory."""
    sha256: str
    """Of the file; empty if it is not there."""
    at: str
    """JSON pointer (RFC 6901, and `*` for every entry), after `line N ` in a file of lines; in
    config.toml the key; empty for the whole file."""


@dataclass(frozen=True)
class Fact:
    """A value in a file; None if it is not there."""

    value: Any
    source: Source

    def __getitem__(self, key: str | int) -> Fact:
        """Return the entry of a mapping or a list."""
        found = None
        if isinstance(self.value, dict) and isinstance(key, str):
            found = self.value.get(key)
        elif isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            found = self.value[key]
        return Fact(found, self._below(str(key)))

    def each(self, key: str) -> Fact:
        """Return the distinct values under a key of the entries of a list, in order."""
        found = [entry[key] for entry in self.listed() if key in entry]
        return Fact(list(dict.fromkeys(map(str, found))), self._below(EACH, key))

    def _below(self, *keys: str) -> Source:
        parts = "".join(f"/{key.replace('~', '~0').replace('/', '~1')}" for key in keys)
        divided = "" if self.source.at.endswith("/") or "/" in self.source.at else " "
        at = f"{self.source.at}{divided}{parts}" if self.source.at else parts
        return Source(self.source.file, self.source.sha256, at)

    def __bool__(self) -> bool:
        """Whether it is there."""
        return self.value is not None

    def number(self) -> float:
        """Return a finite number."""
        if not is_number(self.value):
            raise self.fault("a number")
        return self.value

    def whole(self) -> int:
        """Return an integer."""
        if type(self.value) is not int:
            raise self.fault("an integer")
        return self.value

    def text(self) -> str:
        """Return a string."""
        if not isinstance(self.value, str):
            raise self.fault("a string")
        return self.value

    def mapping(self) -> Mapping[str, Any]:
        """Return an object; empty if it is not there."""
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self.fault("an object")
        return self.value

    def listed(self) -> Sequence[Any]:
        """Return a list; empty if it is not there."""
        if self.value is None:
            return []
        if not isinstance(self.value, list):
            raise self.fault("a list")
        return self.value

    def entries(self) -> Iterator[tuple[str, Fact]]:
        """Yield key and fact of an object's entries."""
        for key in self.mapping():
            yield key, self[key]

    def facts(self) -> Iterator[Fact]:
        """Yield the entries of a list."""
        for i in range(len(self.listed())):
            yield self[i]

    def fault(self, wanted: str) -> RunDirectoryError:
        """Return the error of a value that no run writes."""
        where = f"{self.source.file} {self.source.at}".strip()
        found = "missing" if self.value is None else f"{str(self.value)[:60]!r}"
        return RunDirectoryError(
            f"{where} is {found}, not {wanted} as a run writes it: the run directory is damaged or "
            "was edited. Restore the file from a copy."
        )


@dataclass
class Record:
    """A run directory that has ended, and which of its files were used."""

    run: RunFiles
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    """File that was used → SHA-256 and size in bytes."""
    _content: dict[str, Fact] = field(default_factory=dict)

    def _read(self, name: str) -> bytes | None:
        file = self.run.path / name
        if not file.is_file():
            return None
        try:
            content = file.read_bytes()
        except OSError as error:
            raise RunDirectoryError(f"{file} cannot be read: {first_line(error)}.") from error
        self.files[name] = hashlib.sha256(content).hexdigest(), len(content)
        return content

    def json(self, name: str) -> Fact:
        """Return the content of a JSON file."""
        if name not in self._content:
            content = self._read(name)
            try:
                value = None if content is None else json.loads(content)
            except (ValueError, RecursionError) as error:
                raise RunDirectoryError(
                    f"{self.run.path / name} cannot be read as JSON ({first_line(error)}). "
                    "Restore it from a copy."
                ) from error
            self._content[name] = Fact(value, self.whole(name))
        return self._content[name]

    @cached_property
    def metrics(self) -> list[Fact]:
        """The lines of metrics.jsonl."""
        return self._lines(METRICS)

    @cached_property
    def unfinished(self) -> list[Fact]:
        """The lines of unfinished.jsonl; none if there is no such file."""
        return self._lines("unfinished.jsonl")

    def _lines(self, name: str) -> list[Fact]:
        content = self._read(name) or b""
        sha256 = self.whole(name).sha256
        lines = content.split(b"\n")[:-1]  # that they can be read, `record_of` has seen
        return [
            Fact(json.loads(line), Source(name, sha256, f"line {i}"))
            for i, line in enumerate(lines, 1)
            if line.strip()
        ]

    def key(self, key: str) -> Fact:
        """Return a configuration key's value; its place says if config.toml lacks the key."""
        at = key if key in self._written else f"{key}{ABSENT}"
        return Fact(self.run.config.flat()[key], Source(CONFIG, self.files[CONFIG][0], at))

    @cached_property
    def _written(self) -> frozenset[str]:
        """The keys in config.toml: that of an earlier version lacks some."""
        content = self._read(CONFIG) or b""
        return frozenset(flatten(tomllib.loads(content.decode())))

    def whole(self, name: str) -> Source:
        """Return a file as a source; its hash is empty if it is not there."""
        return Source(name, self.files.get(name, ("", 0))[0], "")

    def binary(self, name: str) -> Source:
        """Return a file that is only hashed."""
        file = self.run.path / name
        self.files[name] = sha256_of(file), file.stat().st_size
        return self.whole(name)

    @property
    def summary(self) -> Fact:
        """The content of summary.json."""
        return self.json(SUMMARY)

    @property
    def sites(self) -> Fact:
        """The content of sites.json."""
        return self.json(SITES)

    def name(self, site: int | str) -> str:
        """Return how a site is called."""
        if isinstance(site, str) and not site.isdecimal():
            return site
        return self.run.names[int(site)]


def record_of(path: Path) -> Record:
    """Return the record of a run directory.

    Raises
    ------
    RunDirectoryError
        If it is none, the run has not ended, or one of its files is damaged or missing.
    """
    run = read_run(path)
    if run.unread:
        raise RunDirectoryError(
            f"{run.path} is damaged, and a dossier is only of what can be read in full: "
            f"{run.unread[0]}. Restore the file from a copy, or resume the run, which mends it."
        )
    if not (run.path / SUMMARY).is_file():
        resume = command("grandrounds", "run", "--resume", run.path) + engine_options(run.sites)
        raise RunDirectoryError(
            f"{run.path} has no {SUMMARY}: the run is in progress, or was killed. A dossier is of "
            f"a run that has ended; to continue a killed one: {resume}"
        )
    if missing := [name for name in NEEDED if not (run.path / name).is_file()]:
        raise RunDirectoryError(
            f"{run.path} is damaged: {', '.join(missing)} is missing, and a dossier is only of "
            "what can be read in full. Restore it from a copy."
        )
    return Record(run)
