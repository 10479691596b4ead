"""The licence of a base model, as its own card states it in the files of this machine."""

from __future__ import annotations

import re
from pathlib import Path

from grandrounds.config.bases import KNOWN_BASES, hub_name
from grandrounds.model.base import model_location

_METADATA = re.compile(r"\A---\r?\n(.*?)^---", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(
    r"""^(license(?:_name|_link)?):[ ]*(["']?)([^\s"'\[\]{}]+)\2[ \t]*\r?$""", re.MULTILINE
)
_MOST_CHARACTERS = 20_000


def licence_of(source: str) -> dict[str, str]:
    """Return `license`, and `license_name` and `license_link` of an unlisted one, as the hub has
    them; empty if they are not known here.

    Nothing is downloaded: the card is read from the base's folder, or from the hub's cache.
    """
    name, revision = hub_name(source)
    if known := KNOWN_BASES.get(name):
        return {"license": known.licence.lower()}
    card = Path(model_location(source)) / "README.md"
    if not card.parent.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "README.md", revision=revision or None)
        if not isinstance(cached, str):
            return {}
        card = Path(cached)
    try:
        with card.open(encoding="utf-8") as text:
            metadata = _METADATA.match(text.read(_MOST_CHARACTERS))
    except (OSError, ValueError):  # no card, or none that the hub would read
        return {}
    told = {key: value for key, _, value in _LICENCE.findall(metadata[1])} if metadata else {}
    return told if "license" in told else {}
