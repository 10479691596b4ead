"""Tables of an evaluation, and the notes needed to read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grandrounds.config.words import counted
from grandrounds.data.common_and_rare import COMMON_AND_RARE
from grandrounds.data.embedded import EMBEDDED
from grandrounds.study.evaluation.benchmarks import HELD_OUT
from grandrounds.study.evaluation.greedy import GREEDY
from grandrounds.study.evaluation.verification import BASE
from grandrounds.study.tables import NONE, Table, in_percent, interval, p_text, percent, points

Evaluation = Mapping[str, Any]
Row = Mapping[str, Any]


def tables(evaluation: Evaluation) -> list[Table]:
    """Return the accuracies, then the table of the protocol."""
    special = {"flowertune": _format_table, "likelihood": _order_table, GREEDY: _words_table}
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
            cells = (in_percent(given["accuracy"]), interval(given["interval"]), difference)
            rows.append(("average", model, NONE, *cells, NONE, NONE))
    measure = "exact match" if evaluation["protocol"] == GREEDY else "accuracy"
    figures = ("correct", "%", "95 % interval", "vs base", "95 % interval", "p")
    columns = ("benchmark", "model", *figures)
    return Table(columns, rows, f"{measure}, protocol {evaluation['protocol']}")


def _accuracy_rows(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of one benchmark: part by part, model by model."""
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
        in_percent(part["accuracy"]),
        interval(part["interval"]),
        *compared,
    )


# --- By protocol ----------------------------------------------------------------------------------


def _format_table(evaluation: Evaluation) -> Table:
    rows = []
    for row in evaluation["rows"]:
        failures, n = row["format_failures"], row["n"]
        commonest = next(iter(row["commonest_failures"].items()), None)
        rows.append(
            (
                row["title"],
                row["model"],
                f"{failures:,}/{n:,} ({percent(failures / n)})",
                f"{row['first_letter_answers']:,}",
                "  ".join(f"{answer} {count:,}" for answer, count in row["spread"].items()),
                f"{commonest[0]!r} x {commonest[1]:,}" if commonest else NONE,
            )
        )
    columns = ("no clean answer", "read by 1st letter", "answers given", "commonest failure")
    return Table(("benchmark", "model", *columns), rows, "format of the answers")


def _order_table(evaluation: Evaluation) -> Table:
    rows = []
    for row in evaluation["rows"]:
        shuffled, bias = row["shuffled"], row["position_bias"]
        cells = (NONE, NONE, NONE, NONE)
        if shuffled is not None:
            low, high = in_percent(shuffled["minimum"]), in_percent(shuffled["maximum"])
            cells = (
                f"{in_percent(shuffled['mean'])} ({low} to {high})",
                f"{shuffled['always_correct']:,} ({percent(shuffled['always_correct_share'])})",
                " ".join(f"{100 * share:.0f}" for share in bias["shares"]) if bias else NONE,
                p_text(bias["p_value"]) if bias else NONE,
            )
        normalised = row["normalised"]
        named = f"{in_percent(normalised['accuracy'])} ({interval(normalised['interval'])})"
        rows.append((row["title"], row["model"], named, *cells))
    columns = ("% per character", "% shuffled", "right in every order", "position shares, %", "p")
    return Table(("benchmark", "model", *columns), rows, "length and order of the options")


def _words_table(evaluation: Evaluation) -> Table:
    rows = []
    for row in evaluation["rows"]:
        f1, loss, against = row["f1"], row["loss"], row["f1"]["vs_base"]
        compared = (NONE, NONE, NONE)
        if against is not None:
            compared = (
                points(against["difference"]),
                " to ".join(map(points, against["interval"])) if against["interval"] else NONE,
                p_text(against["p_value"]),
            )
        rows.append(
            (
                row["title"],
                row["model"],
                in_percent(f1["mean"]),
                interval(f1["interval"]) if f1["interval"] else NONE,
                *compared,
                f"{loss['nats_per_token']:.4f}",
                f"{row['cut']:,}/{row['n']:,}",
            )
        )
    figures = ("F1, %", "95 % interval", "vs base", "95 % interval", "p")
    columns = ("benchmark", "model", *figures)
    return Table((*columns, "held-out loss", "cut"), rows, "token F1 and held-out loss")


