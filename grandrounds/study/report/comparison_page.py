"""The page of a `comparison.json`: arms side by side, and who gains by joining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from grandrounds.config.words import counted, place_name
from grandrounds.errors import DataError
from grandrounds.server.described import named_data
from grandrounds.study.comparison.reservations import (
    reservations,
    site_names,
    too_few,
    visits_text,
    without_verdicts,
)
from grandrounds.study.comparison.results import EVERYWHERE, LOSS, OWN
from grandrounds.study.comparison.tables import sites_and_models, spread
from grandrounds.study.comparison.units import BASE, FEDERATED, LEAVE_ONE_OUT, LOCAL
from grandrounds.study.report.comparison_file import (
    LOCAL_EVERYWHERE,
    LOCAL_OWN,
    STYLE,
    Json,
    Measure,
    arms_of,
    is_gain,
    measures,
)
from grandrounds.study.report.figures import Figure, Page, Section, Tile, some
from grandrounds.study.report.places import published
from grandrounds.study.report.provenance import version_rows
from grandrounds.study.report.row_charts import Dot, Row, interval_chart
from grandrounds.study.report.svg import Axis
from grandrounds.study.tables import (
    NONE,
    Table,
    decimals_of,
    duration,
    fixed,
    is_number,
    number,
    p_text,
    percent,
)


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
    folder = file.absolute().parent
    comparison = without_verdicts(comparison)
    config, units = comparison["config"], comparison["units"]
    complete = comparison["status"] == "complete"
    finished = f"{units['done']} of {units['planned']} units finished"
    places = [str(config[key]) for key in ("model.name", "static.dataset.name")]
    named = {place: Path(place).name for place in places if Path(place).is_absolute()}
    count, column = int(config["data.num-partitions"]), str(config.get("data.partition-by") or "")
    data = named_data(places[1], count, str(config["data.partitioner"]), column)
    page = Page(
        title=f"Comparison: {folder.name}",
        subtitle=f"Base {place_name(places[0])}; data {data}; "
        f"seeds {', '.join(map(str, comparison['seeds']))}",
        outcome=_outcome(comparison),
        mood="good" if complete else "going",
        status="Complete" if complete else finished,
        story=[] if complete else [f"{finished}. To continue: {comparison['command']}"],
        tiles=_tiles(comparison),
        sections=_sections(comparison),
    )
    return published(page, {**named, str(folder): folder.name})


def _outcome(comparison: Json) -> str:
    """Return what came out, in one sentence or two; empty while there is no federated arm."""
    arms = arms_of(comparison)
    if FEDERATED not in arms:
        return ""
    asked = measures(comparison).values()
    learned = [m for m in asked if m.key != LOSS and m.exam.get("measures") != "kept"]
    measure = [*learned, measures(comparison)[LOSS]][0]
    found = {name: e for name, arm in arms.items() if (e := measure.estimate(arm))}
    if FEDERATED not in found:
        return ""
    decimals = 3 if measure.key == LOSS else 1
    unit = f" {measure.unit}" if measure.key == LOSS else " %"
    told = {
        name: f"{measure.value(e, decimals)}{unit} ({name}{_epsilon(arms[name])})"
        for name, e in found.items()
    }
    ours = told.pop(FEDERATED)
    title = measure.title.removeprefix("Accuracy: ")
    against = f", against {', '.join(told.values())}" if told else ""
    said = f"{title[0].upper()}{title[1:]}: {ours}{against}."
    for exam in (m for m in asked if m.exam.get("measures") == "kept"):
        before, after = (exam.estimate(arms.get(name, {})) for name in (BASE, FEDERATED))
        if before and after and (lost := exam.mean(before) - exam.mean(after)) > 0.05:
            said += f" It forgot {lost:.1f} points of what the base knew ({exam.exam['title']})."
    return said


def _epsilon(arm: Json) -> str:
    """Return the largest ε of an arm's seeds behind its name; empty without a guarantee."""
    told = [run["epsilon"] for run in arm["seeds"].values() if is_number(run.get("epsilon"))]
    return f", epsilon {max(told):.2f}" if told else ""


