"""Every figure on the page of a comparison, recomputed from the results of its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.check_figures.page import Texts
from scripts.check_figures.raw import is_number
from scripts.check_figures.sheet import Cell, Sheet
from scripts.check_figures.shown import numbers_in, of_duration

T = (12.7062047, 4.30265273, 3.18244631, 2.77644511, 2.57058184, 2.44691185, 2.36462425)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""

LOSS = "held-out-loss"

LEAST = 20
"""Held-out examples, or questions, below which the page gives no verdict."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval, as a page shows it."""

    mean: float
    interval: tuple[float, float] | None
    n: int

    @property
    def shown(self) -> list[float]:
        return [self.mean, *(self.interval or ())]


def estimate(values: Sequence[float], *, loss: bool, gain: bool = False) -> Estimate:
    """Return mean and Student's interval, shares in percent, cut where the measure ends."""
    factor = 1.0 if loss else 100.0
    scaled = [factor * value for value in values]
    mean, n = statistics.fmean(scaled), len(scaled)
    if n < 2:
        return Estimate(mean, None, n)
    half = T[n - 2] * statistics.stdev(scaled) / math.sqrt(n)
    low, high = mean - half, mean + half
    if not (loss and gain):
        low = max(low, -factor if gain else 0.0)
    return Estimate(mean, (low, high if loss else min(high, factor)), n)


def arms_of(content: Json) -> dict[str, dict[str, Any]]:
    """Return arm as shown → its results by seed; `local` twice."""
    found: dict[str, dict[str, Any]] = {}
    for name, arm in content["arms"].items():
        if name != "local" or not arm.get("everywhere"):
            found[name] = arm["seeds"]
            continue
        found["local, own part"] = arm["seeds"]
        found["local, everywhere"] = {
            seed: {
                **run,
                **run["everywhere"],
                "sites": {s: of["everywhere"] for s, of in run["sites"].items()},
            }
            for seed, run in arm["seeds"].items()
        }
    return found


def measure_of(holder: Json, measure: str) -> float | None:
    value = holder.get(LOSS) if measure == LOSS else (holder.get("accuracy") or {}).get(measure)
    return value if is_number(value) else None


def check_comparison_page(texts: Texts, content: Json, name: str) -> Sheet:
    """Check a comparison's page; the sheet holds what was found."""
    titles = [exam["title"] for exam in content["exams"].values()]
    called = [site["name"] for site in content["sites"] if site.get("name")]
    sheet = Sheet(texts, [name, *titles, *called])
    few = too_few(content)
    known = list(numbers_of(content))
    arms(sheet, content)
    joining(sheet, content, few)
    by_site(sheet, content)
    tests(sheet, content, few)
    means = [v for e in _estimates(content) for v in e.shown]
    for place in [*sheet.under("head/"), *sheet.under("note/"), *sheet.under("command/")]:
        sheet.among(place, [*known, *means, *totals(content), 95, 100, LEAST, 0])
    tiles(sheet, content, few)
    versions = content["environment"].get("packages") or {}
    for place in sheet.under("table/recipe/Versions/cell/"):
        if place.endswith("/1"):
            row = place.removesuffix("/1")
            of = {**content["environment"], **versions}.get(texts.get(f"{row}/0", ""))
            sheet.verbatim(place, str(of or "not installed"))
    rows: list[list[Cell]] = []
    for site in content["sites"]:
        trained, held = site["train-examples"], site["held-out-examples"]
        per_seed = [
            [trained[s], held[s]] if s in trained else "-" for s in map(str, content["seeds"])
        ]
        rows.append([site.get("name") or [site["site"]], *per_seed])
    sheet.table("table/recipe/Training and held-out examples", rows)
    for place in sheet.under("table/recipe/Configuration: "):
        if place.endswith("/1") and "/cell/" in place:
            sheet.verbatim(
                place, str(content["config"].get(texts.get(f"{place.removesuffix('/1')}/0", "")))
            )
        elif place.endswith("/0") and texts[place] in content["config"]:
            sheet.verbatim(place, texts[place])  # a key
    for place in sheet.under("table/recipe/Training and held-out examples/column/"):
        sheet.among(place, content["seeds"])
    sheet.ticks()
    sheet.rest()
    return sheet


def too_few(content: Json) -> set[str]:
    """Return the measures on which the page gives no verdict."""
    counts: dict[str, int] = {}
    for site in content["sites"]:
        for seed, n in site["held-out-examples"].items():
            counts[seed] = counts.get(seed, 0) + n
    few = {LOSS} if min(counts.values(), default=0) < LEAST else set()
    return few | {k for k, exam in content["exams"].items() if exam.get("n", LEAST) < LEAST}


def numbers_of(content: Json) -> list[float]:
    """Return the counts that stand in sentences of the page."""
    found: list[float] = [*content["seeds"], len(content["sites"]), *content["units"].values()]
    found += [value for value in content["budget"].values() if is_number(value)]
    found += [exam["n"] for exam in content["exams"].values() if "n" in exam]
    found += [sum(site["held-out-examples"].values()) for site in content["sites"]]
    for seed in map(str, content["seeds"]):
        held = [site["held-out-examples"].get(seed, 0) for site in content["sites"]]
        found += [sum(held), held.count(1)]
    for shown in numbers_in(content["command"]):
        found.append(shown.value)
    return found


