"""The page of a `comparison.json` (docs/compare.md): arms side by side, and who gained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grandrounds.errors import DataError
from grandrounds.study.report.comparison_file import (
    EVERYWHERE,
    LOSS,
    OWN,
    POINTS,
    STYLE,
    Json,
    arms_of,
    decimals_for,
    estimate_of,
    interval_of,
    mean_of,
    measures,
    words,
)
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
    is_number,
    number,
    percent,
)
from grandrounds.study.report.one_run import made, some
from grandrounds.study.report.row_charts import Dot, Row, interval_chart


def comparison_page(comparison: Json, file: Path) -> Page:
    """Return the page of a comparison.

    Raises
    ------
    DataError
        If it is not what `grandrounds compare` writes.
    """
    try:
        return _page(comparison, file)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{file} is not what grandrounds compare writes ({type(error).__name__}: {error}). "
            "Repeat the comparison."
        ) from error


def _page(comparison: Json, file: Path) -> Page:
    config, units = comparison["config"], comparison["units"]
    complete = comparison["status"] == "complete"
    story = (
        []
        if complete
        else [
            f"{units['done']} of {units['planned']} parts are finished; the same command goes on: "
            f"{comparison['command']}"
        ]
    )
    return Page(
        title=f"What the federation gained: {file.absolute().parent.name}",
        subtitle=f"{config['model.name']} on {config['static.dataset.name']}, "
        f"{config['data.num-partitions']} sites, {config['data.partitioner']}; "
        f"seeds {', '.join(map(str, comparison['seeds']))}",
        mood="good" if complete else "going",
        status="Complete" if complete else f"{units['done']} of {units['planned']} parts finished",
        story=story,
        tiles=_tiles(comparison),
        sections=[s for s in _sections(comparison) if s],
        made=made(),
    )


def _tiles(comparison: Json) -> list[Tile]:
    found = []
    for gain in comparison["gains"]:
        test = gain["over-seeds"]
        if not test or not is_number(test.get("mean")):
            continue
        _, unit, factor = measures(comparison)[gain["measure"]]
        if (
            gain["over"] == "base"
            or comparison["exams"].get(gain["measure"], {}).get("measures") == "kept"
        ):
            continue
        what = "loss" if gain["measure"] == LOSS else gain["measure"]
        unit = "nats" if factor == 1 else "points"
        gained = mean_of(test, factor)
        places = decimals_of([gained], least=0 if factor == 1 else 1) if gained else 0
        value = f"{fixed(gained, places, sign=True)} {unit}"
        rival = _where(gain)
        found.append(Tile(f"federated over {rival}: {what}", value, _sites_won(gain)))
    budget = comparison["budget"]
    note = f"{budget['rounds']} rounds of {budget['cohort']} of {budget['sites']} sites"
    found.append(Tile("time", duration(comparison["seconds"]), note))
    return found[:8]


def _where(gain: Json) -> str:
    """Return the rival of a gain as the arms name it."""
    if gain["over"] != "local" or "where" not in gain:
        return str(gain["over"])
    return OWN if gain["where"] == "own" else EVERYWHERE


def _sites_won(gain: Json) -> str:
    over_sites = gain.get("over-sites")
    if not over_sites:
        return "above 0: the federation is better"
    better, equal = over_sites["better"], over_sites["equal"]
    told = f"better at {better} of {better + over_sites['worse'] + equal} sites"
    return f"{told}, equal at {equal}" if equal else told


def _sections(comparison: Json) -> list[Section]:
    arms = [_arms(comparison, *item) for item in measures(comparison).items()]
    notes = ["Same base, recipe, data and number of example visits in every arm."]
    if len(comparison["seeds"]) < 2:
        notes.append("One seed: no interval can be given, and a repetition may come out otherwise.")
    else:
        notes.append(
            "Whiskers: 95 % intervals over the seeds (Student's t, which may reach beyond 0 and "
            "100 %; what is shown ends there)."
        )
    if EVERYWHERE in arms_of(comparison):
        notes.append(
            "A site alone has a model of its own. Own part: it is asked that site's questions. "
            "Everywhere: it is asked all sites' questions, as the shared adapter is."
        )
    joining = [
        _joining(comparison, rival, which, measure)
        for rival in ("local", "leave-one-out")
        for which in ("own", "everywhere", "others")
        for measure in measures(comparison)
    ]
    sites = [_sites(comparison, *item) for item in measures(comparison).items()]
    return [
        Section("arms", "The arms", notes=notes, figures=some(*arms), tables=[_table(comparison)]),
        Section(
            "joining",
            "What a site gains by joining",
            notes=[
                "Right of the line: joining is better.",
                "Over local: against what it could do alone. Over leave-one-out: against a "
                "federation without it, which it would be given all the same.",
            ],
            figures=some(*joining),
        ),
        Section("sites", "Site by site", figures=some(*sites)),
        Section("tests", "Tests", notes=[TESTS], tables=list(_tests(comparison))),
        Section("repeat", "How to repeat it", commands=[("The command", comparison["command"])]),
        Section("recipe", "Recipe and versions", tables=list(_surroundings(comparison))),
    ]


TESTS = (
    "A gain above 0 is the federation's. Over sites: one adapter serves all of them, so this "
    "speaks of these adapters, not of new runs. p is not adjusted for the number of tests."
)


# --- Figures --------------------------------------------------------------------------------------


def _arms(comparison: Json, measure: str, how: tuple[str, str, float]) -> Figure | None:
    """Return one measure of every arm, over all sites."""
    title, unit, factor = how
    found = {name: estimate_of(arm, measure) for name, arm in arms_of(comparison).items()}
    decimals = decimals_for(found.values(), factor)
    rows, table = [], []
    for name, estimate in found.items():
        rows.append(_row(name, estimate, factor, decimals, f"{name}: ", STYLE.get(name, 5)))
        seeds = str(estimate["n"]) if estimate else NONE
        table.append((name, words(estimate, factor, decimals), seeds))
    if not any(row.dots for row in rows):
        return None
    chance = comparison["exams"].get(measure, {}).get("chance")
    notes = [f"Guessing gets {percent(chance, 0)}."] if is_number(chance) else []
    if measure == LOSS:
        notes.append("Lower is better.")
    if comparison["exams"].get(measure, {}).get("measures") == "kept":
        notes.append("The base knew these: what is lost is forgotten.")
    from_zero = measure != LOSS
    svg = interval_chart(title, rows, x_label=unit, from_zero=from_zero, decimals=decimals)
    columns = ("arm", "mean (95 % interval)", "seeds")
    return Figure(f"arms-{measure}", title, svg, " ".join(notes), Table(columns, table))


def _row(
    name: str, estimate: Json | None, factor: float, decimals: int, before: str, style: int
) -> Row:
    if estimate is None:
        return Row(name, [])
    low, high = interval_of(estimate, factor) or (None, None)
    return Row(name, [replace(_dot(estimate, factor, decimals, before, style), low=low, high=high)])


def _dot(estimate: Json, factor: float, decimals: int, before: str, style: int) -> Dot:
    """Return a mean without its whiskers."""
    said = before + words(estimate, factor, decimals, POINTS if "p" in estimate else " %")
    if is_number(estimate.get("p")):
        said += f", {_p(estimate['p'])}"
    return Dot(mean_of(estimate, factor), said, style=style)


def _p(value: object) -> str:
    if not is_number(value):
        return NONE
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _joining(comparison: Json, rival: str, which: str, measure: str) -> Figure | None:
    """Return what each site gains by joining, or what the others gain by it."""
    title, _, factor = measures(comparison)[measure]
    found = []
    for entry in comparison["joining"]:
        if entry["instead-of"] == rival and entry.get(which):
            estimate = estimate_of(entry[which], measure)
            if estimate is not None:
                found.append((entry["site"], estimate))
    if not found:
        return None
    style = STYLE[rival]
    decimals = decimals_for((e for _, e in found), factor)
    rows = [_row(f"site {s}", e, factor, decimals, f"site {s}: gain ", style) for s, e in found]
    whom = {
        "own": f"it gains over {rival}, own part",
        "everywhere": f"it gains over {rival}, everywhere",
        "others": "the others gain by its joining",
    }[which]
    named = f"{title.removeprefix('Accuracy: ').capitalize()}: what {whom}"
    unit = "gain, nats per answer token" if measure == LOSS else "gain, percentage points"
    better = sum(mean_of(e, factor) > 0 for _, e in found)
    equal = sum(mean_of(e, factor) == 0 for _, e in found)
    note = f"Better off: {better} of {len(found)} sites."
    if equal:
        note += f" Neither better nor worse: {equal}."
    svg = interval_chart(named, rows, x_label=unit, zero=True, decimals=decimals)
    table = [(str(s), words(e, factor, decimals, POINTS), _p(e.get("p"))) for s, e in found]
    columns = ("site", "gain (95 % interval)", "p")
    key = f"joining-{rival}-{which}-{measure}"
    return Figure(key, named, svg, note, Table(columns, table))


def _sites(comparison: Json, measure: str, how: tuple[str, str, float]) -> Figure | None:
    """Return one measure of every site in every arm."""
    title, unit, factor = how
    by_arm = {
        name: {
            int(site): estimate
            for site, holder in (arm.get("sites") or {}).items()
            if (estimate := estimate_of(holder, measure))
        }
        for name, arm in arms_of(comparison).items()
    }
    by_arm = {name: found for name, found in by_arm.items() if found}
    sites = sorted({site for found in by_arm.values() for site in found})
    if not sites or (measure != LOSS and not comparison["exams"][measure].get("by-site")):
        return None
    decimals = decimals_for((e for found in by_arm.values() for e in found.values()), factor)
    rows = [
        Row(
            f"site {site}",
            [
                _dot(found[site], factor, decimals, f"site {site}, {name}: ", STYLE.get(name, 5))
                for name, found in by_arm.items()
                if site in found
            ],
        )
        for site in sites
    ]
    named = f"{title}, by site"
    legend = [(name, STYLE.get(name, 5)) for name in by_arm]
    svg = interval_chart(named, rows, x_label=unit, legend=legend)
    note = "Means over the seeds; the table has the intervals."
    table = [
        (str(site), *(words(found.get(site), factor, decimals) for found in by_arm.values()))
        for site in sites
    ]
    return Figure(f"sites-{measure}", named, svg, note, Table(("site", *by_arm), table))


# --- Tables ---------------------------------------------------------------------------------------


def _table(comparison: Json) -> Table:
    """Return arms as rows, measures as columns."""
    asked = measures(comparison)
    arms = arms_of(comparison).values()
    decimals = {
        measure: decimals_for((estimate_of(arm, measure) for arm in arms), factor)
        for measure, (_, _, factor) in asked.items()
    }
    rows = []
    for name, arm in arms_of(comparison).items():
        runs = list(arm["seeds"].values())
        visits = sum(run["example-visits"] for run in runs) / max(1, len(runs))
        took = sum(run["seconds"] for run in runs)
        cells = [
            words(estimate_of(arm, measure), factor, decimals[measure])
            for measure, (_, _, factor) in asked.items()
        ]
        rows.append((name, *cells, number(round(visits)), str(len(runs)), duration(took)))
    columns = ("arm", *(title for title, _, _ in asked.values()), "example visits", "seeds", "time")
    return Table(columns, rows, "Mean over seeds (95 % interval)")


def _tests(comparison: Json) -> Iterator[Table]:
    gains = comparison["gains"]
    losses = [gain for gain in gains if gain["measure"] == LOSS]
    yield _gains(comparison, losses, "Gain of the federation: held-out loss, nats per answer token")
    shares = [gain for gain in gains if gain["measure"] != LOSS]
    yield _gains(comparison, shares, "Gain of the federation: accuracy")
    questions = []
    for gain in gains:
        title = measures(comparison)[gain["measure"]][0]
        for seed, asked in (gain.get("over-questions") or {}).items():
            low, high = asked["interval"]
            shown = f"{100 * asked['gain']:.1f} points ({100 * low:.1f} to {100 * high:.1f})"
            only = f"{asked['only-federated']:,} / {asked['only-rival']:,}"
            questions.append(
                (_where(gain), title, seed, f"{asked['n']:,}", only, shown, _p(asked["p"]))
            )
    columns = (
        "against",
        "measure",
        "seed",
        "questions",
        "only federated / only rival",
        "gain",
        "p",
    )
    yield Table(columns, questions, "Question by question (McNemar, exact)")


def _gains(comparison: Json, gains: Sequence[Json], named: str) -> Table:
    """Return the tests of gains of one unit over seeds and over sites."""
    tests = [
        (gain, over, gain[over])
        for gain in gains
        for over in ("over-seeds", "over-sites")
        if gain.get(over)
    ]
    factor = measures(comparison)[gains[0]["measure"]][2] if gains else 1.0
    decimals = decimals_for((test for _, _, test in tests), factor)
    rows = [
        (
            _where(gain),
            measures(comparison)[gain["measure"]][0],
            over.replace("-", " "),
            words(test, factor, decimals, POINTS),
            str(test["n"]),
            f"{test['better']} / {test['worse']} / {test['equal']}" if "better" in test else NONE,
            _p(test["p"]),
        )
        for gain, over, test in tests
    ]
    columns = ("against", "measure", "paired", "gain (95 % interval)", "n")
    return Table((*columns, "better / worse / equal", "p"), rows, named)


def _surroundings(comparison: Json) -> Iterator[Table]:
    config, found = comparison["config"], comparison.get("environment") or {}
    rows = [
        (name, str(found[name])) for name in ("grandrounds", "python", "platform") if name in found
    ]
    packages: Mapping[str, Any] = found.get("packages") or {}
    rows += [(name, str(version)) for name, version in packages.items()]
    yield Table(("what", "version"), rows, "Versions")
    yield Table(("site", *_seeds(comparison)), _site_rows(comparison), "Examples, and held out")
    keys: Sequence[tuple[str, str]] = [(key, str(value)) for key, value in config.items()]
    yield Table(("key", "value"), keys, f"Configuration: {len(keys)} keys")


def _seeds(comparison: Json) -> list[str]:
    return [f"seed {seed}" for seed in comparison["seeds"]]


def _site_rows(comparison: Json) -> list[tuple[str, ...]]:
    rows = []
    for site in comparison["sites"]:
        trained, held = site["train-examples"], site["held-out-examples"]
        seeds = [str(seed) for seed in comparison["seeds"]]
        cells = [f"{trained[s]:,}, {held[s]:,}" if s in trained else NONE for s in seeds]
        rows.append((str(site["site"]), *cells))
    return rows