def _tiles(comparison: Json) -> list[Tile]:
    found, few = [], too_few(comparison)
    for gain in comparison["gains"]:
        test = gain["over-seeds"]
        if not test or not is_number(test.get("mean")):
            continue
        measure = measures(comparison)[gain["measure"]]
        if gain["over"] == BASE or measure.key in few or measure.exam.get("measures") == "kept":
            continue
        what, unit, least = (
            ("loss", "nats", 0) if measure.key == LOSS else (measure.key, "points", 1)
        )
        gained = measure.mean(test)
        places = decimals_of([gained], least=least) if gained else 0
        value = f"{fixed(gained, places, sign=True)} {unit}"
        found.append(Tile(f"federated over {_rival(gain)}: {what}", value, _sites_won(gain)))
    budget = comparison["budget"]
    rounds, sites = counted(budget["rounds"], "round"), counted(budget["sites"], "site")
    note = f"{rounds} of {budget['cohort']} of {sites}"
    found.append(Tile("wall-clock time", duration(comparison["seconds"]), note))
    return found[:8]


def _rival(gain: Json) -> str:
    """Return the arm that the federation is compared with, as the page names it."""
    if gain["over"] != LOCAL or "where" not in gain:
        return str(gain["over"])
    return LOCAL_OWN if gain["where"] == OWN else LOCAL_EVERYWHERE


def _sites_won(gain: Json) -> str:
    over_sites = gain.get("over-sites")
    if not over_sites or "better" not in over_sites:
        return "positive: the federation is better"
    better, equal = over_sites["better"], over_sites["equal"]
    told = f"better at {better} of {better + over_sites['worse'] + equal} sites"
    return f"{told}, equal at {equal}" if equal else told


def _models(comparison: Json) -> list[Section]:
    """Return the section on sites and models of a comparison with personal adapters."""
    if "matrix" not in comparison:
        return []
    notes = [
        "Own: a site's model on that site's part. Others': on all other sites' part. Everywhere: "
        "on all. Spread: between the best and the worst site, each on its own part."
    ]
    tables = [table for table in (spread(comparison), sites_and_models(comparison)) if table.rows]
    return [Section("models", "Sites and models", notes=notes, tables=tables)]


def _sections(comparison: Json) -> list[Section]:
    asked = measures(comparison).values()
    notes = [
        "Every arm uses the same base and recipe; only the examples that it trains on differ. "
        f"Visits: {visits_text(comparison)}."
    ]
    notes += [f"{said[0].upper()}{said[1:]}." for said in reservations(comparison)]
    if len(comparison["seeds"]) < 2:
        notes.append("One seed: there is no interval, and other seeds may give other results.")
    else:
        notes.append(
            "Whiskers: 95 % intervals over seeds (Student's t, cut where "
            "a measure ends: at 0, and a share at 100 %)."
        )
    if LOCAL_EVERYWHERE in arms_of(comparison):
        notes.append(
            "Local training gives each site a model of its own. Own part: it is evaluated on that "
            "site's questions. Everywhere: on the questions of all sites, like the shared adapter."
        )
    joining = [
        _joining(comparison, rival, whose, measure)
        for rival in (LOCAL, LEAVE_ONE_OUT)
        for whose in JOINING
        for measure in asked
    ]
    joining_notes = [
        "Right of the line, joining is better.",
        "Over local: compared with training alone. Over leave-one-out: compared with using the "
        "adapter of a federation that the site did not join.",
    ]
    arms = some(*(_arms(comparison, measure) for measure in asked))
    sites = some(*(_sites(comparison, measure) for measure in asked))
    command = [("Repeat or continue the comparison", comparison["command"])]
    return [
        Section("arms", "Arms", notes=notes, figures=arms, tables=[_table(comparison)]),
        Section("joining", "Gain from joining", notes=joining_notes, figures=some(*joining)),
        Section("sites", "Results by site", figures=sites),
        *_models(comparison),
        Section("tests", "Statistical tests", notes=[TESTS], tables=list(_tests(comparison))),
        Section("repeat", "Reproduce", commands=command),
        Section("recipe", "Recipe and versions", tables=_provenance(comparison)),
    ]


TESTS = (
    "Positive gains favour the federation. All sites share one federated adapter, so tests over "
    "sites describe that adapter, not new runs. p is not adjusted for multiple tests."
)

JOINING = {
    OWN: "gain over {rival}, own part",
    EVERYWHERE: "gain over {rival}, everywhere",
    "others": "gain of the other sites by its joining",
}
"""Key of JOINING in comparison.json → title of its figures."""


# --- Figures --------------------------------------------------------------------------------------


