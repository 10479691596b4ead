"""Reads a multiple-choice exam of the user's own: `question`, options and `answer` from one file.

The options are a list, a mapping from letter to text, or one column each (`A`, `B`, ...;
`option_a`, ...; `option_1`, ...). The answer is a letter, the index of an option counted from 0, or
the option's text. Anything that could be read in two ways is refused, never guessed, and all
problems of all files are reported together.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from grandrounds.data.files import RawRows, read_file
from grandrounds.data.places import TABLE_ENDINGS
from grandrounds.errors import ConfigError, DataError, first_line, nearest
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Task, sampled
from grandrounds.wire.names import one_line

Style = Literal["texts", "letters"]
"""How an exam is asked: whole options in the run's own prompt, or lettered options."""

STYLES: tuple[Style, ...] = ("texts", "letters")

PREFIX = "own-"
"""Start of an own exam's name in result files, so that it is never taken for a published one."""

INSTRUCTION = "Answer the following multiple-choice question with the letter of the correct option."

QUESTION, OPTIONS, ANSWER = "question", "options", "answer"

_OPTION_COLUMN = re.compile(r"(?:(?:option|choice|opt|op)[ _.-]?([a-z]|\d{1,2})|([a-z]))", re.I)

SHOWN_ROWS = 40
"""Row numbers printed for one kind of problem."""

SHOWN_PROBLEMS = 12
"""Kinds of problem printed for one file."""


def style_of(word: str) -> Style:
    """Return a style by its name; raise `ConfigError` if there is none."""
    for style in STYLES:
        if word == style:
            return style
    raise ConfigError(
        f"--benchmark-style {word!r}: allowed are {' and '.join(STYLES)}.{nearest(word, STYLES)}"
    )


def own_benchmark(name: str, title: str, style: Style, count: int) -> Benchmark:
    """Return an own exam of `count` items as a benchmark."""
    return Benchmark(
        name=name,
        title=title,
        expected_items=count,
        instruction=INSTRUCTION,
        whole_options=style == "texts",
        own=True,
    )


def load_own_exams(
    files: Sequence[Path], style: Style = "texts", limit: int | None = None
) -> tuple[Task, ...]:
    """Return the exams of some files, every row checked.

    Parameters
    ----------
    limit : int, optional
        Maximum number of items per file, as in `load_items`; the rows beyond are checked too.

    Raises
    ------
    ConfigError
        If two files have the same name, or an argument is out of range.
    DataError
        If a file cannot be read, lacks a column, or has rows that are no question with options and
        one correct answer; all problems of all files at once.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}; omit it to use every item")
    names = [PREFIX + _stem(file) for file in files]
    for name in names:
        if names.count(name) > 1:
            same = ", ".join(str(file) for file in files if PREFIX + _stem(file) == name)
            raise ConfigError(f"--benchmark files need different names: {same}. Rename one.")
    tasks, faults = [], []
    for file, name in zip(files, names, strict=True):
        try:
            items = read_exam(file)
        except DataError as error:
            faults.append(str(error))
            continue
        digest = hashlib.sha256(file.expanduser().read_bytes()).hexdigest()
        title = one_line(file.name)  # a name may hold what no text may, such as half a character
        benchmark = own_benchmark(name, title, style, len(items))
        tasks.append(Task(benchmark, sampled(items, limit), {"file": title, "sha256": digest}))
    if faults:
        raise DataError(" ".join(faults))
    return tuple(tasks)


def _stem(file: Path) -> str:
    """Return a file's name without its ending, fit for a file name."""
    lower = file.name.lower()
    ending = next(
        (end for end in sorted(TABLE_ENDINGS, key=len, reverse=True) if lower.endswith(end)), ""
    )
    return re.sub(r"[^\w.-]+", "-", file.name[: len(file.name) - len(ending)]) or "exam"


