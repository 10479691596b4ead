"""Tables and notes of a comparison, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grandrounds.config.words import counted
from grandrounds.study.comparison.reservations import (
    reservations,
    site_names,
    visits_text,
    without_verdicts,
)
from grandrounds.study.comparison.results import EVERYWHERE, LOSS, OWN, measured
from grandrounds.study.comparison.units import (
    BASE,
    BY_SITE,
    CENTRALISED,
    FEDERATED,
    LEAVE_ONE_OUT,
    LOCAL,
    PRIVATE,
)
from grandrounds.study.tables import (
    NONE,
    Table,
    fixed,
    in_percent,
    is_number,
    p_text,
    percent,
    points,
)

Json = Mapping[str, Any]


def tables(content: Json) -> list[Table]:
    """Return the arms, the gain of the federation over each, and the gain of each site."""
    content = without_verdicts(content)
    made = [
        _arms(content),
        _gains(content["gains"], "federation"),
        _gains(content.get("personal-gains", []), "personal adapters"),
        spread(content),
        sites_and_models(content),
        _joining(content),
        _left_out(content),
    ]
    return [table for table in made if table.rows]


def _arms(content: Json) -> Table:
    exams = list(content["exams"])
    rows = []
    arms = dict(content["arms"])
    for arm in BY_SITE:
        if arm in arms and content["budget"]["sites"] > 1:
            arms[f"{arm}, everywhere"] = {**arms[arm], **arms[arm][EVERYWHERE]}
    names = site_names(content)
    arms |= {f"without {names[int(k)]}": a for k, a in content["without"].items()}
    for name, arm in arms.items():
        runs = list(arm["seeds"].values())
        totals = [sum(run[key] for run in runs) for key in ("example-visits", "seconds")]
        cells = [_estimate(arm, measure, _level) for measure in (LOSS, *exams)]
        spent = (_epsilon(runs),) if PRIVATE in arms else ()
        rows.append((name, *cells, *spent, *(f"{total / len(runs):,.0f}" for total in totals)))
    seeds = counted(len(content["seeds"]), "seed")
    columns = ["arm", "held-out loss", *(f"{exam} %" for exam in exams)]
    columns += ["epsilon"] * (PRIVATE in arms)
    return Table((*columns, "example visits", "seconds per seed"), rows, f"arms, {seeds}")


def _epsilon(runs: Sequence[Json]) -> str:
    """Return the largest ε of any seed; `none` without a guarantee."""
    told = [run["epsilon"] for run in runs if is_number(run.get("epsilon"))]
    return f"{max(told):.2f}" if told else "none"


def _gains(gains: Sequence[Json], whose: str) -> Table:
    rows = []
    for gain in gains:
        sites = gain["over-sites"]
        rows.append(
            (
                gain["over"],
                gain["measure"] + (", everywhere" if gain["where"] == EVERYWHERE else ""),
                _with_interval(gain["over-seeds"], gain["measure"], _difference),
                p_text(gain["over-seeds"]["p"]),
                f"{sites['better']} of {sites['n']}" if sites and "better" in sites else NONE,
                p_text(sites["p"]) if sites else NONE,
            )
        )
    better = "they are" if whose.endswith("s") else f"the {whose} is"
    columns = ("over", "measure", "gain", "p over seeds", "sites that gain", "p over sites")
    return Table(columns, rows, f"gain of the {whose} (positive: {better} better)")


def spread(content: Json) -> Table:
    """Return how the sites of each arm differ on their own part: worst site and spread."""
    names, rows = site_names(content), []
    for arm, by_measure in content.get("matrix", {}).items():
        for measure, found in by_measure.items():
            own = found["own"].values()
            rows.append(
                (
                    arm,
                    measure,
                    _level(sum(own) / len(own), measure),
                    _level(found["worst"]["value"], measure),
                    names[found["worst"]["site"]],
                    _level(found["spread"], measure),
                )
            )
    columns = ("arm", "measure", "mean of sites", "worst site", "which", "spread")
    return Table(columns, rows, "own part of each site")


def sites_and_models(content: Json) -> Table:
    """Return what the models that a site can have do on its own part, the others' and everywhere.

    Of a shared model, what it does on the site's own part.
    """
    by_arm, names = content.get("matrix", {}), site_names(content)
    measure = next(iter(_by_site(content)), LOSS)
    found = {arm: by_measure[measure] for arm, by_measure in by_arm.items()}
    columns, rows = ["site"], []
    for arm in found:
        columns += [f"{arm}, {where}" for where in (OWN, "others'", EVERYWHERE)][: _width(arm)]
    for site in next(iter(found.values()))["own"] if found else ():
        cells = [names.cell(int(site))]
        for arm, of_arm in found.items():
            parts = [of_arm["own"][site]]
            if arm in BY_SITE:
                parts += [of_arm["others"].get(site), of_arm["everywhere"][site]]
            cells += [NONE if part is None else _level(part, measure) for part in parts]
        rows.append(tuple(cells))
    what = "held-out loss" if measure == LOSS else f"{measure} %"
    return Table(columns, rows, f"sites and models: {what} (mean over seeds)")


def _width(arm: str) -> int:
    """Return how many columns an arm has: three where sites have models of their own, else one."""
    return 3 if arm in BY_SITE else 1


def _joining(content: Json) -> Table:
    """Return each site's results alone and joined, on its own part and everywhere."""
    measures, names_of_sites = [LOSS, *_by_site(content)], site_names(content)
    alone, joined = (content["arms"].get(arm) for arm in (LOCAL, FEDERATED))
    rows = []
    for found in content["joining"]:
        if found["instead-of"] != LOCAL or not alone or not joined:
            continue
        site = str(found["site"])
        examples = content["sites"][found["site"]]["train-examples"]
        cells = [
            names_of_sites.cell(found["site"]),
            f"{sum(examples.values()) / len(examples):,.0f}",
        ]
        for where in (OWN, EVERYWHERE):
            pair = [arm["sites"][site] for arm in (alone, joined)]
            if where == EVERYWHERE:
                pair = [arm[EVERYWHERE] for arm in pair]
            for measure in measures:
                means = (_level(measured(arm, measure)["mean"], measure) for arm in pair)
                cells += [" → ".join(means), _estimate(found[where], measure, _difference)]
        rows.append(tuple(cells))
    names = ["loss", *(f"{exam} %" for exam in measures[1:])]
    columns = [f"{w} {c}" for w in ("own", "all") for name in names for c in (name, "gain")]
    title = "gain of each site over training alone (alone → joined)"
    return Table(("site", "examples", *columns), rows, title)