def _arms(comparison: Json, measure: Measure) -> Figure | None:
    """Return one measure of every arm, over all sites."""
    found = {name: measure.estimate(arm) for name, arm in arms_of(comparison).items()}
    if not any(found.values()):
        return None
    decimals = measure.decimals(found.values())
    rows = [_row(measure, name, e, decimals, STYLE.get(name, 5)) for name, e in found.items()]
    table = [
        (name, measure.words(estimate, decimals), str(estimate["n"]) if estimate else NONE)
        for name, estimate in found.items()
    ]
    chance = measure.exam.get("chance")
    notes = [f"Chance: {percent(chance, 0)}."] if is_number(chance) else []
    if measure.key == LOSS:
        notes.append("Lower is better.")
    if measure.exam.get("measures") == "kept":
        notes.append("The base knows these facts: a loss of accuracy is forgetting.")
    svg = interval_chart(measure.title, rows, Axis(measure.unit, from_zero=measure.key != LOSS))
    columns = ("arm", "mean (95 % interval)", "seeds")
    key = f"arms-{measure.key}"
    return Figure(key, measure.title, svg, " ".join(notes), Table(columns, table))


def _row(measure: Measure, name: str, estimate: Json | None, decimals: int, style: int) -> Row:
    """Return a row of one value with its interval."""
    if estimate is None:
        return Row(name, [])
    said = f"{name}: {'gain ' if is_gain(estimate) else ''}{measure.words(estimate, decimals)}"
    if is_number(p := estimate.get("p")):
        said += f", p {'' if p < 0.001 else '= '}{p_text(p)}"
    dot = Dot(measure.mean(estimate), said, measure.interval(estimate), style)
    return Row(name, [dot], value=measure.value(estimate, decimals))


def _joining(comparison: Json, rival: str, whose: str, measure: Measure) -> Figure | None:
    """Return what each site gains by joining, or what the others gain by it."""
    found = {
        entry["site"]: estimate
        for entry in comparison["joining"]
        if entry["instead-of"] == rival and entry.get(whose)
        if (estimate := measure.estimate(entry[whose])) is not None
    }
    if not found:
        return None
    decimals = measure.decimals(found.values())
    names = site_names(comparison)
    rows = [_row(measure, names[s], e, decimals, STYLE[rival]) for s, e in found.items()]
    what = measure.title.removeprefix("Accuracy: ").capitalize()
    title = f"{what}: {JOINING[whose].format(rival=rival)}"
    unit = f"gain, {measure.unit if measure.key == LOSS else 'percentage points'}"
    means = [measure.mean(estimate) for estimate in found.values()]
    note = f"Better off: {sum(mean > 0 for mean in means)} of {counted(len(found), 'site')}."
    if equal := means.count(0):
        note += f" Unchanged: {equal}."
    if measure.key in too_few(comparison):
        note = f"No verdict: {too_few(comparison)[measure.key]} in all."
    svg = interval_chart(title, rows, Axis(unit), zero_line=True)
    table = [
        (names.cell(s), measure.words(e, decimals), p_text(e.get("p"))) for s, e in found.items()
    ]
    columns = ("site", "gain (95 % interval)", "p")
    key = f"joining-{rival}-{whose}-{measure.key}"
    return Figure(key, title, svg, note, Table(columns, table))


def _sites(comparison: Json, measure: Measure) -> Figure | None:
    """Return one measure of every site in every arm."""
    by_arm = {
        name: {
            int(site): estimate
            for site, holder in (arm.get("sites") or {}).items()
            if (estimate := measure.estimate(holder))
        }
        for name, arm in arms_of(comparison).items()
    }
    by_arm = {name: found for name, found in by_arm.items() if found}
    sites = sorted({site for found in by_arm.values() for site in found})
    if not sites or (measure.key != LOSS and not measure.exam.get("by-site")):
        return None
    everything = [estimate for found in by_arm.values() for estimate in found.values()]
    decimals, places = measure.decimals(everything), decimals_of(map(measure.mean, everything))
    rows, names = [], site_names(comparison)
    for site in sites:
        found = {name: of_arm[site] for name, of_arm in by_arm.items() if site in of_arm}
        dots = [
            Dot(
                measure.mean(estimate),
                f"{names[site]}, {name}: {measure.words(estimate, decimals)}",
                style=STYLE.get(name, 5),
            )
            for name, estimate in found.items()
        ]
        value = fixed(dots[0].value, places) if len(dots) == 1 else ""
        rows.append(Row(names[site], dots, value=value))
    title = f"{measure.title}, by site"
    styles = [(name, STYLE.get(name, 5)) for name in by_arm]
    svg = interval_chart(title, rows, Axis(measure.unit), names=styles)
    note = "Means over seeds; the table has their intervals."
    table = [
        (names.cell(site), *(measure.words(found.get(site), decimals) for found in by_arm.values()))
        for site in sites
    ]
    return Figure(f"sites-{measure.key}", title, svg, note, Table(("site", *by_arm), table))


