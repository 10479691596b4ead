"""A line of a dossier, its sections, and the dossier with its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grandrounds.study.dossier.record import Fact, Source

FORMAT = "grandrounds-dossier-1"

NOT_RECORDED = "not recorded"
"""Value of a line that no file of the run answers."""


@dataclass(frozen=True)
class Line:
    """One fact."""

    item: str
    """Unique in its section."""
    value: str
    sources: tuple[Source, ...]
    how: str = ""
    """How the value was computed, if it does not stand in the file as it is; of a line that is not
    recorded, what would record it."""

    @property
    def is_recorded(self) -> bool:
        """Whether a file answers it."""
        return self.value != NOT_RECORDED


@dataclass(frozen=True)
class Section:
    """Lines that belong together."""

    key: str
    title: str
    lines: Sequence[Line]


def line(item: str, value: object, *facts: Fact | Source, how: str = "") -> Line:
    """Return a line with the facts that it comes from."""
    sources = tuple(one.source if isinstance(one, Fact) else one for one in facts)
    return Line(item, str(value), sources, how)


def open_line(item: str, would: str, *looked: Fact | Source) -> Line:
    """Return a line that is not recorded, with what would record it and where it was looked for."""
    return line(item, NOT_RECORDED, *looked, how=would)


def present(*lines: Line | None) -> list[Line]:
    """Return the lines that are not None."""
    return [one for one in lines if one is not None]


@dataclass(frozen=True)
class Answer:
    """An item of a guideline."""

    guideline: str
    item: str
    sections: tuple[str, ...]
    """Keys of the sections that answer it; empty: only people can."""
    state: str
    """`answered`, `not recorded` or `open`."""


@dataclass(frozen=True)
class Dossier:
    """All that a dossier says."""

    run: str
    """Name of the run directory."""
    title: str
    version: str
    """Of the package that made it."""
    sections: Sequence[Section]
    answers: Sequence[Answer]
    numbering: Mapping[str, str]
    """Guideline → where it stands, and which text its numbers come from."""
    sbom: Mapping[str, Any]
    """CycloneDX 1.6."""
    files: Mapping[str, tuple[str, int]]
    """File → SHA-256 and size in bytes."""

    def lines(self) -> Iterable[tuple[Section, Line]]:
        """Yield every line with its section."""
        for section in self.sections:
            for one in section.lines:
                yield section, one

    def as_dict(self) -> dict[str, Any]:
        """Return the dossier for JSON, with its digest."""
        content = {
            "format": FORMAT,
            "made-by": f"grandrounds {self.version}",
            "run": self.run,
            "title": self.title,
            "sections": [asdict(section) for section in self.sections],
            "guidelines": [asdict(answer) for answer in self.answers],
            "numbering": dict(self.numbering),
            "files": {
                name: {"sha256": sha256, "bytes": size}
                for name, (sha256, size) in sorted(self.files.items())
            },
            "sbom": dict(self.sbom),
        }
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return {**plain, "digest": digest_of(plain)}


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a dossier's content without its digest: JSON, sorted, no spaces."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
