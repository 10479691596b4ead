"""Says what in an `evaluation.json` cannot be, without asking a model again.

The file is one object:

    protocol         "flowertune" or "likelihood"
    base             name of the base model
    adapter          where the adapter came from; null if only the base was asked
    adapter_sha256   hash of the adapter's weights; null without one
    precision        such as "float32" or "nf4"
    versions         library → version
    rows             one object for each model and benchmark:
        model        "base", or what the tuned model is called
        benchmark    a name of `grandrounds.study.evaluation.benchmarks`
        n, correct   counts of items
        accuracy     correct / n, from 0 to 1
        interval     [low, high], Wilson's 95 % interval of the accuracy
        prompt_hash  the protocol's for this benchmark
        source       from `benchmarks.source_of`
        limited      true where n is meant to be below the published size; may be left out
        spread       answer → count, adding up to n; may be left out
        format_failures  a count of items; may be left out
    average          model → {"accuracy": mean of its rows' accuracies, "benchmarks": [names]}

Further keys are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from typing import Any

from grandrounds.errors import nearest
from grandrounds.study.evaluation import flowertune, likelihood
from grandrounds.study.evaluation.benchmarks import Benchmark, benchmarks

PROMPT_HASHES: dict[str, Callable[[Benchmark], str]] = {
    "flowertune": flowertune.prompt_hash,
    "likelihood": likelihood.prompt_hash,
}
"""Protocol → the hash of a benchmark's prompts. Those of other protocols are not checked."""

BASE = "base"
"""What the untouched base is called in a row."""

SMALLEST_COMPARED = 100
"""Benchmarks with fewer items are left out where equal figures are looked for: chance is enough."""

_INTERVAL_TOLERANCE = 1e-3

Row = dict[str, Any]


def published_percentage_is_possible(percentage: float, decimals: int, n: int) -> bool:
    """Say whether any count over `n` items gives a percentage, rounded to so many decimals.

    Halves may have been rounded up or down. A figure that was cut off instead of rounded is not
    what a percentage with `decimals` decimals means, and is refused: 68.34 % of 4,183 lies between
    2,858 (68.32) and 2,859 (68.35).

    Parameters
    ----------
    percentage : float
        From 0 to 100, as published.
    decimals : int
        Decimals it was published with, from 0; trailing zeros count.
    n : int
        Items asked, at least 1.

    Raises
    ------
    ValueError
        If `n` or `decimals` is out of its range, or `percentage` is no number.
    """
    if n < 1 or decimals < 0 or not math.isfinite(percentage):
        raise ValueError(f"no percentage {percentage} with {decimals} decimals of {n} items")
    exact = Fraction(repr(percentage))
    half = Fraction(1, 2 * 10**decimals)
    lowest = max(0, math.ceil((exact - half) * n / 100))
    highest = min(n, math.floor((exact + half) * n / 100))
    return lowest <= highest


def implausible(evaluation: Any) -> list[str]:
    """Return what cannot be in an `evaluation.json`, one sentence each; none if nothing is found.

    Figures that agree with each other may still be wrong: this finds slips and copies, and cannot
    show that a model was asked.
    """
    given = evaluation.get("rows") if isinstance(evaluation, dict) else None
    if not isinstance(given, list) or not given:
        return ["there are no rows, so there is nothing to verify"]
    found = []
    rows = []
    for number, row in enumerate(given, 1):
        faults = _form_faults(row)
        if faults:
            found += [f"row {number}: {fault}" for fault in faults]
            continue
        rows.append(row)
        name = f"row {number} ({row['model']}, {row['benchmark']})"
        faults = [*_count_faults(row), *_benchmark_faults(row, evaluation.get("protocol"))]
        found += [f"{name}: {fault}" for fault in faults]
    return [*found, *_table_faults(rows), *_average_faults(evaluation.get("average"), rows)]


# --- One row --------------------------------------------------------------------------------------


def _form_faults(row: Any) -> list[str]:
    """Say what is missing in a row, or of another type."""
    if not isinstance(row, dict):
        return ["not an object"]
    faults = [
        f"{key!r} is {row.get(key)!r}, and must be {what}"
        for key, what, holds in (
            ("model", "a text", _is_name),
            ("benchmark", "a text", _is_name),
            ("n", "a whole number from 1", lambda value: _is_count(value) and value > 0),
            ("correct", "a whole number from 0", _is_count),
            ("accuracy", "a number from 0 to 1", _is_fraction),
            ("interval", "two numbers from 0 to 1", _is_interval),
        )
        if not holds(row.get(key))
    ]
    if not isinstance(row.get("spread", {}), dict):
        faults.append("'spread' must be an object of counts")
    return faults


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_fraction, value))


def _count_faults(row: Row) -> Iterable[str]:
    """Say which figures of a row contradict its counts."""
    n, correct = row["n"], row["correct"]
    if correct > n:
        yield f"{correct} of {n} items correct"
        return
    if not _rounds_to(correct / n, row["accuracy"]):
        yield f"accuracy {row['accuracy']}, but {correct} of {n} is {correct / n:.6f}"
        decimals = max(0, _decimals(row["accuracy"]) - 2)
        percentage = float(Decimal(repr(row["accuracy"])) * 100)
        if not published_percentage_is_possible(percentage, decimals, n):
            yield f"no count of {n} items gives {percentage:.{decimals}f} %"
    yield from _interval_faults(row)
    failures = row.get("format_failures")
    if failures is not None and not (_is_count(failures) and failures <= n):
        yield f"{failures!r} format failures among {n} items"
    if "spread" in row:
        counts = row["spread"].values()
        if not all(map(_is_count, counts)) or sum(counts) != n:
            yield f"the spread of answers {row['spread']} does not add up to {n} items"


