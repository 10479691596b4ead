"""The units of a site's data: what a guarantee hides, and on which side of the split each one is.

A unit is a record, or all records of a patient. Whether a unit is held out, and which of its
records train, are functions of that unit and of a secret alone: one more unit moves no other. That
is why neither counts nor repeated records of other units matter here, as they do in `data`.
"""

from __future__ import annotations

import hmac
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

from grandrounds.config.keys import Config
from grandrounds.data.examples import Example, SiteData, SiteReport, examples_of
from grandrounds.data.partitioning import check_column
from grandrounds.data.rows import Rows

Record = TypeVar("Record")


@dataclass(frozen=True)
class UnitRule:
    """What a site's units are."""

    secret: bytes
    """Key of all choices. At a real site it never leaves the site."""
    column: str = ""
    """Column that names each record's unit, such as a patient; empty: each record is one."""
    most_records: int = 8
    """Records of a unit that train, at most."""

    @classmethod
    def of_rehearsal(cls, config: Config) -> UnitRule:
        """Return the rule of a run whose data are named by the run: its secret is none.

        It is derived from the seed, so that a rehearsal is repeated with the same units.
        """
        privacy = config.privacy
        secret = hmac.digest(b"rehearsal", str(config.federation.seed).encode(), "sha256")
        return cls(secret, privacy.unit_column, privacy.max_records_of_unit)


def grouped(units: Sequence[int], records: Sequence[Record]) -> list[list[Record]]:
    """Return the records of each unit.

    Parameters
    ----------
    units
        Number of each record's unit, from 0, without gaps.
    """
    found: list[list[Record]] = [[] for _ in range(max(units, default=-1) + 1)]
    for unit, record in zip(units, records, strict=True):
        found[unit].append(record)
    return found


def is_held_out(secret: bytes, unit: str, fraction: float) -> bool:
    """Whether a unit is held out: with probability `fraction`, by a keyed hash of its name."""
    digest = hmac.digest(secret, b"held out\0" + unit.encode(), "sha256")
    return int.from_bytes(digest[:8]) < fraction * 2**64


def chosen_records(secret: bytes, records: Sequence[Example], most: int) -> tuple[Example, ...]:
    """Return at most `most` different records of a unit, chosen by keyed hashes of the records."""

    def place(record: Example) -> bytes:
        return hmac.digest(secret, f"record\0{_text(record)}".encode(), "sha256")

    different = dict.fromkeys(records)
    kept = set(sorted(different, key=place)[:most])
    return tuple(record for record in different if record in kept)


def split_by_unit(
    rows: Rows, rule: UnitRule, *, question_column: str, answer_column: str, fraction: float
) -> SiteData:
    """Return a site's examples with their units, split into training and held-out units.

    Rows without a question, an answer or a unit are dropped and counted as empty; a unit's repeated
    records, and those beyond its number, as duplicates.

    Parameters
    ----------
    fraction : float
        Share of units that are held out, in expectation.

    Raises
    ------
    DataError
        If a column is missing.
    """
    check_column(rows, "data.question-column", question_column)
    check_column(rows, "data.answer-column", answer_column)
    if rule.column:
        check_column(rows, "privacy.unit-column", rule.column)
    units: dict[str, list[Example]] = {}
    dropped = 0
    for name, example in _records(rows, rule.column, question_column, answer_column):
        if name and example.question and example.answer:
            units.setdefault(name, []).append(example)
        else:
            dropped += 1
    train: list[Example] = []
    held_out: list[Example] = []
    numbers: list[int] = []
    for name, records in units.items():
        # Equal records are units of their own where each record is one.
        kept = chosen_records(rule.secret, records, rule.most_records) if rule.column else records
        if is_held_out(rule.secret, name, fraction):
            held_out += kept
            continue
        for number, record in enumerate(kept):
            is_next = not rule.column or number == 0
            numbers.append((numbers[-1] if numbers else -1) + is_next)
            train.append(record)
    left = len(train) + len(held_out)
    report = SiteReport(len(rows), dropped, len(rows) - dropped - left, len(train), len(held_out))
    return SiteData(tuple(train), tuple(held_out), report, tuple(numbers))


def unit_name(value: object) -> str:
    """Return the name of a unit as it is compared; empty for None.

    In Unicode's normal form NFC, without characters that nobody sees (category Cf: zero-width
    spaces, marks of direction) and without white space around it.
    """
    written = "" if value is None else str(value)
    seen = "".join(sign for sign in written if unicodedata.category(sign) != "Cf")
    return unicodedata.normalize("NFC", seen).strip()


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of names that differ in case only, or in how a number is written (17, 17.0).

    They are units of their own; whether they mean one patient, the site knows.
    """
    first: dict[str, str] = {}
    pairs = []
    for name in dict.fromkeys(names):
        key = str(Decimal(name).normalize()) if _NUMBER.fullmatch(name) else name.casefold()
        if first.setdefault(key, name) != name:
            pairs.append((first[key], name))
    return pairs


def _text(record: Example) -> str:
    """Return all that a record says."""
    said = [f"{role}\0{content}" for role, content in record.before]
    return "\0".join([*said, record.question, record.answer])


def _records(
    rows: Rows, unit_column: str, question_column: str, answer_column: str
) -> Iterator[tuple[str, Example]]:
    """Yield each row's unit, by name, and its example."""
    names = rows[unit_column] if unit_column else [None] * len(rows)
    for name, example in zip(names, examples_of(rows, question_column, answer_column), strict=True):
        if unit_column:
            yield unit_name(name), example
        else:
            yield _text(example), example