def read_exam(file: Path) -> tuple[Item, ...]:
    """Return the items of one file; see `load_own_exams`."""
    raw, layout = _read(file)
    rows = [
        dict(zip(raw.values, cells, strict=True))
        for cells in zip(*raw.values.values(), strict=True)
    ]
    indices = [index for row in rows if (index := _index(row[layout.answer])) is not None]
    from_zero = not indices or 0 in indices
    items: list[Item] = []
    problems: dict[str, list[int]] = {}
    for place, row in zip(raw.places, rows, strict=True):
        try:
            items.append(_item(place, layout, row, from_zero))
        except _RowError as problem:
            problems.setdefault(str(problem), []).append(place)
    if problems:
        bad = len(rows) - len(items)
        raise DataError(
            f"{file}: {bad:,} of {len(rows):,} {raw.unit}s cannot be used: "
            f"{'; '.join(_told(problems, raw.unit))}. Correct or remove them."
        )
    if not items:
        raise DataError(f"{file}: there are no rows; an exam needs at least one question.")
    return tuple(items)


def _told(problems: Mapping[str, Sequence[int]], unit: str) -> list[str]:
    """Return one phrase per kind of problem, with the numbers of its rows."""
    told = []
    for problem, places in list(problems.items())[:SHOWN_PROBLEMS]:
        more = f" and {len(places) - SHOWN_ROWS:,} more" if len(places) > SHOWN_ROWS else ""
        numbers = ", ".join(f"{place:,}" for place in places[:SHOWN_ROWS])
        told.append(f"{unit}{'s' if len(places) > 1 else ''} {numbers}{more}: {problem}")
    if left := list(problems.values())[SHOWN_PROBLEMS:]:
        numbers = ", ".join(str(place) for place in sorted(p for found in left for p in found))
        told.append(f"and other problems in {unit}s {numbers}")
    return told


# --- Columns --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The columns of a file that hold an exam."""

    question: str
    answer: str
    options: str | None
    """Column with a list or a mapping; None if each option has a column."""
    separate: tuple[str, ...] = ()
    """One column per option, in order."""

    @classmethod
    def of(cls, available: Sequence[str], source: str) -> _Layout:
        """Find the columns, whatever their case; raise `DataError` if one is missing."""
        by_name: dict[str, list[str]] = {}
        for name in available:
            by_name.setdefault(name.strip().lower(), []).append(name)
        single = {name: found[0] for name, found in by_name.items() if len(found) == 1}
        separate = _separate(available)
        missing = [name for name in (QUESTION, ANSWER) if name not in single]
        if OPTIONS not in single and len(separate) < 2:
            missing.append(f"{OPTIONS} (or one column per option: A, B, ... or option_a, ...)")
        if missing:
            raise DataError(
                f"{source}: no column {', '.join(missing)}; the columns are: "
                f"{', '.join(available) or 'none'}. An exam needs {QUESTION}, {OPTIONS} and "
                f"{ANSWER}, each once: rename the columns."
            )
        if OPTIONS in single and len(separate) > 1:
            raise DataError(
                f"{source}: both a column {single[OPTIONS]!r} and one column per option "
                f"({', '.join(separate)}); keep one of the two."
            )
        return cls(single[QUESTION], single[ANSWER], single.get(OPTIONS), separate)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (self.question, self.answer, *([self.options] if self.options else self.separate))


