"""An evaluation in words: tables and the notes that they need to be read, without any layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.study.evaluation.verification import BASE

Evaluation = Mapping[str, Any]
Row = Mapping[str, Any]

NONE = "-"
"""A cell in which nothing can stand."""


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns."""

    title: str
    """One line."""
    columns: tuple[str, ...]
    """The headings."""
    rows: tuple[tuple[str, ...], ...]
    """As many cells as there are columns."""


def tables(evaluation: Evaluation) -> list[Table]:
    """Return the accuracies, then what only the protocol tells."""
    special = {"flowertune": _format_table, "likelihood": _order_table}
    return [_accuracy_table(evaluation), special[evaluation["protocol"]](evaluation)]


# --- Accuracy -------------------------------------------------------------------------------------


def _accuracy_table(evaluation: Evaluation) -> Table:
    rows = []
    for first in _first_of_each(evaluation["rows"]):
        of_benchmark = [r for r in evaluation["rows"] if r["benchmark"] == first["benchmark"]]
        rows += list(_accuracy_rows(of_benchmark))
    average = evaluation["average"]
    if any(len(given["benchmarks"]) > 1 for given in average.values()):
        for model, given in average.items():
            gain = given["accuracy"] - average[BASE]["accuracy"]
            difference = NONE if model == BASE else points(gain)
            cells = (percent(given["accuracy"]), interval(given["interval"]), difference)
            rows.append(("average", model, NONE, *cells, NONE, NONE))
    return Table(
        f"accuracy, protocol {evaluation['protocol']}",
        ("benchmark", "model", "correct", "%", "95% interval", "vs base", "95% interval", "p"),
        tuple(rows),
    )