def _left_out(content: Json) -> Table:
    """Return what a site gains by joining the others, and what they gain by its joining."""
    measures, names_of_sites = [LOSS, *_by_site(content)], site_names(content)
    rows = [
        (
            names_of_sites.cell(found["site"]),
            *(
                _estimate(found[whose], m, _difference)
                for whose in (OWN, "others")
                for m in measures
            ),
        )
        for found in content["joining"]
        if found["instead-of"] == LEAVE_ONE_OUT
    ]
    names = ["held-out loss", *(f"{exam}, points" for exam in measures[1:])]
    columns = [f"{whose} gain: {name}" for whose in ("its", "others'") for name in names]
    return Table(("site", *columns), rows, "gain from each site's joining")


def _by_site(content: Json) -> list[str]:
    """Return the exams that are divided by site."""
    return [name for name, exam in content["exams"].items() if exam["by-site"]]


# --- Notes ----------------------------------------------------------------------------------------


def notes(content: Json) -> list[str]:
    """Return what a reader must know to interpret the tables."""
    budget = content["budget"]
    out = [
        f"every arm uses the same base and recipe; {visits_text(content)}: "
        f"{counted(budget['rounds'], 'round')} x {budget['cohort']} of "
        f"{counted(budget['sites'], 'site')}; a site alone makes {budget['local-visits']:.3g} "
        "visits on average",
        *reservations(content),
    ]
    if sha256 := content.get("config", {}).get("model.lora.from-adapter-sha256"):
        out.append(
            "the base is the bare one; all other arms start from the saved adapter with sha256 "
            f"{sha256}"
        )
    if (rounds := budget.get("personal-rounds")) is not None:
        out.append(
            f"personal comes after {rounds} of the {budget['rounds']} rounds: the sites' own steps "
            "come out of the federation's example visits (--equal-visits)"
        )
    on_pairs = content.get("config", {}).get("train.objective") == "dpo"
    losses = f"losses in nats per {'pair' if on_pairs else 'token'}"
    if len(content["seeds"]) > 1:
        out.append(f"means and 95 % intervals (Student's t) over seeds; {losses}")
    else:
        out.append(f"a single seed gives no interval: use --seeds 3; {losses}")
    kept = [name for name, exam in content["exams"].items() if exam["measures"] == "kept"]
    if kept and BASE in content["arms"] and FEDERATED in content["arms"]:
        before, after = (
            percent(content["arms"][arm]["accuracy"][kept[0]]["mean"]) for arm in (BASE, FEDERATED)
        )
        what = "public facts" if kept[0] == "public" else content["exams"][kept[0]]["title"].lower()
        out.append(f"forgetting: accuracy on {what} {before} before training, {after} after")
    failed = sum(run.get("failed-replies", 0) for run in _runs(content))
    if failed:
        replies = counted(failed, "client reply", "client replies")
        out.append(f"{replies} failed: the federation made fewer visits than planned")
    if PRIVATE in content["arms"]:
        out.append(
            "private is the recipe with its guarantee, here a rehearsal in one process; all other "
            "arms go without noise. Its example visits are those expected of random draws"
        )
    if CENTRALISED in content["arms"]:
        out.append("centralised takes the cohort's steps in sequence, not in parallel")
    return out


def _runs(content: Json) -> Sequence[Json]:
    arms = [content["arms"].get(FEDERATED, {"seeds": {}}), *content["without"].values()]
    return [run for arm in arms for run in arm["seeds"].values()]


# --- Numbers --------------------------------------------------------------------------------------


def _level(value: float, measure: str) -> str:
    """Format a loss, or an accuracy in percent."""
    return fixed(value, 3) if measure == LOSS else in_percent(value)


def _difference(value: float, measure: str) -> str:
    """Format a difference of two losses, or of two accuracies in percentage points."""
    return fixed(value, 3, sign=True) if measure == LOSS else points(value)


def _estimate(holder: Json, measure: str, text: Callable[[float, str], str]) -> str:
    return _with_interval(measured(holder, measure), measure, text)


def _with_interval(found: Json, measure: str, text: Callable[[float, str], str]) -> str:
    """Format a mean, with half the width of its interval if there is one."""
    shown = text(found["mean"], measure)
    if found["interval"] is None:
        return shown
    return f"{shown} ± {_level(found['interval'][1] - found['mean'], measure)}"