def _separate(available: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of single options in order: letters from A, or numbers from 0 or 1."""
    found: dict[str, str] = {}
    for name in available:
        if match := _OPTION_COLUMN.fullmatch(name.strip()):
            found.setdefault((match[1] or match[2]).upper(), name)
    for keys in (
        list(ascii_uppercase),
        [str(i) for i in range(26)],
        [str(i) for i in range(1, 27)],
    ):
        run: list[str] = []
        for key in keys:
            if key not in found:
                break
            run.append(found[key])
        if len(run) > 1:
            return tuple(run)
    return ()


def _read(file: Path) -> tuple[RawRows, _Layout]:
    """Read the columns of an exam; every cell of a CSV file as text."""
    path = file.expanduser()
    if not path.is_file():
        near = (
            ""
            if not path.parent.is_dir()
            else nearest(path.name, [p.name for p in path.parent.iterdir()])
        )
        raise DataError(f"{file}: no such file.{near} Give --benchmark a file that exists.")
    if not path.name.lower().endswith(TABLE_ENDINGS):
        raise DataError(
            f"{file}: files ending in {path.suffix!r} cannot be read; allowed: "
            f"{', '.join(TABLE_ENDINGS)}. Convert the file, or give it the ending of its format."
        )
    try:
        layout = _Layout.of(read_file(path, str(file), lambda _: ()).available, str(file))
        return read_file(path, str(file), lambda _: layout.columns), layout
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(
            f"{file}: the file is damaged or cannot be read ({first_line(error)}). Copy it again."
        ) from error


# --- One row --------------------------------------------------------------------------------------


class _RowError(ValueError):
    """Why a row is no item, in words that do not depend on the row's number."""


def _item(place: int, layout: _Layout, row: Mapping[str, Any], from_zero: bool) -> Item:
    """Return the item of a row; raise `_RowError` if it is none."""
    question = _text(row[layout.question])
    if not question:
        raise _RowError("no question")
    options = _options(layout, row)
    if len(options) < 2:
        raise _RowError(f"{len(options)} option(s), at least 2 are needed")
    if len(options) > len(ascii_uppercase):
        raise _RowError(f"{len(options)} options, at most {len(ascii_uppercase)} are allowed")
    if empty := [letter for letter, text in options.items() if not text]:
        raise _RowError(f"option {', '.join(empty)} is empty")
    texts = tuple(options.values())
    if len(set(texts)) < len(texts):
        raise _RowError("two options have the same text")
    gold = _gold(row[layout.answer], texts, from_zero)
    labels = tuple(ascii_uppercase[: len(texts)])
    return Item(row=place, question=question, options=texts, labels=labels, gold_index=gold)


def _text(value: Any) -> str:
    """Return a cell as text; numbers are written out, anything else is no text."""
    if isinstance(value, bool) or value is None or value != value:
        return ""
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise _RowError(f"a value of type {type(value).__name__} where text is expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _RowError("a character that is no valid text (an unpaired surrogate)") from None
    return value.strip()


def _options(layout: _Layout, row: Mapping[str, Any]) -> dict[str, str]:
    """Return letter → text; options at the end may be missing, none between two others."""
    if layout.options is None:
        cells = [_text(row[name]) for name in layout.separate]
        while cells and not cells[-1]:
            cells.pop()
        return dict(zip(ascii_uppercase, cells, strict=False))
    given = row[layout.options]
    if isinstance(given, str):  # a CSV cell
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise _RowError(
                'the options are text that is no JSON list or mapping, such as ["yes", "no"]'
            ) from None
    if isinstance(given, Mapping):
        # Parquet gives every key of the column to every row.
        there = {str(k).strip().upper(): _text(v) for k, v in given.items() if v is not None}
        if sorted(there) != list(ascii_uppercase[: len(there)]):
            raise _RowError(f"the options' letters are {', '.join(there) or 'none'}, not A, B, ...")
        return {letter: there[letter] for letter in sorted(there)}
    if isinstance(given, list | tuple):
        if len(given) > len(ascii_uppercase):
            raise _RowError(f"{len(given)} options, at most {len(ascii_uppercase)} are allowed")
        return dict(zip(ascii_uppercase, map(_text, given), strict=False))
    raise _RowError("no options" if given is None else "the options are neither list nor mapping")


def _index(answer: Any) -> int | None:
    """Return an answer that is written as an integer; None for any other."""
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    text = str(answer).strip().removesuffix(".0")
    return int(text) if re.fullmatch(r"\d{1,9}", text) else None


def _gold(answer: Any, texts: Sequence[str], from_zero: bool) -> int:
    """Return the position of the correct option, which the answer must name in one way only."""
    written = _text(answer)
    if not written:
        raise _RowError("no answer")
    letters = ascii_uppercase[: len(texts)]
    meant = {texts.index(written)} if written in texts else set()
    by_text = bool(meant)
    if len(written) == 1 and written.upper() in letters:
        meant.add(letters.index(written.upper()))
    index = _index(answer)
    if index is not None and index < len(texts):
        if not from_zero and not by_text:
            raise _RowError(
                "the answer is an index, and no answer of the file is 0, so that it may count from "
                "0 or from 1: write letters"
            )
        meant.add(index)
    if not meant:
        shown = written if len(written) <= 40 else f"{written[:37]}..."
        raise _RowError(
            f"the answer {shown!r} is none of: a letter {letters[0]} to {letters[-1]}, an index 0 "
            f"to {len(texts) - 1}, the text of an option"
        )
    if len(meant) > 1:
        raise _RowError(
            f"the answer {written!r} is the text of one option and names another: write the letter"
        )
    return meant.pop()
