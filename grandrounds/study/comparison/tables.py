"""A comparison in words: tables and notes, without any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.study.comparison.results import EVERYWHERE, LOSS, OWN
from grandrounds.study.comparison.units import BASE, CENTRALISED, FEDERATED, LEAVE_ONE_OUT, LOCAL

Json = Mapping[str, Any]

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(content: Json) -> list[Table]:
    """Return the arms, what the federation gained over each, and what each site gained."""
    made = [_arms(content), _gains(content), _joining(content), _left_out(content)]
    return [table for table in made if table.rows]


def _arms(content: Json) -> Table:
    exams = list(content["exams"])
    rows = []
    arms = dict(content["arms"])
    if LOCAL in arms and content["budget"]["sites"] > 1:
        arms["local, everywhere"] = {**arms[LOCAL], **arms[LOCAL][EVERYWHERE]}
    arms |= {f"without site {k}": a for k, a in content["without"].items()}
    for name, arm in arms.items():
        runs = list(arm["seeds"].values())
        visits = sum(run["example-visits"] for run in runs) / len(runs)
        rows.append(
            (
                name,
                estimate_text(arm[LOSS], loss_text),
                *(estimate_text(arm["accuracy"][exam], percent) for exam in exams),
                f"{visits:,.0f}",
                f"{sum(run['seconds'] for run in runs) / len(runs):,.0f}",
            )
        )
    seeds = content["seeds"]
    title = f"arms, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    columns = ("arm", "held-out loss", *(f"{exam} %" for exam in exams))
    return Table(title, (*columns, "example visits", "s a seed"), tuple(rows))


def _gains(content: Json) -> Table:
    rows = []
    for gain in content["gains"]:
        text = signed if gain["measure"] == LOSS else points
        sites = gain["over-sites"]
        rows.append(
            (
                gain["over"],
                gain["measure"] + (", everywhere" if gain["where"] == EVERYWHERE else ""),
                estimate_text(gain["over-seeds"], text),
                p_text(gain["over-seeds"]["p"]),
                f"{sites['better']} of {sites['n']}" if sites else NONE,
                p_text(sites["p"]) if sites else NONE,
            )
        )
    columns = ("over", "measure", "gain", "p, seeds", "sites that gain", "p, sites")
    return Table("what the federation gains (above 0: it is better)", columns, tuple(rows))


def _joining(content: Json) -> Table:
    """Return each site's figures alone and joined, on its own part and on everybody's."""
    exams = [name for name, exam in content["exams"].items() if exam["by-site"]]
    alone, joined = (content["arms"].get(arm) for arm in (LOCAL, FEDERATED))
    rows = []
    for found in content["joining"]:
        if found["instead-of"] != LOCAL or not alone or not joined:
            continue
        site = str(found["site"])
        examples = content["sites"][found["site"]]["train-examples"]
        cells = [site, f"{sum(examples.values()) / len(examples):,.0f}"]
        before, after = alone["sites"][site], joined["sites"][site]
        for where in (OWN, EVERYWHERE):
            pair = [arm[EVERYWHERE] if where == EVERYWHERE else arm for arm in (before, after)]
            cells.append(_pair(pair, LOSS, loss_text))
            cells.append(estimate_text(found[where][LOSS], signed))
            for exam in exams:
                cells.append(_pair(pair, exam, percent))
                cells.append(estimate_text(found[where]["accuracy"][exam], points))
        rows.append(tuple(cells))
    each = [
        column for name in ("loss", *(f"{exam} %" for exam in exams)) for column in (name, "gain")
    ]
    columns = [f"{where} {name}" for where in ("own", "all") for name in each]
    return Table(
        "what each site gains over training alone (alone > joined)",
        ("site", "examples", *columns),
        tuple(rows),
    )


def _pair(arms: Sequence[Json], measure: str, text: Any) -> str:
    """Return `alone > joined`."""
    values = [(arm[LOSS] if measure == LOSS else arm["accuracy"][measure]) for arm in arms]
    return " > ".join(str(text(value["mean"])) for value in values)


def _left_out(content: Json) -> Table:
    """Return what a site gains by joining the others, and they by its joining."""
    exams = [name for name, exam in content["exams"].items() if exam["by-site"]]
    rows = []
    for found in content["joining"]:
        if found["instead-of"] == LEAVE_ONE_OUT:
            cells = [str(found["site"])]
            for whose in ("own", "others"):
                cells.append(estimate_text(found[whose][LOSS], signed))
                cells += [estimate_text(found[whose]["accuracy"][e], points) for e in exams]
            rows.append(tuple(cells))
    each = ["held-out loss", *(f"{exam}, points" for exam in exams)]
    columns = [f"{whose} gain: {name}" for whose in ("its", "others'") for name in each]
    return Table("what each site's joining is worth", ("site", *columns), tuple(rows))


def notes(content: Json) -> list[str]:
    """Return what a reader must know to read the tables."""
    budget = content["budget"]
    out = [
        f"same base, recipe and example visits in every arm: {budget['rounds']} rounds x "
        f"{budget['cohort']} of {budget['sites']} sites; alone, a site makes "
        f"{budget['local-visits']:.3g} visits",
    ]
    if len(content["seeds"]) > 1:
        out.append("means and 95% intervals (Student's t) over seeds; losses in nats per token")
    else:
        out.append("one seed has no interval: give --seeds 3; losses in nats per token")
    kept = [name for name, exam in content["exams"].items() if exam["measures"] == "kept"]
    if kept and BASE in content["arms"] and FEDERATED in content["arms"]:
        before, after = (
            content["arms"][arm]["accuracy"][kept[0]]["mean"] for arm in (BASE, FEDERATED)
        )
        out.append(
            f"forgetting: {percent(before)} % of public facts before, {percent(after)} % after"
        )
    failed = sum(run.get("failed-replies", 0) for run in _runs(content))
    if failed:
        out.append(f"{failed} replies failed: the federation made fewer visits than planned")
    if CENTRALISED in content["arms"]:
        out.append("centralised makes the cohort's steps one after the other, not in parallel")
    return out


def _runs(content: Json) -> Sequence[Json]:
    arms = [content["arms"].get(FEDERATED, {"seeds": {}}), *content["without"].values()]
    return [run for arm in arms for run in arm["seeds"].values()]


def loss_text(value: float) -> str:
    """Return a loss, or a difference of two."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """Return a difference of losses."""
    return f"{value:+.3f}"


def percent(value: float) -> str:
    """Return a share in percent, without the sign."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """Return a difference of shares in points of percent."""
    return f"{100 * value:+.1f}"


def estimate_text(found: Json, text: Any) -> str:
    """Return a mean with half the width of its interval."""
    if found["interval"] is None:
        return str(text(found["mean"]))
    half = found["interval"][1] - found["mean"]
    return f"{text(found['mean'])} ± {text(half).removeprefix('+')}"


def p_text(value: float | None) -> str:
    """Return a p-value with as many digits as it deserves."""
    if value is None:
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.3f}"
