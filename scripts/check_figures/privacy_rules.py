"""Every figure on guarantee, spent epsilon and audit, recomputed from the raw files of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from scripts.check_figures.raw import Json, Raw, is_number
from scripts.check_figures.sheet import Cell, Sheet

CLOSE = 1e-3
"""Relative distance of two ε of the same steps."""


def privacy(sheet: Sheet, raw: Raw) -> None:
    """Check the section on privacy, and its tile."""
    spent = spent_by_round(raw)
    if spent:
        sheet.marks("epsilon", spent)
        sheet.table("figure/epsilon", [[[number], [value]] for number, value in spent])
    notes: list[Callable[[str], None]] = []
    if private := raw.summary.get("privacy"):
        guarantee(sheet, raw, private)
        epsilon, delta = private.get("epsilon"), private.get("delta")
        if is_number(epsilon) and is_number(delta):
            notes.append(lambda at: sheet.want(at, meaning(epsilon, delta)))
    if audit := raw.audit:
        of_audit(sheet, audit)
        notes.append(lambda at: sheet.want(at, audit_line(audit)))
        notes.append(lambda at: sheet.among(at, [95, 99.9]))
    for i, check in enumerate(notes):
        check(f"note/privacy/{i}")


def spent_by_round(raw: Raw) -> list[tuple[int, float]]:
    """Return the largest ε that any site has told, by round."""
    told = {line["round"]: (line.get("epsilon") or {}).values() for line in raw.trained}
    return [(number, max(filter(is_number, of))) for number, of in told.items() if any(of)]


# --- The guarantee --------------------------------------------------------------------------------


def guarantee(sheet: Sheet, raw: Raw, private: Json) -> None:
    """Check the tile, the guarantee and what it leaves open."""

    def number(key: str) -> list[float]:
        return [private[key]] if is_number(private.get(key)) else []

    told = private.get("epsilon_by_site") or {}
    by_site = [
        part
        for site, value in list(told.items())[:100]
        for part in (*raw.who(int(site)), *([value] if is_number(value) else []))
    ]
    rows = {
        "epsilon spent": number("epsilon"),
        "epsilon by site": [*by_site, *([len(told) - 100] if len(told) > 100 else [])],
        "delta": number("delta"),
        "epsilon if all visits are made": number("reserved_epsilon"),
        "mechanism": [
            value
            for key in ("noise_multiplier", "clipping_norm", "sampling_rate")
            for value in number(key)
        ],
        "training loss": number("train_loss_deviation"),
        "budget spent": [n for site in private.get("budget_spent") or () for n in raw.who(site)],
    }
    sheet.want("tile/epsilon/value", rows["epsilon spent"])
    sheet.want("tile/epsilon/note", rows["delta"])
    place = "table/privacy/Guarantee/cell"
    shown = {sheet.texts[at]: at for at in sheet.under(place) if at.endswith("/0")}
    for item, values in rows.items():
        if item in shown:
            sheet.want(f"{shown[item].removesuffix('/0')}/1", values)
        elif values:
            sheet.findings.append(f"{place}: {item} is missing")
    without = private.get("sites_without_guarantee") or []
    allowed = [len(without), *(n for site in without for n in raw.who(int(site)))]
    for at in sheet.under("table/privacy/Not covered/cell"):
        sheet.among(at, allowed)


def meaning(epsilon: float, delta: float) -> list[float]:
    """Return the shares of right and of detected cases that a guarantee allows, as they are said.

    Kairouz, Oh and Viswanath, 2015, theorem 2.1: beta >= max(1 - delta - e^eps alpha,
    e^-eps (1 - delta - alpha)).
    """
    grown, shrunk = math.exp(min(epsilon, 700.0)), math.exp(-epsilon)
    right = 1 - (1 - delta) * shrunk / (1 + shrunk)
    power = 1 - max(1 - delta - grown * 0.01, shrunk * (1 - delta - 0.01))
    return [100 * right, 50, 100 * power, 1]


def guarantee_disagreements(raw: Raw) -> list[str]:
    """Return where ε of summary, rounds and sites differ, or are not those of the noise.

    The accountant is dp-accounting itself: Poisson-sampled Gaussian steps, by PLD.
    """
    found = []
    private = raw.summary.get("privacy") or {}
    told = {s: v for s, v in (private.get("epsilon_by_site") or {}).items() if is_number(v)}
    if told and private["epsilon"] != max(told.values()):
        found.append(f"epsilon of summary.json is {private['epsilon']}, of its sites {told}")
    last: dict[str, float] = {}
    for line in raw.trained:
        last |= line.get("epsilon") or {}
    if private and last != told:
        found.append(f"epsilon_by_site of summary.json is {told}, metrics.jsonl has {last}")
    for site in raw.sites if private else ():
        if "noise-multiplier" not in site or is_number(private.get("train_loss_deviation")):
            continue
        number, visits = site["partition-id"], 0
        claims = [("reserved-epsilon", site["most-visits"], site["reserved-epsilon"])]
        for line in raw.trained:
            visits += number in line["cohort"]
            if is_number(told := (line.get("epsilon") or {}).get(str(number))):
                claims.append((f"epsilon of round {line['round']}", visits, told))
        for what, times, claimed in claims:
            steps = times * site["visit-steps"]
            noise, rate = site["noise-multiplier"], site["sampling-rate"]
            right = accounted(noise, rate, steps, site["delta"]) if steps else 0.0
            if abs(right - claimed) > CLOSE * right:
                found.append(f"{what} of site {number} is {claimed}, of its noise {right}")
        target = raw.config.get("privacy.target-epsilon") or 0
        if target and site["reserved-epsilon"] > target * (1 + CLOSE):
            found.append(f"site {number} reserves {site['reserved-epsilon']}, above {target}")
    return found


@lru_cache
def accounted(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return the ε of Poisson-sampled Gaussian steps."""
    import dp_accounting
    from dp_accounting import pld

    event: Any = dp_accounting.GaussianDpEvent(noise)
    if rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(rate, event)
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