# --- Tables ---------------------------------------------------------------------------------------


def _table(comparison: Json) -> Table:
    """Return arms as rows, measures as columns."""
    asked, arms = measures(comparison).values(), arms_of(comparison)
    cells = []
    for measure in asked:
        found = [measure.estimate(arm) for arm in arms.values()]
        cells.append([measure.words(estimate, measure.decimals(found)) for estimate in found])
    rows = []
    for (name, arm), *own in zip(arms.items(), *cells, strict=True):
        runs = list(arm["seeds"].values())
        visits = sum(run["example-visits"] for run in runs) / max(1, len(runs))
        failed = f"{sum(run.get('failed-replies') or 0 for run in runs):,}"
        took = duration(sum(run["seconds"] for run in runs))
        rows.append((name, *own, number(round(visits)), failed, str(len(runs)), took))
    columns = ("arm", *(m.title for m in asked), "example visits", "failed replies", "seeds")
    return Table((*columns, "wall-clock time"), rows, "Mean over seeds (95 % interval)")


def _tests(comparison: Json) -> Iterator[Table]:
    gains = comparison["gains"]
    losses = [gain for gain in gains if gain["measure"] == LOSS]
    per = measures(comparison)[LOSS].unit
    yield _gains(comparison, losses, f"Gain of the federation: held-out loss, {per}")
    shares = [gain for gain in gains if gain["measure"] != LOSS]
    yield _gains(comparison, shares, "Gain of the federation: accuracy")
    questions = []
    for gain in gains:
        title = measures(comparison)[gain["measure"]].title
        for seed, asked in (gain.get("over-questions") or {}).items():
            low, high = asked["interval"]
            shown = f"{100 * asked['gain']:.1f} points ({100 * low:.1f} to {100 * high:.1f})"
            only = f"{asked['only-federated']:,} / {asked['only-rival']:,}"
            n, p = f"{asked['n']:,}", p_text(asked["p"])
            questions.append((_rival(gain), title, seed, n, only, shown, p))
    only = "correct only: federated / rival"
    columns = ("against", "measure", "seed", "questions", only, "gain", "p")
    yield Table(columns, questions, "Per question (McNemar's exact test)")


def _gains(comparison: Json, gains: Sequence[Json], title: str) -> Table:
    """Return the tests over seeds and over sites, of gains in one unit."""
    tests = [
        (gain, over, gain[over])
        for gain in gains
        for over in ("over-seeds", "over-sites")
        if gain.get(over)
    ]
    rows = []
    for gain, over, test in tests:
        measure = measures(comparison)[gain["measure"]]
        won = f"{test['better']} / {test['worse']} / {test['equal']}" if "better" in test else NONE
        gained = measure.words(test, measure.decimals(test for _, _, test in tests))
        p = p_text(test["p"])
        paired = over.replace("-", " ")
        rows.append((_rival(gain), measure.title, paired, gained, str(test["n"]), won, p))
    columns = ("against", "measure", "paired", "gain (95 % interval)", "n")
    return Table((*columns, "better / worse / equal", "p"), rows, title)


def _provenance(comparison: Json) -> list[Table]:
    """Return versions, examples by site and seed, and the configuration."""
    versions = version_rows(comparison.get("environment") or {})
    seeds = [str(seed) for seed in comparison["seeds"]]
    sites, names = [], site_names(comparison)
    for site in comparison["sites"]:
        trained, held = site["train-examples"], site["held-out-examples"]
        cells = [f"{trained[s]:,}, {held[s]:,}" if s in trained else NONE for s in seeds]
        sites.append((names.cell(site["site"]), *cells))
    keys = [(key, str(value)) for key, value in comparison["config"].items()]
    return [
        Table(("package", "version"), versions, "Versions"),
        Table(("site", *(f"seed {s}" for s in seeds)), sites, "Training and held-out examples"),
        Table(("key", "value"), keys, f"Configuration: {len(keys)} keys"),
    ]