# --- Notes ----------------------------------------------------------------------------------------


def notes(evaluation: Evaluation, overlap: Mapping[str, Any] | None = None) -> list[str]:
    """Return what a reader must know to interpret the tables.

    Parameters
    ----------
    overlap : mapping, optional
        Report of `overlap.check_overlap`, if it was run.
    """
    found = [*_model_notes(evaluation), *_method_notes(evaluation), *_protocol_notes(evaluation)]
    found += [*_item_notes(evaluation), *_overlap_notes(evaluation["rows"], overlap)]
    return found


def _model_notes(evaluation: Evaluation) -> Iterator[str]:
    yield (
        f"Base: {evaluation['base']} (fingerprint {evaluation['base_fingerprint']}), "
        f"{evaluation['precision']}; its rows come from the same loaded model with no adapter "
        "active."
    )
    for name, model in evaluation["models"].items():
        role = f"{model['role']}; " if model["role"] else ""
        yield f"{name}: {role}{model['adapter']}, SHA-256 {model['adapter_sha256'][:16]}..."


def _method_notes(evaluation: Evaluation) -> Iterator[str]:
    yield "Accuracy intervals: Wilson, 95 %, for new items of the same kind."
    tests = sum(
        max(len(row["groups"]), 1) for row in evaluation["rows"] if row["vs_base"] is not None
    )
    if tests:
        several = f" Not adjusted for the {tests} comparisons made here." if tests > 1 else ""
        yield (
            "vs base: difference in percentage points on the same items, 95 % interval by "
            f"Newcombe's method 10; p: McNemar's exact test, two-sided.{several} Near p = 0.05, "
            "test and interval may disagree, since they are different methods."
        )
    names = evaluation["average"][BASE]["benchmarks"]
    if len(names) > 1:
        yield (
            f"Average: unweighted mean of {', '.join(names)}, as in FlowerTune's table. A "
            "benchmark with parts counts once, with all its items."
        )


def _protocol_notes(evaluation: Evaluation) -> Iterator[str]:
    if evaluation["protocol"] == GREEDY:
        yield from _greedy_notes(evaluation)
        return
    if evaluation["protocol"] == "flowertune":
        yield (
            "No clean answer: the output is not exactly one of the allowed answers. FlowerTune's "
            "rule falls back to its first letter, and so does the accuracy above."
        )
        return
    yield (
        "The model's answer is the option with the highest log-likelihood; per character: "
        "normalised by the option's length, which changes nothing for single letters."
    )
    asked = [row["shuffled"] for row in evaluation["rows"] if row["shuffled"] is not None]
    if asked:
        count = len(asked[0]["correct"])
        yield (
            f"Shuffled: {counted(count, 'random order')} of the options, besides the published "
            "one; mean (worst to best), and items correct in every order. Position shares: how "
            "often each position was chosen when shuffled; p: chi-square test of equal shares. A "
            "small p means position bias, since the correct answer is equally likely everywhere."
        )


def _greedy_notes(evaluation: Evaluation) -> Iterator[str]:
    yield (
        "Answers: greedy, in the prompt of the run, at most "
        f"{evaluation['answer_tokens']:,} tokens (fewer if no reference answer is so long); cut: "
        "answers that reached the limit."
    )
    yield (
        "Exact match and token F1 by SQuAD's rule: case, ASCII punctuation and the articles a, an "
        "and the do not count. F1: mean over the rows, Student's interval; p: paired t-test "
        "against the base. Held-out loss: nats per token of the reference answers."
    )
    for row in evaluation["rows"]:
        if count := row["differing_numbers"]:
            yield (
                f"{row['model']}: {count:,} of {row['correct']:,} exact matches have other numbers "
                "than the reference, such as 1.5 for 15: SQuAD's rule removes decimal points."
            )
    for row in _first_of_each(evaluation["rows"]):
        source = row["source"]
        elsewhere = int(source["trained-elsewhere"])
        shared = (
            f" {elsewhere:,} of these questions are among the training rows of another site."
            if elsewhere
            else ""
        )
        yield (
            f"Held-out rows: those of {source['held-out']} that its {source['sites']} sites did "
            f"not train on.{shared}"
        )


