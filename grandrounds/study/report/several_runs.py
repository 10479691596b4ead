"""The page of several runs side by side: curves in one chart, one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grandrounds.config.keys import FIELD_OF_KEY, PLACES
from grandrounds.config.words import NOT_TOLD
from grandrounds.errors import ConfigError
from grandrounds.server.described import before_training
from grandrounds.study.report import cost, headline, provenance
from grandrounds.study.report.charts import line_chart
from grandrounds.study.report.figures import Figure, Page, Section, Tile, some
from grandrounds.study.report.learning import Score, curve, scores_by_questions
from grandrounds.study.report.places import published
from grandrounds.study.report.read import RunFiles, folders
from grandrounds.study.report.row_charts import Dot, Row, interval_chart
from grandrounds.study.report.svg import STYLES, Axis
from grandrounds.study.tables import (
    MIB,
    NONE,
    Table,
    decimals_of,
    duration,
    fixed,
    mib,
    number,
    percent,
)
from grandrounds.wire.told import SAME_IF_TOLD, SAME_IN_A_RUN

CURVES = (
    ("communication-mib", "Cumulative communication", Axis("MiB, both ways", from_zero=True), 1.0),
    ("coverage", "Coverage", Axis("% of training examples seen", from_zero=True), 100.0),
    (
        "product-error-of-update",
        "Aggregation error",
        Axis("% of the round's update", from_zero=True),
        100.0,
    ),
    ("proximal-penalty", "Proximal penalty", Axis("nats, added to the loss", from_zero=True), 1.0),
    ("seconds", "Wall-clock time by round", Axis("seconds", from_zero=True), 1.0),
)
"""(key of metrics.jsonl, title, axis, factor)."""


def losses_in(unit: str) -> tuple[tuple[str, str, Axis, float], ...]:
    """Return the curves of losses, as `CURVES`."""
    return (
        ("held-out-loss", "Held-out loss", Axis(unit), 1.0),
        ("train-loss", "Training loss", Axis(unit), 1.0),
    )


def several_page(runs: Sequence[RunFiles]) -> Page:
    """Return the page of at least two runs.

    Raises
    ------
    ConfigError
        If a run is given twice.
    """
    named = names(runs)
    unfinished = [name for name, run in named.items() if run.status != "completed"]
    story = [f"{name}: {line}" for name in unfinished for line in headline.story(named[name])[:1]]
    moods = {headline.mood(run) for run in runs}
    page = Page(
        title=" | ".join(named) if len(runs) <= 4 else f"{len(runs)} runs",
        subtitle=f"{len(runs)} runs side by side",
        mood=next(mood for mood in ("bad", "going", "good") if mood in moods),
        status=f"{len(runs) - len(unfinished)} of {len(runs)} runs completed",
        story=story,
        tiles=[_tile(name, run) for name, run in named.items()],
        sections=_sections(named),
    )
    places = {path: name for run in runs for path, name in folders(run).items()}
    return published(page, places | {str(run.path): name for name, run in named.items()})


def names(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """Return runs by name: the folder, with as much of its path as makes it unique."""
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
    return Tile(name, value, f"held-out loss; {headline.status_text(run).lower()}")


def _sections(named: dict[str, RunFiles]) -> list[Section]:
    units = {run.config.loss_unit for run in named.values()}
    per = units.pop() if len(units) == 1 else "nats"
    figures = some(*(_curves(named, *how) for how in (*losses_in(per), *CURVES)))
    commands = [(name, provenance.repeat_command(run.config)) for name, run in named.items()]
    return [
        Section("learning", "Curves", notes=_cautions(named), figures=figures),
        Section("accuracy", "Accuracy", figures=some(_accuracy(named))),
        Section("table", "Side by side", tables=[_results(named)]),
        Section("recipe", "Recipes", tables=[_recipes(named)]),
        Section("repeat", "Reproduce", commands=commands),
    ]


def _cautions(named: dict[str, RunFiles]) -> list[str]:
    """Return why some results of these runs are not comparable.

    Sites tell no hash of their held-out examples: they are the same where the recipe draws them
    alike, the same sites evaluated, and these introduced themselves alike.
    """
    runs = list(named.values())
    if not any(run.values("held-out-loss") for run in runs):
        return ["No run measured a held-out loss."]
    flat = [run.config.flat() for run in runs]
    keys = [key for key in FIELD_OF_KEY if key in JUDGING or key.startswith("data.")]
    differing = [key for key in keys if len({str(f[key]) for f in flat}) > 1]
    if len({_judges(run) for run in runs}) > 1:
        differing.append("the sites that evaluated")
    elif told := _told_differently(runs):
        differing.append(f"what these sites told at the roll call ({', '.join(told)})")
    if not differing:
        return ["All runs are evaluated on the same held-out examples."]
    return [
        f"The runs differ in {', '.join(differing)}, so their losses are on different examples or "
        "models: small differences between the curves mean little."
    ]


JUDGING = (
    "train.objective",
    "train.dpo-beta",
    "train.dpo-length-normalised",
    "static.dataset.name",
    "static.dataset.revision",
    "model.name",
    "model.revision",
    "seed",
)
"""Keys beside `data.*` that decide which examples are held out, and what is lost on them."""


def _judges(run: RunFiles) -> tuple[tuple[int, ...], ...]:
    """Return the groups of sites whose loss a run tells, in whichever round."""
    groups = {tuple(m["evaluated"]) for m in run.metrics if m.get("evaluated")}
    return tuple(sorted(groups))


def _told_differently(runs: Sequence[RunFiles]) -> list[str]:
    """Return the facts in which the introductions of evaluating sites differ between runs."""
    judges = {site for group in _judges(runs[0]) for site in group}
    told = [{int(s["partition-id"]): s for s in run.sites} for run in runs]
    return [
        fact
        for fact in (*SAME_IN_A_RUN, *SAME_IF_TOLD)
        if any(len({str(of.get(site, {}).get(fact)) for of in told}) > 1 for site in judges)
    ]


def _curves(
    named: dict[str, RunFiles], key: str, title: str, axis: Axis, factor: float
) -> Figure | None:
    values = {name: run.values(key) for name, run in named.items()}
    if key == "proximal-penalty":
        values = {name: [(r, v) for r, v in found if v > 0] for name, found in values.items()}
    if not any(values.values()):
        return None
    series = [
        curve(name, [(r, factor * v) for r, v in found], f"{name}: {axis.label}", i)
        for i, (name, found) in enumerate(values.items())
    ]
    rounds = sorted({r for found in values.values() for r, _ in found})
    tables = [dict(found) for found in values.values()]
    shown = [[factor * t[r] if r in t else None for t in tables] for r in rounds]
    decimals = decimals_of((v for row in shown for v in row), 4)
    rows = [
        (str(r), *(fixed(v, decimals) for v in row)) for r, row in zip(rounds, shown, strict=True)
    ]
    svg = line_chart(title, series, axis, rounds[-1])
    starts = {before_training(run.config) for run in named.values()}
    first = starts.pop() if len(starts) == 1 else "what a run starts from: base or saved adapter"
    note = f"Round 0 is {first}." if key == "held-out-loss" else ""
    return Figure(key, title, svg, note, Table(("round", *named), rows))


def _accuracy(named: dict[str, RunFiles]) -> Figure | None:
    """Return the last evaluated checkpoint of each run on each benchmark, beside its base."""
    found = {name: scores_by_questions(run) for name, run in named.items()}
    rows, table = [], []
    for key in dict.fromkeys(key for by_questions in found.values() for key in by_questions):
        heading = ", ".join(part for part in key[::-1] if part)
        for i, (name, by_questions) in enumerate(found.items()):
            asked = by_questions.get(key, [])
            base = [(4, s) for s in asked if s.model == "base"]
            last = sorted((s for s in asked if s.round is not None), key=lambda s: s.round or 0)
            for style, score in base + [(i, s) for s in last[-1:]]:
                rows.append(_accuracy_row(name, score, style, heading))
                table.append((heading, name, score.model, score.words))
                heading = ""
    if not rows:
        return None
    title = "Accuracy of the last evaluated checkpoint"
    svg = interval_chart(title, rows, Axis("accuracy, %"))
    columns = ("questions", "run", "model", "accuracy (correct; 95 % interval)")
    return Figure("accuracy", title, svg, "Whiskers: 95 % intervals.", Table(columns, table))


def _accuracy_row(name: str, score: Score, style: int, heading: str) -> Row:
    shown = f"{name}, base" if score.model == "base" else name
    words = f"{name}, {score.model}: {score.words}"
    dot = Dot(100 * score.accuracy, words, score.interval_percent, style % STYLES)
    return Row(shown, [dot], heading, percent(score.accuracy))


def _results(named: dict[str, RunFiles]) -> Table:
    """Return one column per run."""
    measures: dict[str, Callable[[RunFiles], str]] = {
        "status": headline.status_text,
        "held-out loss, first": lambda r: _end(r, "held-out-loss", 0),
        "held-out loss, last": lambda r: _end(r, "held-out-loss", -1),
        "training loss, last": lambda r: _end(r, "train-loss", -1),
        "communication": lambda r: mib(r.ledger.get("communication_mib")),
        "planned": lambda r: mib(r.plan.get("total-mib")),
        "up": lambda r: mib(cost.traffic(r.ledger, "up") / MIB),
        "down": lambda r: mib(cost.traffic(r.ledger, "down") / MIB),
        "coverage": _coverage,
        "failed visits": lambda r: str(headline.visits(r)[2]),
        "wall-clock time": lambda r: duration(r.seconds),
    }
    rows = [(what, *(measure(r) for r in named.values())) for what, measure in measures.items()]
    tiles = [{t.name: t.value for t in headline.accuracy_tiles(r)} for r in named.values()]
    for key in dict.fromkeys(key for found in tiles for key in found):
        rows.append((key, *(found.get(key, NONE) for found in tiles)))
    return Table(("", *named), rows)


def _coverage(run: RunFiles) -> str:
    if covered := run.values("coverage"):
        return percent(covered[-1][1])
    return NOT_TOLD if run.trained else NONE


def _end(run: RunFiles, key: str, place: int) -> str:
    values = run.values(key)
    return fixed(values[place][1], 4) if values else NONE


def _recipes(named: dict[str, RunFiles]) -> Table:
    """Return the keys in which the runs differ."""
    flat = [run.config.flat() for run in named.values()]
    keys = [k for k in FIELD_OF_KEY if k not in PLACES]
    rows = [
        (key, *(provenance.value_text(f[key]) for f in flat))
        for key in keys
        if len({str(f[key]) for f in flat}) > 1
    ]
    if not rows:
        rows = [("all keys", *("the same" for _ in flat))]
    return Table(("key", *named), rows, "Keys that differ")
