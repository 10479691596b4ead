"""Checks an `evaluation.json` for impossible or inconsistent figures, without running a model.

The file is one object:

    protocol         "flowertune", "likelihood" or "greedy"
    base             name of the base model
    adapter          path of the adapter; null if only the base was evaluated
    adapter_sha256   hash of the adapter's weights; null without one
    models           name of a tuned model → {"adapter": path, "adapter_sha256": hash}; optional
    precision        such as "float32" or "nf4"
    versions         library → version
    rows             one object for each model and benchmark:
        model        "base", or the name of the tuned model
        benchmark    a name of `grandrounds.study.evaluation.benchmarks`, or of an own exam
        n, correct   counts of items
        accuracy     correct / n, from 0 to 1
        interval     [low, high], Wilson's 95 % interval of the accuracy
        prompt_hash  the protocol's for this benchmark
        source       from `benchmarks.source_of`
        limited      true if n is deliberately below the published size; optional
        spread       answer → count, summing to n; optional
        format_failures  a count of items; optional
        groups       subsets of the benchmark with n, correct, accuracy, interval; optional
        own          `texts` or `letters`: an exam of the user's own, or its held-out rows, of
                     which `expected` is the number of items; optional
        f1, loss     with protocol `greedy`, as in `grandrounds.study.evaluation.results`
    average          model → {"accuracy": mean of its rows' accuracies, "benchmarks": [names]}

Further keys are ignored. An evaluation by several protocols is an object with one such object each
under `evaluations`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

from grandrounds.errors import DataError, nearest
from grandrounds.statistics import wilson_interval
from grandrounds.study.evaluation import flowertune, likelihood
from grandrounds.study.evaluation.benchmarks import (
    HELD_OUT,
    Benchmark,
    benchmarks,
    held_out_benchmark,
)
from grandrounds.study.evaluation.greedy import GREEDY
from grandrounds.study.evaluation.own_exam import PREFIX, STYLES, own_benchmark

PROMPT_HASHES: dict[str, Callable[[Benchmark], str]] = {
    "flowertune": flowertune.prompt_hash,
    "likelihood": likelihood.prompt_hash,
    GREEDY: likelihood.prompt_hash,
}
"""Protocol → hash of a benchmark's prompts. Other protocols' hashes are not checked."""

BASE = "base"
"""Name of the base model in a row."""

SMALLEST_COMPARED = 100
"""Benchmarks with fewer items are ignored in the search for copied figures: ties are likely."""

_INTERVAL_TOLERANCE = 1e-3

_ROUNDING = 1e-9

Row = dict[str, Any]


def published_percentage_is_possible(percentage: float, decimals: int, n: int) -> bool:
    """Return whether any count out of `n` items rounds to a percentage.

    Halves may be rounded up or down. Figures truncated instead of rounded are rejected: 68.34 % of
    4,183 lies between 2,858 (68.32) and 2,859 (68.35).

    Parameters
    ----------
    percentage : float
        From 0 to 100, as published.
    decimals : int
        Number of published decimals, including trailing zeros.
    n : int
        Number of items, at least 1.

    Raises
    ------
    ValueError
        If `n` or `decimals` is out of range, or `percentage` is not finite.
    """
    if n < 1 or decimals < 0 or not math.isfinite(percentage):
        raise ValueError(f"no percentage {percentage} with {decimals} decimals of {n} items")
    exact = Fraction(repr(percentage))
    half = Fraction(1, 2 * 10**decimals)
    lowest = max(0, math.ceil((exact - half) * n / 100))
    highest = min(n, math.floor((exact + half) * n / 100))
    return lowest <= highest


def evaluations_in(content: Any) -> list[Any]:
    """Return the evaluations of an `evaluation.json`, one per protocol."""
    several = content.get("evaluations") if isinstance(content, dict) else None
    return list(several) if isinstance(several, list) and several else [content]


def faults_in(content: Any) -> list[str]:
    """Return the faults of an `evaluation.json`, one sentence each.

    Consistent figures may still be wrong: this finds slips and copies, and cannot show that a model
    was run.
    """
    found = []
    for evaluation in evaluations_in(content):
        faults = _faults_in(evaluation)
        protocol = evaluation.get("protocol") if isinstance(evaluation, dict) else None
        several = evaluation is not content
        found += [f"protocol {protocol}: {fault}" if several else fault for fault in faults]
    return found


def _faults_in(evaluation: Any) -> list[str]:
    """Return the faults of one protocol's evaluation."""
    given = evaluation.get("rows") if isinstance(evaluation, dict) else None
    if not isinstance(given, list) or not given:
        return ["there are no rows to verify"]
    found = []
    rows = []
    for number, row in enumerate(given, 1):
        faults = _form_faults(row)
        if faults:
            found += [f"row {number}: {fault}" for fault in faults]
            continue
        rows.append(row)
        name = f"row {number} ({row['model']}, {row['benchmark']})"
        faults = [*_count_faults(row), *_benchmark_faults(row, evaluation)]
        if evaluation.get("protocol") == GREEDY:
            faults += _greedy_faults(row)
        found += [f"{name}: {fault}" for fault in faults]
    found += [*_table_faults(rows), *_average_faults(evaluation.get("average"), rows)]
    if "models" in evaluation:
        found += _model_faults(evaluation["models"], rows)
    return found or _group_faults(rows)


