"""The page of runs side by side: curves on one another, one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grandrounds.config.keys import FIELD_OF_KEY, PLACES
from grandrounds.errors import ConfigError
from grandrounds.study.report import facts, learning
from grandrounds.study.report.charts import Series, line_chart
from grandrounds.study.report.drawing import STYLES
from grandrounds.study.report.figures import (
    NONE,
    Figure,
    Page,
    Section,
    Table,
    Tile,
    decimals_of,
    duration,
    fixed,
    mib,
    number,
    percent,
)
from grandrounds.study.report.learning import Score, curve, scores
from grandrounds.study.report.one_run import made, some
from grandrounds.study.report.read import RunFiles
from grandrounds.study.report.row_charts import Dot, Row, interval_chart

CURVES = (
    ("held-out-loss", "Held-out loss", "nats per answer token", 1.0, False),
    ("train-loss", "Training loss", "nats per answer token", 1.0, False),
    ("communication-mib", "Communication so far", "MiB, both ways", 1.0, True),
    ("coverage", "Coverage", "% of all examples trained on", 100.0, True),
    ("product-error-of-update", "Aggregation error", "% of the round's update", 100.0, True),
    ("proximal-penalty", "Proximal penalty", "nats, added to the loss", 1.0, True),
    ("seconds", "Seconds of each round", "wall-clock seconds", 1.0, True),
)
"""(key of metrics.jsonl, title, unit, factor, whether the axis begins at 0)."""


def several_page(runs: Sequence[RunFiles]) -> Page:
    """Return the page of at least two runs.

    Raises
    ------
    ConfigError
        If a run is given twice.
    """
    named = names(runs)
    unfinished = [name for name, run in named.items() if run.status != "completed"]
    story = [f"{name}: {line}" for name in unfinished for line in facts.story(named[name])[:1]]
    return Page(
        title=" | ".join(named) if len(runs) <= 4 else f"{len(runs)} runs",
        subtitle=f"{len(runs)} runs side by side",
        mood=_mood(list(named.values())),
        status=f"{len(runs) - len(unfinished)} of {len(runs)} runs completed",
        story=story,
        tiles=[_tile(name, run) for name, run in named.items()],
        sections=[s for s in _sections(named) if s],
        made=made(),
    )


def _mood(runs: Sequence[RunFiles]) -> str:
    """Return the worst mood of the runs."""
    moods = {facts.MOODS.get(run.status, "bad") for run in runs}
    return next(mood for mood in ("bad", "going", "good") if mood in moods)


def names(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """Return runs by a name each: the folder's, with as much of its path as tells them apart."""
    paths = [run.path for run in runs]
    if len(set(paths)) < len(paths):
        twice = next(p for p in paths if paths.count(p) > 1)
        raise ConfigError(f"{twice} is given twice: give each run once.")
    for parts in range(1, max(len(p.parts) for p in paths) + 1):
        found = {"/".join(run.path.parts[-parts:]): run for run in runs}
        if len(found) == len(runs):
            break
    return found


def _tile(name: str, run: RunFiles) -> Tile:
    losses = run.values("held-out-loss")
    value = number(losses[-1][1]) if losses else NONE
    return Tile(name, value, f"held-out loss; {facts.status_text(run).lower()}")


def _sections(named: dict[str, RunFiles]) -> list[Section]:
    figures = some(*(_curves(named, *how) for how in CURVES))
    return [
        Section("learning", "Curves", notes=_cautions(named), figures=figures),
        Section("accuracy", "Accuracy", figures=some(_accuracy(named))),
        Section("table", "Side by side", tables=[_facts_table(named)]),
        Section("recipe", "Recipes", tables=[_recipes(named)]),
        Section(
            "repeat",
            "How to repeat them",
            commands=[(name, facts.repeat_command(run.config)) for name, run in named.items()],
        ),
    ]


def _cautions(named: dict[str, RunFiles]) -> list[str]:
    """Return why some figures of these runs do not compare."""
    keys = [
        "static.dataset.name",
        "model.name",
        "seed",
        "data.partitioner",
        "data.num-partitions",
        "data.held-out-fraction",
        "data.prompt-template",
    ]
    flat = [run.config.flat() for run in named.values()]
    differing = [key for key in keys if len({str(f[key]) for f in flat}) > 1]
    if not differing:
        return ["All runs are judged on the same held-out examples."]
    return [
        f"The runs differ in {', '.join(differing)}: their losses are of different questions or "
        "models, and small differences between the curves say little."
    ]