def _item_notes(evaluation: Evaluation) -> Iterator[str]:
    """Yield notes on limited and truncated items, and on the formulary."""
    rows = evaluation["rows"]
    first = _first_of_each(rows)
    for row in first:
        if row["limited"]:
            title, n, expected = row["title"], row["n"], row["expected"]
            yield (
                f"{title}: {n:,} of {expected:,} items{_chosen(row, evaluation)}. Not comparable "
                "with results on the full set."
            )
        yield from _one_sided(row)
    for row in rows:
        if row["truncated"]:
            yield (
                f"{row['title']}, {row['model']}: {row['truncated']:,} of {row['n']:,} prompts "
                "exceeded the context length and were truncated on the left."
            )
    if any(row["benchmark"] == "formulary" for row in first):
        yield (
            "Formulary: fictional drugs. private: facts held by single sites only; public: facts "
            "the embedded base was pre-trained on. The wording of these questions is held out from "
            "all training. Chance is 25 %."
        )
    if any(row["benchmark"] == COMMON_AND_RARE for row in first):
        yield (
            "Common and rare: fictional drugs. common: facts of many records, in a wording held "
            "out from all training; rare: the questions of records that state what no other does; "
            "absent: the same of patients who are not in the data. More on rare than on absent is "
            "memory of single records. Chance is 4.2 %."
        )


def _chosen(row: Row, evaluation: Evaluation) -> str:
    """Return how the items of a limited row were chosen."""
    if evaluation["limit"] is None:
        return ""
    if row["benchmark"] == HELD_OUT:
        return ", taken from the sites in turn"
    if evaluation.get("sample") is None:  # files of version 0.2.0 and before
        return ", the first"
    return ", a sample with the answers in the proportions of the full set"


MOST_OF_ONE_ANSWER = 0.9
"""Share of one answer above which a comparison says little about knowledge."""


def _one_sided(row: Row) -> Iterator[str]:
    """Yield a note if nearly all items of a closed benchmark have the same answer."""
    largest = row.get("largest_answer")  # absent in files of earlier versions
    if largest is None or row["benchmark"] == HELD_OUT:
        return
    share = largest["n"] / row["n"]
    if share > MOST_OF_ONE_ANSWER:
        yield (
            f"{row['title']}: the answer of {largest['n']:,} of {row['n']:,} items is "
            f"{largest['label']!r}, so a model that always says it gets {in_percent(share)} %. "
            "Accuracy, difference and p say little about knowledge here."
        )


def _overlap_notes(rows: Sequence[Row], overlap: Mapping[str, Any] | None) -> Iterator[str]:
    names = [row["benchmark"] for row in _first_of_each(rows)]
    never = (*EMBEDDED, HELD_OUT)  # by construction apart from the training rows, or some of them
    report = overlap or {}
    checked = report.get("benchmarks", {})
    for name in names:
        if name in checked:
            count, n = checked[name]["items"], checked[name]["n"]
            where = f"{report['training']} (overlap.json)"
            yield f"Overlap: {count:,} of {n:,} {name} questions occur in {where}."
    missing = [name for name in names if name not in checked and name not in never]
    if missing:
        yield (
            f"Overlap of {', '.join(missing)} with the training data was not checked; run "
            "grandrounds evaluate --check-overlap TRAIN_DATA."
        )


def _first_of_each(rows: Iterable[Row]) -> list[Row]:
    """Return the first row of each benchmark."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["benchmark"], row)
    return list(found.values())
