"""What `grandrounds evaluate` prints: its tables and notes, from its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.check_figures.page import Texts
from scripts.check_figures.raw import Json, evaluations_in
from scripts.check_figures.scores import GREEDY
from scripts.check_figures.sheet import Sheet
from scripts.check_figures.shown import numbers_in


def check_printed(text: str, folder: Path) -> Sheet:
    """Check the tables and notes that `grandrounds evaluate` prints against its JSON."""
    content = json.loads((folder / "evaluation.json").read_text())
    names = [str(folder), str(folder.parent)]
    for one in evaluations_in(content):
        names += [one["base"], *(model["adapter"] for model in one["models"].values())]
        names += [row["title"] for row in one["rows"]]
    texts: Texts = {f"line/{i}": line for i, line in enumerate(text.splitlines())}
    sheet = Sheet(texts, names)
    places = iter(texts)

    def rows(caption: str, wanted: Sequence[Sequence[float]]) -> None:
        if not any(texts[at].startswith(caption) for at in places):
            sheet.findings.append(f"there is no table {caption!r}")
            return
        next(places, None)  # its columns
        for values in wanted:
            at = next(places, "")
            sheet.want(at, values) if at else sheet.findings.append(f"{caption}: a row is missing")

    for one in evaluations_in(content):
        protocol = one["protocol"]
        measure = "exact match" if protocol == GREEDY else "accuracy"
        rows(f"{measure}, protocol {protocol}", list(accuracy_rows(one)))
        rows(*special_rows(one))
    for at in sheet.under("line/"):
        line = texts[at]
        if at in sheet.seen:
            continue
        if line.startswith("  benchmark "):
            sheet.among(at, [95])
        elif re.match("about .* to go|written: ", line):
            sheet.seen.add(at)  # a guess of seconds, a path
        elif line:
            sheet.among(at, known_of(content))
    return sheet


def digits(model: str) -> list[float]:
    """Return the number in `peft_24`."""
    return [shown.value for shown in numbers_in(model)]


def accuracy_rows(one: Json) -> Iterator[list[float]]:
    """Yield the numbers of the rows of accuracies: part by part, model by model."""
    for name in dict.fromkeys(row["benchmark"] for row in one["rows"]):
        of = [row for row in one["rows"] if row["benchmark"] == name]
        for part in range(max(1, len(of[0]["groups"]))):
            for row in of:
                cell = row["groups"][part] if row["groups"] else row
                values = [cell["correct"], cell["n"], *_percent(cell["accuracy"])]
                values += _percent(*cell["interval"])
                if against := cell["vs_base"]:
                    values += _percent(against["difference"], *against["interval"])
                    values.append(against["p_value"])
                yield [*digits(row["model"]), *values]
    if any(len(average["benchmarks"]) > 1 for average in one["average"].values()):
        for model, average in one["average"].items():
            values = _percent(average["accuracy"], *average["interval"])
            gain = average["accuracy"] - one["average"]["base"]["accuracy"]
            yield [*digits(model), *values, *(_percent(gain) if model != "base" else [])]


def special_rows(one: Json) -> tuple[str, list[list[float]]]:
    """Return caption and numbers of the table of a protocol."""
    found = []
    for row in one["rows"]:
        values = digits(row["model"])
        if one["protocol"] == "flowertune":
            failures, n = row["format_failures"], row["n"]
            values += [failures, n, *_percent(failures / n), row["first_letter_answers"]]
            values += row["spread"].values()
            if said := next(iter(row["commonest_failures"].items()), None):
                values += [*digits(repr(said[0])), said[1]]
        elif one["protocol"] == GREEDY:
            f1, against = row["f1"], row["f1"]["vs_base"]
            values += _percent(f1["mean"], *(f1["interval"] or ()))
            if against:
                values += _percent(against["difference"], *(against["interval"] or ()))
                values += [] if against["p_value"] is None else [against["p_value"]]
            values += [row["loss"]["nats_per_token"], row["cut"], row["n"]]
        else:
            values += _percent(row["normalised"]["accuracy"], *row["normalised"]["interval"])
            if many := row["shuffled"]:
                values += _percent(many["mean"], many["minimum"], many["maximum"])
                values += [many["always_correct"], *_percent(many["always_correct_share"])]
            if bias := row["position_bias"]:
                values += [*_percent(*bias["shares"]), bias["p_value"]]
        found.append(values)
    captions = {"flowertune": "format of the answers", GREEDY: "token F1 and held-out loss"}
    return captions.get(one["protocol"], "length and order of the options"), found


def _percent(*shares: float) -> list[float]:
    return [100 * share for share in shares]


def known_of(content: Json) -> list[float]:
    """Return the numbers that lines of progress and notes may hold."""
    # methods and hashes, chance, SQuAD's rule
    found: list[float] = [95, 10, 0.05, 256, 25, 4.2, 1.5, 15]
    for one in evaluations_in(content):
        found += [one.get("answer_tokens") or 0, *(n for m in one["average"] for n in digits(m))]
        found.append(sum(max(len(r["groups"]), 1) for r in one["rows"] if r["vs_base"]))
        for row in one["rows"]:
            asked = row["n"] * (1 + len((row.get("shuffled") or {"correct": ()})["correct"]))
            found += [row["n"], row["expected"], row["correct"], row["truncated"], asked]
            found += [row["largest_answer"]["n"], row.get("differing_numbers") or 0]
            found.append(len((row.get("shuffled") or {"correct": ()})["correct"]))
            found += _percent(row["largest_answer"]["n"] / row["n"])
            source = row["source"].values() if isinstance(row["source"], dict) else ()
            found += [shown.value for value in source for shown in numbers_in(str(value))]
    return found
