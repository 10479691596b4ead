"""Recomputes a dossier from the files of its run, and tells every line and file that differs.

It shows that a dossier says what the files say, not that nobody changed files and dossier alike:
for that, compare the digest with one that was noted elsewhere, such as on paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grandrounds
from grandrounds import storage
from grandrounds.errors import DataError, RunDirectoryError
from grandrounds.study.dossier.build import dossier_of
from grandrounds.study.dossier.lines import FORMAT, digest_of
from grandrounds.study.dossier.written import check_jinja, run_in

MOST = 200
"""Characters of a value that a finding shows."""


@dataclass(frozen=True)
class Verdict:
    """What a verification found."""

    findings: Sequence[str]
    """What differs, one sentence each; none: the dossier is that of the files."""
    lines: int
    """Number of lines that were compared."""
    files: int
    digest: str

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not self.findings


def verify(target: Path, file: Path) -> Verdict:
    """Compare a dossier, page or JSON, with the files of a run.

    Raises
    ------
    DataError
        If the file cannot be read, or is no dossier.
    """
    check_jinja()
    run = run_in(target)
    text = _text_of(file)
    content, findings = _content_of(file, text)
    findings += _changed_files(run, content)
    try:
        now = dossier_of(run).as_dict()
    except RunDirectoryError as error:
        findings.append(f"run: {error}")
    else:
        findings += _changed_lines(content, now)
        if not findings and now["digest"] != content["digest"]:
            findings.append("dossier: it is not the one of these files")
    if findings and content["made-by"] != (by := f"grandrounds {grandrounds.__version__}"):
        findings.append(f"version: written by {content['made-by']}, verified by {by}")
    lines = sum(len(section["lines"]) for section in content["sections"])
    return Verdict(findings, lines, len(content["files"]), str(content["digest"]))


def _text_of(file: Path) -> str:
    try:
        return file.expanduser().read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a dossier: {error}.") from error


def _content_of(file: Path, text: str) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a page or a JSON file, and how that file was edited."""
    from jinja2 import TemplateError

    from grandrounds.study.dossier.page import content_inside, html

    is_page = text.lstrip()[:1] == "<"
    try:
        content = json.loads(content_inside(text) if is_page else text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        digest = digest_of(content)
        again = html(content)
        _ = content["made-by"], content["digest"], list(_values(content))
        files = [(entry["sha256"], entry["bytes"]) for entry in content["files"].values()]
        _ = len(files)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        TemplateError,
    ) as error:
        raise DataError(
            f"{file} is not a dossier that grandrounds wrote, or was edited so that it cannot be "
            f"read ({type(error).__name__}). Write it anew: grandrounds dossier RUN_DIR."
        ) from error
    findings = []
    if digest != content["digest"]:
        findings.append("dossier: it was edited, its content is not that of its digest")
    if is_page and text != again:
        findings += _edited_rows(text, again)
    elif not is_page and text.encode() != storage.json_bytes(content):
        findings.append("dossier: its JSON was edited, or written anew by something else")
    return content, findings


def _edited_rows(page: str, again: str) -> Iterator[str]:
    """Yield what differs between a page and the one that its own content gives."""
    from grandrounds.study.dossier.page import rows

    shown, meant = rows(page), rows(again)
    edited = [key for key in {**meant, **shown} if shown.get(key) != meant.get(key)]
    for key in edited:
        yield f"page: the line at #{key} was edited"
    if not edited:
        pairs = zip([*page.splitlines(), ""], [*again.splitlines(), ""], strict=False)
        differs = next((found for found, wanted in pairs if found != wanted), "")
        yield f"page: it was edited outside its lines, near {_short(differs.strip())!r}"


def _changed_files(run: Path, content: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in content["files"].items():
        file = run / name
        if not file.is_file():
            yield f"file {name}: it is not there"
        elif (sha256 := storage.sha256_of(file)) != entry["sha256"]:
            yield f"file {name}: SHA-256 was {entry['sha256']}, is {sha256}"


def _values(content: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield (name, parts) of every line: value, how, and sources without their hashes."""
    for section in content["sections"]:
        for one in section["lines"]:
            sources = [(source["file"], source["at"]) for source in one["sources"]]
            yield f"{section['title']}, {one['item']}", (one["value"], one["how"], sources)


def _changed_lines(content: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that the files say otherwise."""
    was, is_now = dict(_values(content)), dict(_values(now))
    for name, parts in was.items():
        found = is_now.get(name)
        if found is None:
            yield f"line {name}: was {_short(parts[0])!r}, is no longer there"
        elif found[0] != parts[0]:
            yield f"line {name}: was {_short(parts[0])!r}, is {_short(found[0])!r}"
        elif found != parts:
            yield f"line {name}: it names another source or another way to compute it"
    for name, parts in is_now.items():
        if name not in was:
            yield f"line {name}: was not there, is {_short(parts[0])!r}"
    for key in ("title", "guidelines", "numbering", "sbom"):
        if content.get(key) != now[key]:
            yield f"{key}: it is not that of the files"


def _short(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"
