"""Texts in a `.txt` file: one a paragraph, as blank lines divide it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from grandrounds.data.forms import TEXT


def paragraphs(file: Iterable[bytes]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of its first line and the text of each paragraph, in the column `text`.

    Raises
    ------
    UnicodeDecodeError
        If a line is not UTF-8.
    """
    lines: list[str] = []
    first = 1
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
        if text:
            first = first if lines else number
            lines.append(text)
        elif lines:
            yield first, {TEXT: "\n".join(lines)}
            lines = []
    if lines:
        yield first, {TEXT: "\n".join(lines)}
