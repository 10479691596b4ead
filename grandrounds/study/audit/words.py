"""What an audit found, in words; read tolerantly: another version may have written it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grandrounds.study.tables import NONE, Table, interval, is_number, percent

PLACE = "privacy-audit.json"
"""File of an audit in a run directory."""

NO_PROOF = (
    "a bound below the claim proves nothing: a correct implementation gives one, and so does an "
    "attack that is too weak. Only a bound above the claim shows something: a broken guarantee"
)
"""Said wherever an audit stands beside a claim."""

SYNTHETIC = (
    "measured on invented records in a run of the same recipe, not on any site's data: what a site "
    "has given away, it measures itself (grandrounds site audit)"
)


def is_broken(found: Mapping[str, Any]) -> bool:
    """Whether an audit contradicts the claim."""
    claimed, mechanism = found.get("claimed-epsilon"), found.get("mechanism") or {}
    bounds = [found.get("at-least-epsilon"), mechanism.get("at-least-epsilon")]
    return is_number(claimed) and any(is_number(b) and b > claimed for b in bounds)


def verdict(found: Mapping[str, Any]) -> str:
    """Return in a sentence what an audit shows, and what it does not."""
    if not is_number(found.get("claimed-epsilon")):
        return "no guarantee is claimed: these figures are what an attack found"
    if is_broken(found):
        return (
            "the bound is above the claim: at 95 % confidence the guarantee does not hold. Do not "
            "use these sites' data with this version and recipe, and report it"
        )
    return NO_PROOF


def headline(found: Mapping[str, Any]) -> str:
    """Return an audit in one line, the claim first."""
    claimed = found.get("claimed-epsilon")
    claim = f"claimed epsilon {claimed:.2f}" if is_number(claimed) else "no epsilon claimed"
    told = found.get("membership") or {}
    parts = [claim, f"at least {_two(found.get('at-least-epsilon'))} (95 %)"]
    parts.append(f"AUC {_two(told.get('auc'))}")
    parts += [f"TPR at {_rate(one)} FPR {percent(one.get('tpr'))}" for one in _hits(told)[:1]]
    extracted = (found.get("extraction") or {}).get("in") or {}
    parts.append(f"extraction {_of(extracted)}")
    return ", ".join(parts)


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return an audit as (item, value)."""
    told, extracted = found.get("membership") or {}, found.get("extraction") or {}
    claimed, gradient = found.get("claimed-epsilon"), found.get("mechanism") or {}
    auc = _two(told.get("auc"))
    if len(bounds := list(told.get("auc-interval") or [])) == 2:
        auc += f", 95 % interval {bounds[0]:.2f} to {bounds[1]:.2f}"
    lines = [
        ("claimed epsilon of a record", _two(claimed) if is_number(claimed) else "none"),
        (
            "epsilon, at least (95 %)",
            f"{_two(found.get('at-least-epsilon'))}: {found.get('correct', NONE)} of "
            f"{found.get('guesses', NONE)} guesses right, best of {found.get('cuts', NONE)} cuts, "
            f"corrected; {_two(found.get('most-that-shows'))} if all were",
        ),
    ]
    if gradient:
        lines.append(
            (
                "the same of clip and noise alone",
                f"{_two(gradient.get('at-least-epsilon'))}, {gradient.get('canaries', 0):,} "
                "canaries as gradients",
            )
        )
    lines.append(("canaries", f"{found.get('canaries', NONE)}, {found.get('canaries-in')} in"))
    lines.append(("AUC, in against out", auc))
    if is_number(yardstick := found.get("auc-of-one-release")):
        lines.append(("AUC of one Gaussian release", f"{yardstick:.2f}: about what epsilon allows"))
    for one in _hits(told):
        within = interval(one.get("interval") or (0.0, 1.0))
        lines.append((f"TPR at {_rate(one)} FPR", f"{percent(one.get('tpr'))} ({within})"))
    for side, name in (("in", "those in"), ("out", "those out (chance)")):
        of_side = extracted.get(side) or {}
        lines.append((f"answers extracted, {name}", _of(of_side)))
        bits = _two(of_side.get("mean-exposure-bits"))
        first = f"{of_side.get('ranked-first', NONE)} ranked first"
        lines.append((f"exposure, {name}", f"{bits} bits on average, {first}"))
    return lines


def table(found: Mapping[str, Any]) -> Table:
    """Return an audit as a table."""
    return Table(("item", "value"), rows(found), "privacy audit, synthetic canaries")


def _two(value: object) -> str:
    return f"{value:.2f}" if is_number(value) else NONE


def _hits(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(told.get("tpr-at-fpr") or ())


def _rate(one: Mapping[str, Any]) -> str:
    rate = one.get("fpr", 0.0)
    return percent(rate, 0 if rate >= 0.01 else 1)


def _of(extracted: Mapping[str, Any]) -> str:
    return f"{extracted.get('matches', NONE)} of {extracted.get('canaries', NONE)}"
