"""Every figure on the page of several runs."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.check_figures.page import Texts
from scripts.check_figures.provenance_rules import DEFAULTS, configured, text_of
from scripts.check_figures.raw import Raw
from scripts.check_figures.run_rules import cells
from scripts.check_figures.scores import Score, pairs, scores
from scripts.check_figures.sheet import Cell, Sheet
from scripts.check_figures.shown import of_duration

CURVES = {
    "held-out-loss": 1.0,
    "train-loss": 1.0,
    "communication-mib": 1.0,
    "coverage": 100.0,
    "product-error-of-update": 100.0,
    "proximal-penalty": 1.0,
    "seconds": 1.0,
}
"""Key of metrics.jsonl → factor on the page."""


def check_several_page(texts: Texts, runs: Sequence[Raw]) -> Sheet:
    """Check the page of several runs; the sheet holds what was found."""
    sheet = Sheet(texts, [name for raw in runs for name in raw.names])
    done = sum(raw.summary.get("status") == "completed" for raw in runs)
    sheet.want("head/subtitle", [len(runs)])
    sheet.want("head/status", [done, len(runs)])
    for name, raw in called(runs).items():
        judged = raw.series("held-out-loss")
        sheet.want(f"tile/{name}/value", [judged[-1][1]] if judged else [])
        sheet.want(f"tile/{name}/note", status(raw))
    for key, factor in CURVES.items():
        curve(sheet, runs, key, factor)
    accuracies(sheet, runs)
    side_by_side(sheet, runs)
    same_exam(sheet, runs)
    known = [value for raw in runs for value in configured(raw)]
    for place in (*sheet.under("command/"), *sheet.under("note/learning/")):
        sheet.among(place, known)
    for place in sheet.under("story/"):
        sheet.among(place, [raw.rounds + 1 for raw in runs])
    for place in sheet.under("table/recipe/Keys that differ/cell/"):
        row, _, column = place.rpartition("/")
        key = sheet.texts.get(f"{row}/0", "")
        if column != "0" and key != "all keys":  # are the same
            sheet.verbatim(place, text_of(runs[int(column) - 1].config.get(key)))
        elif key in DEFAULTS:
            sheet.verbatim(place, key)
    sheet.ticks()
    sheet.rest()
    return sheet


def called(runs: Sequence[Raw]) -> dict[str, Raw]:
    """Return runs by the name of their folder, with as much of the path as tells them apart."""
    parts = 1
    while len({raw.path.absolute().parts[-parts:] for raw in runs}) < len(runs):
        parts += 1
    return {"/".join(raw.path.absolute().parts[-parts:]): raw for raw in runs}


def status(raw: Raw) -> list[float]:
    ended = raw.summary.get("status") == "completed"
    return [raw.rounds] if ended else [raw.rounds, raw.planned]


def values_of(raw: Raw, key: str, factor: float) -> dict[int, float]:
    found = {r: factor * v for r, v in raw.series(key)}
    return {r: v for r, v in found.items() if v > 0 or key != "proximal-penalty"}


def curve(sheet: Sheet, runs: Sequence[Raw], key: str, factor: float) -> None:
    values = [values_of(raw, key, factor) for raw in runs]
    if not any(values):
        return
    sheet.marks(key, [pair for found in values for pair in found.items()])
    rounds = sorted({r for found in values for r in found})
    rows: list[list[Cell]] = [[[r], *(cells(found.get(r)) for found in values)] for r in rounds]
    sheet.table(f"figure/{key}", rows)
    if key == "held-out-loss":
        sheet.want(f"figure/{key}/note", [0])


def _round(score: Score) -> int:
    return score.round or 0


def accuracies(sheet: Sheet, runs: Sequence[Raw]) -> None:
    marks: list[list[float]] = []
    rows: list[list[Cell]] = []
    labels: list[float] = [95]
    asked: list[dict[tuple[str, str, str], list[Score]]] = [{} for _ in runs]
    for of, raw in zip(asked, runs, strict=True):
        for score in scores(raw):
            of.setdefault((score.protocol, score.benchmark, score.group), []).append(score)
    for key in dict.fromkeys(key for of in asked for key in of):
        for of in asked:
            tuned = sorted((s for s in of.get(key, ()) if s.round is not None), key=_round)
            for score in [*(s for s in of.get(key, ()) if s.model == "base"), *tuned[-1:]]:
                marks.append([*score.digits, *score.shown])
                rows.append([[], [], score.digits, score.shown])
                labels.append(score.percent)
    if marks:
        sheet.marks("accuracy", marks)
        sheet.table("figure/accuracy", rows)
        sheet.labels("accuracy", labels)
        sheet.want("figure/accuracy/note", [95])


def side_by_side(sheet: Sheet, runs: Sequence[Raw]) -> None:
    """Check the table with one column per run."""

    def ends(raw: Raw, key: str, place: int) -> Cell:
        values = raw.series(key)
        return [values[place][1]] if values else "-"

    def covered(raw: Raw) -> Cell:
        values = raw.series("coverage")
        return [100 * values[-1][1]] if values else "-"

    def failed(raw: Raw) -> Cell:
        return [raw.failures("failed")]

    def took(raw: Raw) -> Cell:
        return of_duration(sum(line["seconds"] for line in raw.lines))

    rows: list[list[Cell]] = [
        ["status", *(status(raw) for raw in runs)],
        ["held-out loss, first", *(ends(raw, "held-out-loss", 0) for raw in runs)],
        ["held-out loss, last", *(ends(raw, "held-out-loss", -1) for raw in runs)],
        ["training loss, last", *(ends(raw, "train-loss", -1) for raw in runs)],
        ["communication", *([raw.sent()] for raw in runs)],
        ["planned", *([raw.plan["total-mib"]] for raw in runs)],
        ["up", *([raw.sent(".up")] for raw in runs)],
        ["down", *([raw.sent(".down")] for raw in runs)],
        ["coverage", *(covered(raw) for raw in runs)],
        ["failed visits", *(failed(raw) for raw in runs)],
        ["wall-clock time", *(took(raw) for raw in runs)],
    ]
    asked = [{name: (base, tuned) for name, base, tuned in pairs(raw)[:4]} for raw in runs]
    for name in dict.fromkeys(name for of in asked for name in of):
        shares: list[Cell] = []
        for of in asked:
            ends = of.get(name, ())
            shares.append([one.percent for one in ends if one] or "-")
        rows.append([name, *shares])
    sheet.table("table/table/", rows)


def same_exam(sheet: Sheet, runs: Sequence[Raw]) -> None:
    """Check the sentence that all runs are judged on the same examples."""
    keys = {k for raw in runs for k in raw.config if k.startswith("data.")}
    keys |= {"static.dataset.name", "model.name", "seed"}
    told = ("rows", "train-examples", "held-out-examples", "base", "prompt")

    def judged(raw: Raw) -> tuple[object, ...]:
        groups = {tuple(line["evaluated"]) for line in raw.lines if line.get("evaluated")}
        sites = {s["partition-id"]: s for s in raw.sites}
        answers = [(s, *(sites[s].get(f) for f in told)) for g in sorted(groups) for s in g]
        return sorted(groups), answers, [(key, str(raw.config.get(key))) for key in sorted(keys)]

    if any(raw.series("held-out-loss") for raw in runs):
        is_same = all(judged(raw) == judged(runs[0]) for raw in runs)
        said = sheet.texts.get("note/learning/0", "").startswith(
            "All runs are evaluated on the same"
        )
        if is_same != said:
            sheet.findings.append(
                f"note/learning/0 says {sheet.texts.get('note/learning/0')!r}: recipes, evaluating "
                f"sites and their answers are {'the same' if is_same else 'not the same'}"
            )
        sheet.checked["sentence"] += is_same == said