def totals(content: Json) -> list[float]:
    """Return mean example visits of every arm, and the largest ε."""
    arms = [*content["arms"].values(), *content["without"].values()]
    runs = [list(arm["seeds"].values()) for arm in arms]
    visits = [statistics.fmean(run["example-visits"] for run in of) for of in runs if of]
    return visits + [run["epsilon"] for of in runs for run in of if is_number(run.get("epsilon"))]


def _estimates(content: Json) -> list[Estimate]:
    found = []
    for runs in arms_of(content).values():
        for measure in (LOSS, *content["exams"]):
            values = [measure_of(run, measure) for run in runs.values()]
            known = [value for value in values if value is not None]
            found += [estimate(known, loss=measure == LOSS)] if known else []
    kept = [k for k, exam in content["exams"].items() if exam["measures"] == "kept"]
    for key in kept:
        shares = {
            name: statistics.fmean(100 * run["accuracy"][key] for run in runs.values())
            for name, runs in arms_of(content).items()
        }
        if {"base", "federated"} <= shares.keys():
            found.append(Estimate(shares["base"] - shares["federated"], None, 1))
    return found


def arms(sheet: Sheet, content: Json) -> None:
    rows: list[list[Cell]] = []
    shown = arms_of(content)
    by_measure: dict[str, dict[str, Estimate]] = {}
    for measure in (LOSS, *content["exams"]):
        for name, runs in shown.items():
            values = [measure_of(run, measure) for run in runs.values()]
            if values and None not in values:
                found = estimate([v for v in values if v is not None], loss=measure == LOSS)
                by_measure.setdefault(measure, {})[name] = found
    for name, runs in shown.items():
        ours = [by_measure.get(m, {}).get(name) for m in (LOSS, *content["exams"])]
        visits = round(statistics.fmean(run["example-visits"] for run in runs.values()))
        failed = sum(run.get("failed-replies") or 0 for run in runs.values())
        took = of_duration(sum(run["seconds"] for run in runs.values()))
        rows.append(
            [name, *(e.shown if e else "-" for e in ours), [visits], [failed], [len(runs)], took]
        )
    sheet.table("table/arms/Mean over seeds (95 % interval)", rows)
    sheet.among("table/arms/Mean over seeds (95 % interval)/column/0", [])
    for measure, found in by_measure.items():
        key = f"arms-{measure}"
        sheet.marks(key, [e.shown for e in found.values()])
        rows = [
            [name, found[name].shown, [found[name].n]] if name in found else [name, "-", "-"]
            for name in shown
        ]
        sheet.table(f"figure/{key}", rows)
        sheet.labels(key, [v for e in found.values() for v in e.shown])
        sheet.among(
            f"figure/{key}/note", [100 * content["exams"].get(measure, {}).get("chance", 0)]
        )
        for i in range(3):
            sheet.among(f"figure/{key}/column/{i}", [95])


def verdict(test: Json, measure: str, few: set[str]) -> list[float]:
    """Return p as shown; none where the page gives no verdict."""
    return [test["p"]] if is_number(test.get("p")) and measure not in few else []


def joining(sheet: Sheet, content: Json, few: set[str]) -> None:
    unnamed = {site["site"] for site in content["sites"] if not site.get("name")}
    for rival in ("local", "leave-one-out"):
        for whose in ("own", "everywhere", "others"):
            for measure in (LOSS, *content["exams"]):
                _joined(sheet, content, (rival, whose, measure), few, unnamed)


def _joined(
    sheet: Sheet, content: Json, what: tuple[str, str, str], few: set[str], unnamed: set[int]
) -> None:
    rival, whose, measure = what
    marks: list[list[float]] = []
    rows: list[list[Cell]] = []
    means: list[float] = []
    factor = 1.0 if measure == LOSS else 100.0
    for entry in content["joining"]:
        tests = entry.get(whose)
        if entry["instead-of"] != rival or not tests:
            continue
        test = tests.get(LOSS) if measure == LOSS else tests["accuracy"].get(measure)
        if not test or not is_number(test.get("mean")):
            continue
        who = [entry["site"]] if entry["site"] in unnamed else []
        mean = factor * test["mean"]
        ends = [factor * end for end in test["interval"] or ()]
        if measure != LOSS and ends:
            ends = [max(ends[0], -factor), min(ends[1], factor)]
        p = verdict(test, measure, few)
        marks.append([*who, mean, *ends, *p])
        rows.append([who, [mean, *ends], p or "-"])
        means.append(mean)
    if not rows:
        return
    key = f"joining-{rival}-{whose}-{measure}"
    sheet.marks(key, marks)
    sheet.table(f"figure/{key}", rows)
    equal = sum(abs(mean) < 1e-9 for mean in means)
    better = sum(mean > 1e-9 for mean in means)
    sheet.among(f"figure/{key}/note", [better, len(means), equal, *numbers_of(content)])
    sheet.labels(key, [*unnamed, *means])
    sheet.among(f"figure/{key}/column/1", [95])