def _model_faults(models: Any, rows: list[Row]) -> Iterable[str]:
    """Yield what is wrong with `models`, which an older file need not have."""
    if not isinstance(models, dict):
        yield f"'models' is {models!r}, and must map each tuned model to its adapter"
        return
    for name in dict.fromkeys(row["model"] for row in rows if row["model"] != BASE):
        if name not in models:
            yield f"{name} has rows, but 'models' has {', '.join(models) or 'none'} only"
    for name, model in models.items():
        if not isinstance(model, dict) or not _is_name(model.get("adapter_sha256")):
            yield f"'models' has {name}, but not the 'adapter_sha256' of its weights"


# --- One row --------------------------------------------------------------------------------------


def _form_faults(row: Any) -> list[str]:
    """Return which keys of a row are missing or of the wrong type."""
    if not isinstance(row, dict):
        return ["not an object"]
    faults = [
        f"{key!r} is {row.get(key)!r}, and must be {what}"
        for key, what, holds in (
            ("model", "a string", _is_name),
            ("benchmark", "a string", _is_name),
            ("n", "an integer of at least 1", lambda value: _is_count(value) and value > 0),
            ("correct", "an integer of at least 0", _is_count),
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
    """Yield the figures of a row that contradict its counts."""
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
    if not _has_wilson_interval(row):
        low, high = wilson_interval(correct, n)
        yield (
            f"interval {row['interval']}, but Wilson's 95 % interval of {correct} of {n} is "
            f"[{low:.4f}, {high:.4f}]"
        )
    failures = row.get("format_failures")
    if failures is not None and not (_is_count(failures) and failures <= n):
        yield f"{failures!r} format failures among {n} items"
    if "spread" in row:
        counts = row["spread"].values()
        if not all(map(_is_count, counts)) or sum(counts) != n:
            yield f"the spread of answers {row['spread']} does not sum to {n} items"


def _has_wilson_interval(row: Row) -> bool:
    expected = wilson_interval(row["correct"], row["n"])
    pairs = zip(row["interval"], expected, strict=True)
    return all(abs(given - right) <= _INTERVAL_TOLERANCE for given, right in pairs)


def _benchmark_faults(row: Row, evaluation: Row) -> Iterable[str]:
    """Yield contradictions to the published benchmark and to the protocol's prompts."""
    known = benchmarks()
    name = row["benchmark"]
    benchmark = _own_benchmark(row) if name not in known else known[name]
    if benchmark is None:
        yield f"no such benchmark; known: {', '.join(known)}.{nearest(name, known)}"
        return
    published = benchmark.expected_items
    if row["n"] > published:
        yield f"{row['n']} items, but the benchmark has {published}"
    elif row["n"] < published and not row.get("limited"):
        yield f"{row['n']} items instead of {published}, and not declared as limited"
    protocol = evaluation.get("protocol")
    if protocol not in PROMPT_HASHES:
        return
    own = protocol != "flowertune" and likelihood.asks_in_own_prompt(benchmark)
    if own and evaluation.get("prompt_template") not in (None, "alpaca"):
        return  # the hash of a chat template cannot be recomputed without the tokenizer
    right = PROMPT_HASHES[protocol](benchmark)
    if row.get("prompt_hash") != right:
        yield (
            f"prompt hash {row.get('prompt_hash')!r}, but protocol {protocol!r} has {right!r}: "
            "other prompts were sent"
        )


def _own_benchmark(row: Row) -> Benchmark | None:
    """Return the benchmark of a row that is the user's own; None if it is not, or not readable."""
    name, style, count = row["benchmark"], row.get("own"), row.get("expected")
    if not isinstance(count, int) or style not in STYLES:
        return None
    if name == HELD_OUT:
        return held_out_benchmark(count)
    return own_benchmark(name, name, style, count) if name.startswith(PREFIX) else None


def _greedy_faults(row: Row) -> Iterable[str]:
    """Yield impossible figures of a model's own words.

    An exact match has an F1 of 1, so that the mean F1 is no less than the share of exact matches;
    a loss is never below 0.
    """
    f1, loss = row.get("f1"), row.get("loss")
    f1 = f1 if isinstance(f1, dict) else {}
    mean = f1.get("mean")
    nats = loss.get("nats_per_token") if isinstance(loss, dict) else None
    if not _is_fraction(mean):
        yield f"'f1' has the mean {mean!r}, and must have a number from 0 to 1"
    elif mean < row["correct"] / row["n"] - _ROUNDING:
        yield f"mean F1 {mean}, but {row['correct']} of {row['n']} exact matches have an F1 of 1"
    elif not _holds(f1.get("interval"), mean):
        yield f"mean F1 {mean} outside its interval {f1.get('interval')}"
    if not isinstance(nats, int | float) or not 0 <= nats < math.inf:
        yield f"'loss' has {nats!r} nats per token, and must have a number of at least 0"
    if not isinstance(loss, dict) or not _is_count(loss.get("tokens")) or loss["tokens"] < row["n"]:
        yield "'loss' must be over at least one token of each item"
    for name in ("cut", "differing_numbers"):
        most = row["n"] if name == "cut" else row["correct"]
        if not _is_count(row.get(name)) or row[name] > most:
            yield f"{name!r} is {row.get(name)!r}, and must be a count of at most {most}"


def _holds(interval: Any, value: Any) -> bool:
    """Return whether an interval of a share contains a value; null stands for no interval."""
    if interval is None:
        return True
    return _is_interval(interval) and interval[0] - _ROUNDING <= value <= interval[1] + _ROUNDING


def _group_faults(rows: list[Row]) -> list[str]:
    """Return the faults in the subsets of benchmarks, of rows that are otherwise consistent."""
    faults = []
    for number, row in enumerate(rows, 1):
        groups = row.get("groups") or []
        try:
            n, correct = (sum(group[key] for group in groups) for key in ("n", "correct"))
            right = all(map(_has_wilson_interval, groups))
        except (TypeError, KeyError, ValueError) as error:
            faults.append(f"row {number}: its groups cannot be read ({error})")
            continue
        if groups and (n, correct) != (row["n"], row["correct"]):
            faults.append(
                f"row {number} ({row['model']}, {row['benchmark']}): its groups sum to "
                f"{correct} of {n}, but the row has {row['correct']} of {row['n']}"
            )
        if not right:
            faults.append(f"row {number}: the interval of a group is not Wilson's")
    return faults


# --- The table ------------------------------------------------------------------------------------


def _table_faults(rows: list[Row]) -> Iterable[str]:
    """Yield rows that are missing, duplicated, or suspiciously equal."""
    table: dict[str, dict[str, Row]] = {}  # model → benchmark → row
    for row in rows:
        columns = table.setdefault(row["model"], {})
        if row["benchmark"] in columns:
            yield f"{row['model']} has two rows for {row['benchmark']}"
        columns[row["benchmark"]] = row
    if BASE not in table:
        yield f"there is no row for the base (model {BASE!r})"
    yield from _equal_columns(table)
    yield from _copies_of_base(table)


def _equal_columns(table: dict[str, dict[str, Row]]) -> Iterable[str]:
    """Yield pairs of benchmarks on which each of several models has the same accuracy."""
    names = dict.fromkeys(name for columns in table.values() for name in columns)
    for one, other in combinations(names, 2):
        pairs = [
            (columns[one], columns[other])
            for columns in table.values()
            if one in columns and other in columns
        ]
        large = [pair for pair in pairs if min(row["n"] for row in pair) >= SMALLEST_COMPARED]
        alike = all(first["accuracy"] == second["accuracy"] for first, second in large)
        if len(large) > 1 and alike and _is_informative(first for first, _ in large):
            yield f"{one} and {other} have the same figures for every model: one may be a copy"


def _copies_of_base(table: dict[str, dict[str, Row]]) -> Iterable[str]:
    """Yield tuned models whose counts equal the base's on each of several benchmarks."""
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
        if len(shared) > 1 and alike and _is_informative(tuned for tuned, _ in shared):
            yield f"{model} has the base's figures on every benchmark: was its adapter loaded?"


def _is_informative(rows: Iterable[Row]) -> bool:
    """Return whether equal figures are suspicious: not if all are 0 or 1, as without any answer."""
    return any(0 < row["correct"] < row["n"] for row in rows)


def _average_faults(average: Any, rows: list[Row]) -> Iterable[str]:
    """Yield averages that are missing or are not the mean of their rows."""
    if not isinstance(average, dict):
        yield "'average' must map each model to its accuracy and benchmarks"
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
    """Return the number of decimals in a number's shortest representation."""
    exponent = Decimal(repr(value)).as_tuple().exponent
    return -exponent if isinstance(exponent, int) and exponent < 0 else 0


def _rounds_to(exact: float, written: float) -> bool:
    """Return whether `exact` rounds to `written`."""
    return abs(exact - written) <= 0.5 * 10.0 ** -_decimals(written) + 1e-12


def read_result(file: Path) -> Any:
    """Return the content of a JSON file; raise `DataError` if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error})") from error
