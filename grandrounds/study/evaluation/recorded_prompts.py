"""Recorded prompts that are not FlowerTune's: counted, with an example of what differs.

Without the questions, the form is compared: a prompt of the protocol has the benchmark's
instruction, a body of known form and a known end. Text that all prompts of a file share within the
body, such as one more sentence after each question, is not the benchmark's either. With all
questions at hand, every prompt is compared in full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grandrounds.study.evaluation.benchmarks import (
    Benchmark,
    Item,
    benchmarks,
    load_items,
    local_file,
)
from grandrounds.study.evaluation.flowertune import Generation, answer_type, build_prompt

END = "\nThe answer is:\n"
"""The end of every prompt."""

LEAST_PROMPTS = 50
"""Different prompts, below which shared text may be the questions' own."""

LEAST_SHARED = 12
"""Characters that all prompts share at one place, from which they were added."""

SHOWN = 60
"""Characters of a difference that are quoted."""


@dataclass(frozen=True)
class Altered:
    """The prompts of a file that are not the protocol's."""

    benchmark: Benchmark
    """The benchmark that the file was compared with."""
    rows: tuple[int, ...]
    """Their places in the file, from 1."""
    example: str
    """What differs in the first of them; empty if there is none."""


def altered_prompts(
    records: Sequence[Generation], file_name: str, data: Path | None = None
) -> Altered:
    """Compare recorded prompts with FlowerTune's.

    Parameters
    ----------
    file_name : str
        Names the benchmark (`generation_medqa_run.jsonl`); else it is the one that fits best.
    data : Path, optional
        Folder with the benchmarks' files. Where it has all items of this one, prompts are compared
        in full.

    Raises
    ------
    DataError
        If a file of the folder cannot be read.
    """
    known = benchmarks()
    stem = file_name.removeprefix("generation_")
    named = [known[name] for name in known if stem.startswith(f"{name}_")]
    compared = [_compared(records, benchmark) for benchmark in named or known.values()]
    found = min(compared, key=lambda altered: len(altered.rows))
    if found.rows or data is None or local_file(found.benchmark, data) is None:
        return found
    items = load_items(found.benchmark, data)
    whole = len(items) >= found.benchmark.expected_items
    return _compared_in_full(records, found.benchmark, items) if whole else found


def _compared_in_full(
    records: Sequence[Generation], benchmark: Benchmark, items: Sequence[Item]
) -> Altered:
    """Compare prompts that have the benchmark's form with those of its items."""
    right = {build_prompt(benchmark, item) for item in items}
    rows = tuple(row for row, record in enumerate(records, 1) if record.prompt not in right)
    if not rows:
        return Altered(benchmark, (), "")
    prompt = records[rows[0] - 1].prompt
    nearest = max(sorted(right), key=lambda other: _shared_ends(prompt, other))
    return Altered(benchmark, rows, f"row {rows[0]} {_first_difference(prompt, nearest)}")


def _shared_ends(one: str, other: str) -> int:
    """Return how many characters two texts share at their ends."""
    return len(_common_start([one, other])) + len(_common_start([one[::-1], other[::-1]]))


def _compared(records: Sequence[Generation], benchmark: Benchmark) -> Altered:
    differences = [_difference(record.prompt, benchmark) for record in records]
    if not any(differences) and (shared := _shared_text(records, benchmark)):
        return Altered(benchmark, tuple(range(1, len(records) + 1)), f"all prompts have {shared}")
    rows = tuple(row for row, told in enumerate(differences, 1) if told)
    example = f"row {rows[0]} {differences[rows[0] - 1]}" if rows else ""
    return Altered(benchmark, rows, example)


# --- One prompt -----------------------------------------------------------------------------------


def _difference(prompt: str, benchmark: Benchmark) -> str:
    """Return what in a prompt differs from the benchmark's form; empty if nothing does."""
    is_word = answer_type(benchmark.labels) == "boolean"
    start = f"{benchmark.instruction}\n{'' if is_word else 'Question: '}"
    if not prompt.startswith(start):
        return _first_difference(prompt, start)
    if not prompt.endswith(END):
        return f"ends in {_end(prompt)}, not in {END!r}"
    if is_word:
        return ""
    parts = _parts(prompt, benchmark)
    if parts is None:
        lines = ", ".join(f"'{label}. ...'" for label in benchmark.labels)
        return f"has no block of options {lines} after its question"
    if not parts[0].endswith(("?", ".")):
        return f"has the question {_end(parts[0])}, to which FlowerTune adds a question mark"
    return ""


def _first_difference(given: str, right: str) -> str:
    same = len(_common_start([given, right]))
    return f"has {_quoted(given, same)} where FlowerTune's has {_quoted(right, same)}"


def _quoted(text: str, place: int) -> str:
    """Return a text around a place as a quotation."""
    start = max(0, place - SHOWN // 3)
    cut = text[start : start + SHOWN]
    after = "..." if len(text) > start + SHOWN else ""
    return f"'{'...' if start else ''}{' '.join(cut.split())}{after}'"


def _end(text: str) -> str:
    return repr(text[-SHOWN // 2 :])


def _parts(prompt: str, benchmark: Benchmark) -> tuple[str, ...] | None:
    """Return the texts that a prompt of the protocol takes from its item: question and options."""
    body = prompt.removeprefix(f"{benchmark.instruction}\n").removesuffix(END)
    if answer_type(benchmark.labels) == "boolean":
        return (body,)
    options = "\n".join(rf"{label}\. (.*)" for label in benchmark.labels)
    found = re.fullmatch(rf"Question: (.*)\n\nOptions:\n{options}", body, re.DOTALL)
    return found.groups() if found else None


# --- All prompts ----------------------------------------------------------------------------------


def _shared_text(records: Sequence[Generation], benchmark: Benchmark) -> str:
    """Return a text that all prompts have within their bodies, and where; empty without one."""
    bodies = {record.prompt: _parts(record.prompt, benchmark) for record in records}
    parts = [body for body in bodies.values() if body]
    if len(parts) < LEAST_PROMPTS:
        return ""
    names = ("body",) if len(parts[0]) == 1 else ("question", *benchmark.labels)
    places: tuple[tuple[str, Callable[[Sequence[str]], str]], ...] = (
        ("start", _common_start),
        ("end", lambda texts: _common_start([text[::-1] for text in texts])[::-1]),
    )
    for name, texts in zip(names, zip(*parts, strict=True), strict=True):
        for place, common in places:
            shared = common(texts).strip()
            if len(shared) >= LEAST_SHARED:
                what = f"the {name}" if len(name) > 1 else f"option {name}"
                return f"'{shared[:SHOWN]}' at the {place} of {what}"
    return ""


def _common_start(texts: Sequence[str]) -> str:
    """Return the characters with which all texts start."""
    first, last = min(texts), max(texts)
    same = (i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(same, min(len(first), len(last)))]