# --- Its audit ------------------------------------------------------------------------------------


def audit_line(audit: Json) -> list[float]:
    """Return the numbers of an audit's line."""
    told, got = audit["membership"], audit["extraction"]["in"]
    first = told["tpr-at-fpr"][0]
    claimed = [audit["claimed-epsilon"]] if is_number(audit.get("claimed-epsilon")) else []
    rates = [100 * first["fpr"], 100 * first["tpr"]]
    bound = [audit["at-least-epsilon"], 95]
    return [*claimed, *bound, told["auc"], *rates, got["matches"], got["canaries"]]


def of_audit(sheet: Sheet, audit: Json) -> None:
    """Check the table of an audit."""
    told, extracted = audit["membership"], audit["extraction"]
    claimed, gradient = audit.get("claimed-epsilon"), audit.get("mechanism")
    guessed = [audit["correct"], audit["guesses"], audit["cuts"], audit["most-that-shows"]]
    rows: list[tuple[list[float], Cell]] = [
        ([], [claimed] if is_number(claimed) else "none"),
        ([95], [audit["at-least-epsilon"], *guessed]),
    ]
    if gradient:
        rows.append(([], [gradient["at-least-epsilon"], gradient["canaries"]]))
    rows.append(([], [audit["canaries"], audit["canaries-in"]]))
    rows.append(([], [told["auc"], 95, *told["auc-interval"]]))
    if is_number(audit.get("auc-of-one-release")):
        rows.append(([], [audit["auc-of-one-release"]]))
    for one in told["tpr-at-fpr"]:
        shares = [one["tpr"], *one["interval"]]
        rows.append(([100 * one["fpr"]], [100 * share for share in shares]))
    for side in ("in", "out"):
        of_side = extracted[side]
        rows.append(([], [of_side["matches"], of_side["canaries"]]))
        rows.append(([], [of_side["mean-exposure-bits"], of_side["ranked-first"]]))
    sheet.table("table/privacy/Privacy audit, synthetic canaries", rows)


def audit_disagreements(audit: Json) -> list[str]:
    """Return the figures of an audit that are not those of its counts."""
    if not audit:
        return []
    from scipy.stats import beta

    def exact(found: int, n: int) -> list[float]:
        """Return Clopper and Pearson's 95 % interval."""
        low = float(beta.ppf(0.025, found, n - found + 1)) if found else 0.0
        return [low, float(beta.ppf(0.975, found + 1, n - found)) if found < n else 1.0]

    found = []

    def same(what: str, said: object, right: list[float], slack: float = 1e-6) -> None:
        given = said if isinstance(said, list) else [said]
        if not all(abs(g - r) <= slack for g, r in zip(given, right, strict=True)):
            found.append(f"{what} of privacy-audit.json is {said}, of its counts {right}")

    told, members = audit["membership"], audit["membership"]["members"]
    same("canaries", audit["canaries"], [members + told["non-members"]])
    same("canaries-in", audit["canaries-in"], [members])
    for one in told["tpr-at-fpr"]:
        same("tpr", one["tpr"], [one["found"] / members])
        same("interval of a tpr", one["interval"], exact(one["found"], members))
    for side in ("in", "out"):
        of_side = audit["extraction"][side]
        share = exact(of_side["matches"], of_side["canaries"])
        same("share-interval", of_side["share-interval"], share)
    m, guesses, cuts, delta = (audit[key] for key in ("canaries", "guesses", "cuts", "delta"))
    bound = one_run_bound(m, guesses, audit["correct"], delta, 0.05 / cuts)
    same("at-least-epsilon", audit["at-least-epsilon"], [bound], 1e-3)
    return found


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """Return the largest ε that so many right guesses reject; no number if they are too many.

    Steinke, Nasr and Jagielski, 2023, theorem 5.2: with W ~ Binomial(guesses, e^eps / (1 + e^eps)),
    P[W >= correct] + 2 m delta max_i P[correct > W >= correct - i] / i.
    """
    from scipy.optimize import brentq
    from scipy.stats import binom

    if not 0 <= correct <= guesses:
        return math.nan

    def chance(epsilon: float) -> float:
        of = binom(guesses, 1 / (1 + math.exp(-epsilon)))
        below = [of.cdf(correct - 1) - of.cdf(correct - i - 1) for i in range(1, correct + 1)]
        steepest = max((p / i for i, p in enumerate(below, 1)), default=0.0)
        return float(of.sf(correct - 1) + 2 * canaries * delta * steepest)

    if chance(0.0) > error:
        return 0.0
    return float(brentq(lambda epsilon: chance(epsilon) - error, 0.0, 50.0, xtol=1e-6))