def _curves(
    named: dict[str, RunFiles], key: str, title: str, unit: str, factor: float, from_zero: bool
) -> Figure | None:
    values = {name: run.values(key) for name, run in named.items()}
    if key == "proximal-penalty":
        values = {name: [(r, v) for r, v in found if v > 0] for name, found in values.items()}
    if not any(values.values()):
        return None
    series: list[Series] = []
    for i, (name, found) in enumerate(values.items()):
        series.append(curve(name, [(r, factor * v) for r, v in found], f"{name}: {unit}", i))
    rounds = sorted({r for found in values.values() for r, _ in found})
    tables = [dict(found) for found in values.values()]
    shown = [[factor * t[r] if r in t else None for t in tables] for r in rounds]
    decimals = decimals_of((v for row in shown for v in row), 4)
    rows = [
        (str(r), *(fixed(v, decimals) for v in row)) for r, row in zip(rounds, shown, strict=True)
    ]
    svg = line_chart(title, series, y_label=unit, from_zero=from_zero, x_range=(0, rounds[-1]))
    note = "Round 0 is the base, untrained." if key == "held-out-loss" else ""
    return Figure(key, title, svg, note, Table(("round", *named), rows))


def _accuracy(named: dict[str, RunFiles]) -> Figure | None:
    """Return the last measured checkpoint of each run on each benchmark, beside its base."""
    found = {name: scores(run) for name, run in named.items()}
    keys = dict.fromkeys(
        (s.protocol, s.benchmark, s.group) for all_ in found.values() for s in all_
    )
    rows, table = [], []
    for key in keys:
        heading = ", ".join(part for part in key[::-1] if part)
        for i, (name, all_) in enumerate(found.items()):
            of_key = [s for s in all_ if (s.protocol, s.benchmark, s.group) == key]
            base = [s for s in of_key if s.model == "base"]
            last = sorted((s for s in of_key if s.round is not None), key=lambda s: s.round or 0)
            for style, score in [(4, s) for s in base] + [(i, s) for s in last[-1:]]:
                rows.append(_accuracy_row(name, score, style, heading))
                table.append((heading, name, score.model, score.words))
                heading = ""
    if not rows:
        return None
    title = "Accuracy of the last measured checkpoint"
    svg = interval_chart(title, rows, x_label="right answers, %", unit=" %", decimals=1)
    columns = ("questions", "run", "model", "accuracy (correct; 95 % interval)")
    return Figure("accuracy", title, svg, "Whiskers: 95 % intervals.", Table(columns, table))


def _accuracy_row(name: str, score: Score, style: int, heading: str) -> Row:
    low, high = (100 * end for end in score.interval)
    shown = f"{name}, base" if score.model == "base" else name
    words = f"{name}, {score.model}: {score.words}"
    return Row(shown, [Dot(100 * score.accuracy, words, low, high, style % STYLES)], heading)


def _facts_table(named: dict[str, RunFiles]) -> Table:
    """Return the runs as columns, what is known of each as rows."""
    measures: dict[str, Callable[[RunFiles], str]] = {
        "status": facts.status_text,
        "held-out loss, first": lambda r: _end(r, "held-out-loss", 0),
        "held-out loss, last": lambda r: _end(r, "held-out-loss", -1),
        "training loss, last": lambda r: _end(r, "train-loss", -1),
        "sent and received": lambda r: mib(r.ledger.get("communication_mib")),
        "planned": lambda r: mib(r.plan.get("total-mib")),
        "up": lambda r: mib(learning.traffic(r.ledger, "up") / learning.MIB),
        "down": lambda r: mib(learning.traffic(r.ledger, "down") / learning.MIB),
        "coverage": lambda r: percent(r.values("coverage")[-1][1]) if r.trained else NONE,
        "failed visits": lambda r: str(sum(len(m.get("failed") or ()) for m in r.metrics)),
        "time": lambda r: duration(sum(s for _, s in r.values("seconds"))),
    }
    tiles = {name: {t.name: t.value for t in facts.accuracy_tiles(r)} for name, r in named.items()}
    rows = [(what, *(measure(r) for r in named.values())) for what, measure in measures.items()]
    for key in dict.fromkeys(key for found in tiles.values() for key in found):
        rows.append((key, *(tiles[name].get(key, NONE) for name in named)))
    return Table(("", *named), rows)


def _end(run: RunFiles, key: str, place: int) -> str:
    values = run.values(key)
    return fixed(values[place][1], 4) if values else NONE


def _recipes(named: dict[str, RunFiles]) -> Table:
    """Return the keys in which the runs differ."""
    flat = [run.config.flat() for run in named.values()]
    keys = [k for k in FIELD_OF_KEY if k not in PLACES]
    rows = [
        (key, *(facts.value_text(f[key]) for f in flat))
        for key in keys
        if len({str(f[key]) for f in flat}) > 1
    ]
    if not rows:
        rows = [("all keys", *("the same" for _ in flat))]
    return Table(("key", *named), rows, "Keys that differ")
