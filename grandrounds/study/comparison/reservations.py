"""What a comparison cannot say: too few held-out examples or questions, unequal visits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from grandrounds.config.words import counted
from grandrounds.server.masks.told import BETA
from grandrounds.study.comparison.results import LOSS
from grandrounds.study.comparison.units import BASE, FEDERATED, PRIVATE
from grandrounds.wire.names import SiteNames, names_of

Json = Mapping[str, Any]

LEAST = 20
"""Held-out examples of all sites, or questions of an exam, below which there is no verdict."""


def site_names(content: Json) -> SiteNames:
    """Return how the sites of a comparison are called."""
    return names_of({**site, "partition-id": site["site"]} for site in content["sites"])


def held_out(content: Json) -> list[list[int]]:
    """Return the held-out examples of each site, by seed."""
    by_site = [site["held-out-examples"] for site in content["sites"]]
    seeds = dict.fromkeys(seed for counts in by_site for seed in counts)
    return [[counts[seed] for counts in by_site if seed in counts] for seed in seeds]


def too_few(content: Json) -> dict[str, str]:
    """Return measure → why there is no verdict on it."""
    found = {}
    fewest = min((sum(of_seed) for of_seed in held_out(content)), default=0)
    if fewest < LEAST:
        found[LOSS] = counted(fewest, "held-out example")
    for name, exam in content["exams"].items():
        if exam.get("n", LEAST) < LEAST:
            found[name] = f"{counted(exam['n'], 'question')} of {exam['title']}"
    return found


def reservations(content: Json) -> list[str]:
    """Return what a reader of p-values must know before believing them."""
    few = too_few(content)
    said = [
        f"no verdict on {measure}: only {why} in all, and below {LEAST} neither p-values nor "
        "better and worse are told"
        for measure, why in few.items()
    ]
    single = max((sum(n == 1 for n in of_seed) for of_seed in held_out(content)), default=0)
    if single and LOSS not in few:
        sites = counted(single, "site")
        said.append(
            f"warning: {sites} with a single held-out example: p-values of {LOSS} over sites rest "
            "on single examples (raise data.held-out-fraction)"
        )
    return said + masked(content)


def masked(content: Json) -> list[str]:
    """Return which arms of a masked recipe are masked; empty for another recipe."""
    if content.get("config", {}).get("secure-aggregation", "none") == "none":
        return []
    arms = " and ".join(arm for arm in (FEDERATED, PRIVATE) if arm in content["arms"])
    plain = (
        "; leave-one-out sums plain ones, which differs by rounding" if content["without"] else ""
    )
    return [f"the updates of {arms} are masked: {BETA}, a rehearsal{plain}"] if arms else []


def visits_text(content: Json) -> str:
    """Return whether the arms made equally many example visits."""
    arms = {name: arm for name, arm in content["arms"].items() if name != BASE}
    arms |= {f"without {site_names(content)[int(k)]}": a for k, a in content["without"].items()}
    made = {
        name: {seed: run["example-visits"] for seed, run in arm["seeds"].items()}
        for name, arm in arms.items()
    }
    by_seed: dict[str, set[int]] = {}
    for visits in made.values():
        for seed, count in visits.items():
            by_seed.setdefault(seed, set()).add(count)
    if all(len(counts) == 1 for counts in by_seed.values()):
        return "the same number of example visits in every arm"
    totals = {name: sum(visits.values()) / max(1, len(visits)) for name, visits in made.items()}
    return "example visits differ: " + ", ".join(f"{n} {c:,.0f}" for n, c in totals.items())


def without_verdicts(content: Json) -> dict[str, Any]:
    """Return a comparison without p-values and counts of better sites where these say nothing."""
    few = too_few(content)
    shown = copy.deepcopy(dict(content))
    if not few:
        return shown
    for gain in [*shown["gains"], *shown.get("personal-gains", [])]:
        if gain["measure"] in few:
            questions = (gain.get("over-questions") or {}).values()
            for test in (gain["over-seeds"], gain.get("over-sites"), *questions):
                _silence(test)
    for joining in shown["joining"]:
        for whose in ("own", "everywhere", "others"):
            tests = joining.get(whose) or {}
            for measure in few:
                _silence(tests.get(LOSS) if measure == LOSS else _of(tests, measure))
    return shown


def _of(tests: Json, measure: str) -> Any:
    return (tests.get("accuracy") or {}).get(measure)


def _silence(test: Any) -> None:
    """Take p-value and counts of better and worse out of a test, if there is one."""
    if test:
        test["p"] = None
        for name in ("better", "worse", "equal"):
            test.pop(name, None)
