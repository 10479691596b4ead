"""Prompt templates of one's own: a file where a run is started, its text everywhere else.

The text is the value of `data.prompt-template`, so that it is in the recipe, in its hash, in the
run directory and in what sites are asked. Only recipes and overrides name files, where a command
reads them: a server cannot make a site read one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grandrounds.config.values import OneOf, Scalar
from grandrounds.config.words import has_controls
from grandrounds.errors import ConfigError, documented, nearest
from grandrounds.storage import expanded, read_bytes

KEY = "data.prompt-template"

BUILT_IN = ("alpaca", "chat", "text")
"""Templates that are no files."""

PACKAGED = Path(__file__).resolve().parent.parent / "data" / "prompt_templates"
"""Folder of the templates that have a name, each with the ending `.jinja`."""

ENDINGS = (".jinja", ".jinja2", ".j2", ".txt")

MOST_CHARACTERS = 4096
"""Longest template; a site takes no longer text in a recipe."""

SHORT = 12
"""Digits of a hash that are shown."""


def is_own(value: str) -> bool:
    """Whether a value of `data.prompt-template` is the text of a template."""
    return "{{" in value


def is_usable_text(value: str) -> bool:
    """Whether a value is the text of a template: printable, with line feeds, and not too long."""
    plain = value.replace("\n", "").replace("\t", "")
    return is_own(value) and len(value) <= MOST_CHARACTERS and not has_controls(plain)


@dataclass(frozen=True)
class TemplateText(OneOf):
    """One of the listed values, or the text of a prompt template."""

    def admits(self, value: Scalar) -> bool:
        """Whether `value` is listed, or the text of a template."""
        return super().admits(value) or (isinstance(value, str) and is_usable_text(value))

    def __str__(self) -> str:
        named = ", ".join(repr(name) for name in packaged())
        return f"{super().__str__()}, {named}, or the file of a template, which commands read"


def sha256_of(text: str) -> str:
    """Return the hash of a template's text, 64 hex digits: that of its file with line feeds."""
    return hashlib.sha256(text.encode()).hexdigest()


def name_of(value: str) -> str:
    """Return a template's name, or the beginning of the hash of one's own."""
    return f"own template {sha256_of(value)[:SHORT]}" if is_own(value) else value


def identity_of(value: str) -> str:
    """Return what a site's policy lists for a template: its name, or the hash of one's own."""
    return sha256_of(value) if is_own(value) else value


def identities(words: Sequence[str]) -> tuple[str, ...]:
    """Return the identities that names and hashes in a policy stand for.

    A packaged template's name stands for the text of this installation.
    """
    known = packaged()
    return tuple(
        sha256_of(read_template(PACKAGED / f"{word}.jinja")) if word in known else word
        for word in words
    )


def is_listable(word: str) -> bool:
    """Whether a word can stand in a policy's list of templates."""
    return word in (*BUILT_IN, *packaged()) or re.fullmatch("[0-9a-f]{64}", word) is not None


def packaged() -> tuple[str, ...]:
    """Return the names of the packaged templates."""
    return tuple(sorted(file.stem for file in PACKAGED.glob("*.jinja")))


def with_text(values: Mapping[str, Scalar], beside: Path | None = None) -> dict[str, Scalar]:
    """Return settings with the text of the template that they name, if it is a file or packaged.

    Parameters
    ----------
    beside : Path, optional
        Folder of the recipe, where a file is looked for that the working directory does not have.

    Raises
    ------
    ConfigError
        If the file is missing, cannot be read, is empty or is not the text of a template.
    """
    out = dict(values)
    named = out.get(KEY)
    if not isinstance(named, str) or named in BUILT_IN or is_own(named):
        return out
    if named in packaged():
        out[KEY] = read_template(PACKAGED / f"{named}.jinja")
    elif named.lower().endswith(ENDINGS) or "/" in named or "\\" in named:
        out[KEY] = read_template(_found(named, beside))
    return out


def _found(named: str, beside: Path | None) -> Path:
    path = expanded(named)
    if path.is_dir():
        raise ConfigError(f"{KEY} = {named!r} is a folder: name a file of it.")
    if not path.is_file() and beside and not path.is_absolute() and (beside / path).is_file():
        return beside / path
    if not path.is_file():
        there = sorted(f.name for f in path.parent.iterdir()) if path.parent.is_dir() else []
        raise ConfigError(
            f"{KEY} = {named!r}: there is no such file.{nearest(path.name, there)} Give a file "
            f"({', '.join(ENDINGS)}), or one of {', '.join((*BUILT_IN, *packaged()))}."
        )
    return path


def read_template(path: Path) -> str:
    """Return the text of a template's file: UTF-8, with line feeds.

    Raises
    ------
    ConfigError
        If it cannot be read, is no text, is empty, too long, or has no place for the answer.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not UTF-8. Save it so.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ConfigError(f"{path} is empty: write a prompt template ({documented('data')}).")
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"{path} has {len(text):,} characters, of at most {MOST_CHARACTERS:,} that a prompt "
            "template may have. Shorten it: each example repeats it."
        )
    if not is_own(text):
        raise ConfigError(
            f"{path} has no place for question and answer: write {{{{ question }}}} and "
            f"{{{{ answer }}}} where they go ({documented('data')})."
        )
    if not is_usable_text(text):
        raise ConfigError(f"{path} holds a control character: remove it.")
    return text
