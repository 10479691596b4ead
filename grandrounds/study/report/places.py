"""Takes folders out of texts before they are written: reports and dossiers may be published."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grandrounds.study.report.figures import Page

_PATH = re.compile(
    r"(?<![\w.:/<~*\\-])/(?:[^\s/'\"<>|:;,()]+/)+(?=[^\s/'\"<>|:;,()])"  # /home/me/
    r"|\b[A-Za-z]:\\(?:[^\s\\'\"<>|:;,()]+\\)+"  # C:\Users\me\
)
"""The folders of an absolute path; its last part stays."""


def published(page: Page, folders: Mapping[str, str]) -> Page:
    """Return a page in which no text names an absolute path; see `without_folders`."""
    page_shown: Page = _mapped(page, without_folders(folders))
    return page_shown


def without_folders(folders: Mapping[str, str]) -> Callable[[str], str]:
    """Return what takes absolute paths out of a text.

    Parameters
    ----------
    folders
        Absolute path → what stands in its place, for paths that are known (they may have spaces).
        Of any other only the last part is kept.
    """
    known = sorted(((path, name) for path, name in folders.items() if path), reverse=True)

    def shown(text: str) -> str:
        for path, name in known:
            text = text.replace(path, name)
        return _PATH.sub("", text)

    return shown


def _mapped(part: Any, shown: Callable[[str], str]) -> Any:
    """Return a text, sequence or dataclass with every text in it replaced."""
    if isinstance(part, str):
        return shown(part)
    if isinstance(part, Sequence):
        made = [_mapped(one, shown) for one in part]
        return made if isinstance(part, list) else tuple(made)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {f.name: _mapped(getattr(part, f.name), shown) for f in dataclasses.fields(part)}
        return dataclasses.replace(part, **fields)
    return part