def _accuracy_rows(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of one benchmark: for each of its parts, each model."""
    for number in range(max(len(rows[0]["groups"]), 1)):
        for row in rows:
            part = row["groups"][number] if row["groups"] else row
            yield _accuracy_cells(row, part)


def _accuracy_cells(row: Row, part: Row) -> tuple[str, ...]:
    against = part["vs_base"]
    compared = (NONE, NONE, NONE)
    if against is not None:
        bounds = " to ".join(points(bound) for bound in against["interval"])
        compared = (points(against["difference"]), bounds, p_text(against["p_value"]))
    return (
        f"{row['title']}, {part['group']}" if row["groups"] else row["title"],
        row["model"],
        f"{part['correct']:,}/{part['n']:,}",
        percent(part["accuracy"]),
        interval(part["interval"]),
        *compared,
    )


# --- What only a protocol tells -------------------------------------------------------------------


def _format_table(evaluation: Evaluation) -> Table:
    rows = []
    for row in evaluation["rows"]:
        failures, n = row["format_failures"], row["n"]
        commonest = next(iter(row["commonest_failures"].items()), None)
        rows.append(
            (
                row["title"],
                row["model"],
                f"{failures:,}/{n:,} ({percent(failures / n)} %)",
                f"{row['first_letter_answers']:,}",
                "  ".join(f"{answer} {count:,}" for answer, count in row["spread"].items()),
                f"{commonest[0]!r} x {commonest[1]:,}" if commonest else NONE,
            )
        )
    columns = ("no clean answer", "read by 1st letter", "answers given", "commonest failure")
    return Table("form of the answers", ("benchmark", "model", *columns), tuple(rows))


def _order_table(evaluation: Evaluation) -> Table:
    rows = []
    for row in evaluation["rows"]:
        shuffled, bias = row["shuffled"], row["position_bias"]
        cells = (NONE, NONE, NONE, NONE)
        if shuffled is not None:
            low, high = percent(shuffled["minimum"]), percent(shuffled["maximum"])
            shares = " ".join(f"{100 * share:.0f}" for share in bias["shares"])
            cells = (
                f"{percent(shuffled['mean'])} ({low} to {high})",
                f"{shuffled['always_correct']:,} ({percent(shuffled['always_correct_share'])} %)",
                shares,
                p_text(bias["p_value"]),
            )
        normalised = row["normalised"]
        named = f"{percent(normalised['accuracy'])} ({interval(normalised['interval'])})"
        rows.append((row["title"], row["model"], named, *cells))
    columns = ("% per character", "% shuffled", "right in every order", "position shares, %", "p")
    title = "length and order of the options"
    return Table(title, ("benchmark", "model", *columns), tuple(rows))


# --- Notes ----------------------------------------------------------------------------------------


def notes(evaluation: Evaluation, overlap: Mapping[str, Any] | None = None) -> list[str]:
    """Return what a reader must know to read the tables, one sentence or two each.

    Parameters
    ----------
    overlap : mapping, optional
        What `overlap.check_overlap` found, if it was run.
    """
    found = [*_model_notes(evaluation), *_method_notes(evaluation), *_protocol_notes(evaluation)]
    found += [*_item_notes(evaluation["rows"]), *_overlap_notes(evaluation["rows"], overlap)]
    return found


def _model_notes(evaluation: Evaluation) -> Iterator[str]:
    yield (
        f"Base: {evaluation['base']} (fingerprint {evaluation['base_fingerprint']}), "
        f"{evaluation['precision']}; its rows are the same loaded model with no adapter active."
    )
    for name, model in evaluation["models"].items():
        role = f"{model['role']}; " if model["role"] else ""
        yield f"{name}: {role}{model['adapter']}, SHA-256 {model['adapter_sha256'][:16]}..."


def _method_notes(evaluation: Evaluation) -> Iterator[str]:
    yield "Intervals of an accuracy: Wilson, 95 %. They speak of new items of the same kind."
    tests = sum(
        max(len(row["groups"]), 1) for row in evaluation["rows"] if row["vs_base"] is not None
    )
    if tests:
        several = f" It is not adjusted for the {tests} comparisons made here." if tests > 1 else ""
        yield (
            "vs base: percentage points on the same items, 95 % interval by Newcombe's method 10; "
            f"p: McNemar's exact test, two-sided.{several} Test and interval are different "
            "methods: near p = 0.05 one may exclude equality where the other does not."
        )
    names = evaluation["average"][BASE]["benchmarks"]
    if len(names) > 1:
        yield (
            f"Average: over {', '.join(names)}, each counting the same, as FlowerTune's table "
            "takes it. A benchmark with parts counts once, with all its items."
        )


def _protocol_notes(evaluation: Evaluation) -> Iterator[str]:
    if evaluation["protocol"] == "flowertune":
        yield (
            "No clean answer: an output that is none of the allowed answers by itself. "
            "FlowerTune's rule still reads it by its first letter where that is one, and so does "
            "the accuracy above."
        )
        return
    yield (
        "The model's answer is the option of greatest log-likelihood; per character: divided by "
        "the option's length, for letters the same."
    )
    asked = [row["shuffled"] for row in evaluation["rows"] if row["shuffled"] is not None]
    if asked:
        count = len(asked[0]["correct"])
        yield (
            f"Shuffled: {count} random order(s) of the options beside the published one; mean "
            "(worst to best), and items right in every one of them. Position shares: how often "
            "each position was chosen there, p: chi-square test of equal shares; a small p is a "
            "habit, since the right answer has none."
        )


def _item_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Say which items were left out, which cut, and what the formulary holds."""
    first = _first_of_each(rows)
    for row in first:
        if row["limited"]:
            title, n, expected = row["title"], row["n"], row["expected"]
            yield (
                f"{title}: {n:,} of {expected:,} items, the first of its source. Not comparable "
                "with figures on the whole."
            )
    for row in rows:
        if row["truncated"]:
            yield (
                f"{row['title']}, {row['model']}: prompts longer than the context, cut on the "
                f"left: {row['truncated']:,} of {row['n']:,}."
            )
    if any(row["benchmark"] == "formulary" for row in first):
        yield (
            "Formulary: drugs that do not exist. private: facts that only sites hold; public: "
            "facts that the embedded base was pre-trained on. The wording of these questions is "
            "held out: nothing was ever trained on it. Guessing gets 25 %."
        )


def _overlap_notes(rows: Sequence[Row], overlap: Mapping[str, Any] | None) -> Iterator[str]:
    names = [row["benchmark"] for row in _first_of_each(rows)]
    report = overlap or {}
    checked = report.get("benchmarks", {})
    for name in names:
        if name in checked:
            count, n = checked[name]["items"], checked[name]["n"]
            where = f"{report['training']} (overlap.json)"
            yield f"Overlap: {count:,} of {n:,} questions of {name} occur in {where}."
    missing = [name for name in names if name not in checked and name != "formulary"]
    if missing:
        yield (
            f"Overlap of {', '.join(missing)} with the training data was not checked: "
            "grandrounds evaluate --check-overlap TRAIN_DATA."
        )


def _first_of_each(rows: Iterable[Row]) -> list[Row]:
    """Return one row of each benchmark."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["benchmark"], row)
    return list(found.values())


# --- Numbers --------------------------------------------------------------------------------------


def percent(fraction: float) -> str:
    """Return a fraction as per cent with one decimal."""
    return f"{100 * fraction:.1f}"


def interval(bounds: Sequence[float]) -> str:
    """Return the bounds of an interval as per cent."""
    return f"{percent(bounds[0])} to {percent(bounds[1])}"


def points(difference: float) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def p_text(p: float) -> str:
    """Return a p value to three decimals; never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