def by_site(sheet: Sheet, content: Json) -> None:
    shown = arms_of(content)
    unnamed = {site["site"] for site in content["sites"] if not site.get("name")}
    for measure in (LOSS, *content["exams"]):
        found: dict[str, dict[int, Estimate]] = {}
        for name, runs in shown.items():
            for site in {int(s) for run in runs.values() for s in run["sites"]}:
                values = [measure_of(run["sites"][str(site)], measure) for run in runs.values()]
                known = [value for value in values if value is not None]
                if known:
                    of_arm = found.setdefault(name, {})
                    of_arm[site] = estimate(known, loss=measure == LOSS)
        if not found or (measure != LOSS and not content["exams"][measure].get("by-site")):
            continue
        key = f"sites-{measure}"
        sites = sorted({site for of in found.values() for site in of})
        who = {site: [site] if site in unnamed else [] for site in sites}
        sheet.marks(
            key, [[*who[s], *of[s].shown] for s in sites for of in found.values() if s in of]
        )
        rows: list[list[Cell]] = [
            [who[s], *(of[s].shown if s in of else "-" for of in found.values())] for s in sites
        ]
        sheet.table(f"figure/{key}", rows)
        sheet.labels(key, [*sites, *(e.mean for of in found.values() for e in of.values())])


def seed_gains(content: Json, gain: Json) -> list[float]:
    """Return the federation's lead over an arm in each seed, from their results."""
    measure, rival = gain["measure"], content["arms"][gain["over"]]["seeds"]
    leads = []
    for seed, ours in content["arms"]["federated"]["seeds"].items():
        if seed in rival:
            pair = [rival[seed], ours]
            if gain.get("where") == "everywhere":
                pair = [one["everywhere"] for one in pair]
            one, other = (measure_of(of, measure) for of in pair)
            if one is not None and other is not None:
                leads.append(one - other if measure == LOSS else other - one)
    return leads


def tests(sheet: Sheet, content: Json, few: set[str]) -> None:
    titles = {
        True: "Gain of the federation: held-out loss, nats per answer token",
        False: "Gain of the federation: accuracy",
    }
    for is_loss, title in titles.items():
        rows: list[list[Cell]] = []
        for gain in content["gains"]:
            measure = gain["measure"]
            if (measure == LOSS) != is_loss:
                continue
            for over in ("over-seeds", "over-sites"):
                if not (test := gain.get(over)):
                    continue
                mean, ends = 100.0 ** (not is_loss) * test["mean"], test.get("interval")
                shown = [mean]
                if over == "over-seeds":
                    shown = estimate(seed_gains(content, gain), loss=is_loss, gain=True).shown
                elif ends:
                    cut = [100.0 ** (not is_loss) * end for end in ends]
                    shown += cut if is_loss else [max(cut[0], -100.0), min(cut[1], 100.0)]
                won: Cell = "-"
                if "better" in test and measure not in few:
                    won = [test["better"], test["worse"], test["equal"]]
                p = verdict(test, measure, few)
                rows.append([[], [], [], shown, [test["n"]], won, p or "-"])
        if rows:
            sheet.table(f"table/tests/{title}", rows)
            sheet.among(f"table/tests/{title}/column/3", [95])
    questions: list[list[Cell]] = []
    for gain in content["gains"]:
        for seed, asked in (gain.get("over-questions") or {}).items():
            low, high = asked["interval"]
            only = [asked["only-federated"], asked["only-rival"]]
            shown = [100 * (only[0] - only[1]) / asked["n"], 100 * low, 100 * high]
            p = verdict(asked, gain["measure"], few)
            questions.append([[], [], [int(seed)], [asked["n"]], only, shown, p or "-"])
    if questions:
        sheet.table("table/tests/Per question (McNemar's exact test)", questions)


def tiles(sheet: Sheet, content: Json, few: set[str]) -> None:
    sheet.want("tile/wall-clock time/value", of_duration(content["seconds"]))
    budget = content["budget"]
    sheet.want("tile/wall-clock time/note", [budget["rounds"], budget["cohort"], budget["sites"]])
    for gain in content["gains"]:
        measure = gain["measure"]
        rival = gain["over"]
        if rival == "local" and "where" in gain:
            rival = "local, own part" if gain["where"] == "own" else "local, everywhere"
        what = "loss" if measure == LOSS else measure
        name = f"tile/federated over {rival}: {what}"
        if f"{name}/value" not in sheet.texts:
            continue
        leads = estimate(seed_gains(content, gain), loss=measure == LOSS, gain=True)
        sheet.want(f"{name}/value", [leads.mean])
        sites = gain.get("over-sites")
        note: list[float] = []
        if sites and "better" in sites:
            note = [sites["better"], sites["better"] + sites["worse"] + sites["equal"]]
            note += [sites["equal"]] if sites["equal"] else []
        sheet.want(f"{name}/note", note)