def _interval_faults(row: Row) -> Iterable[str]:
    from grandrounds.statistics import wilson_interval

    expected = wilson_interval(row["correct"], row["n"])
    pairs = zip(row["interval"], expected, strict=True)
    if any(abs(given - right) > _INTERVAL_TOLERANCE for given, right in pairs):
        yield (
            f"interval {row['interval']}, but Wilson's 95 % interval of {row['correct']} of "
            f"{row['n']} is [{expected[0]:.4f}, {expected[1]:.4f}]"
        )


def _benchmark_faults(row: Row, protocol: Any) -> Iterable[str]:
    """Say what contradicts the benchmark as published, and the protocol's prompts."""
    known = benchmarks()
    name = row["benchmark"]
    if name not in known:
        yield f"no such benchmark; known: {', '.join(known)}.{nearest(name, known)}"
        return
    published = known[name].expected_items
    if row["n"] > published:
        yield f"{row['n']} items, but the benchmark has {published}"
    elif row["n"] < published and not row.get("limited"):
        yield f"{row['n']} items instead of {published}, and not declared as limited"
    if protocol in PROMPT_HASHES:
        right = PROMPT_HASHES[protocol](known[name])
        if row.get("prompt_hash") != right:
            yield (
                f"prompt hash {row.get('prompt_hash')!r}, but protocol {protocol!r} has {right!r}: "
                "other prompts were sent"
            )


# --- The table ------------------------------------------------------------------------------------


def _table_faults(rows: list[Row]) -> Iterable[str]:
    """Say which rows are missing, doubled, or alike where they cannot be."""
    table: dict[str, dict[str, Row]] = {}  # model → benchmark → row
    for row in rows:
        columns = table.setdefault(row["model"], {})
        if row["benchmark"] in columns:
            yield f"{row['model']} has two rows for {row['benchmark']}"
        columns[row["benchmark"]] = row
    if BASE not in table:
        yield f"there is no row of the untouched base (model {BASE!r})"
    yield from _equal_columns(table)
    yield from _copies_of_base(table)


def _equal_columns(table: dict[str, dict[str, Row]]) -> Iterable[str]:
    """Two benchmarks on which every one of several models has the same figure."""
    names = dict.fromkeys(name for columns in table.values() for name in columns)
    for one, other in combinations(names, 2):
        pairs = [
            (columns[one], columns[other])
            for columns in table.values()
            if one in columns and other in columns
        ]
        large = [pair for pair in pairs if min(row["n"] for row in pair) >= SMALLEST_COMPARED]
        alike = all(first["accuracy"] == second["accuracy"] for first, second in large)
        if len(large) > 1 and alike and _tells(first for first, _ in large):
            yield f"{one} and {other} have the same figures for every model: one may be a copy"


def _copies_of_base(table: dict[str, dict[str, Row]]) -> Iterable[str]:
    """Tuned models whose figures are the base's on every one of several benchmarks."""
    base = table.get(BASE, {})
    for model, columns in table.items():
        shared = [
            (row, base[name])
            for name, row in columns.items()
            if model != BASE and name in base and row["n"] >= SMALLEST_COMPARED
        ]
        alike = all(
            (tuned["correct"], tuned["n"]) == (own["correct"], own["n"]) for tuned, own in shared
        )
        if len(shared) > 1 and alike and _tells(tuned for tuned, _ in shared):
            yield f"{model} has the base's figures on every benchmark: was its adapter loaded?"


def _tells(rows: Iterable[Row]) -> bool:
    """Say whether equal figures mean something: not where all are 0 or 1, as after no answer."""
    return any(0 < row["correct"] < row["n"] for row in rows)


def _average_faults(average: Any, rows: list[Row]) -> Iterable[str]:
    """Say which average is missing or is not the mean of its rows."""
    if not isinstance(average, dict):
        yield "'average' must be an object from model to accuracy and benchmarks"
        return
    models = dict.fromkeys(row["model"] for row in rows)
    yield from (f"there is no average for {model}" for model in models if model not in average)
    for model, given in average.items():
        if not isinstance(given, dict) or not _is_fraction(given.get("accuracy")):
            yield f"average of {model}: 'accuracy' must be a number from 0 to 1"
            continue
        own = {row["benchmark"]: row["correct"] / row["n"] for row in rows if row["model"] == model}
        names = given.get("benchmarks")
        if not isinstance(names, list) or not names or not all(name in own for name in names):
            there = ", ".join(own) or "none"
            yield f"average of {model}: over {names!r}, but the benchmarks with a row are: {there}"
            continue
        mean = sum(own[name] for name in names) / len(names)
        if not _rounds_to(mean, given["accuracy"]):
            over = ", ".join(names)
            yield f"average of {model} is {given['accuracy']}, but over {over} it is {mean:.6f}"


# --- Rounding -------------------------------------------------------------------------------------


def _decimals(value: float) -> int:
    """Return the decimals that a number was written with."""
    exponent = Decimal(repr(value)).as_tuple().exponent
    return -exponent if isinstance(exponent, int) and exponent < 0 else 0


def _rounds_to(exact: float, written: float) -> bool:
    """Say whether `written` is `exact`, as far as its decimals go."""
    return abs(exact - written) <= 0.5 * 10.0 ** -_decimals(written) + 1e-12
