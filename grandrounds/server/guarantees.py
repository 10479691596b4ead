"""What a run guarantees and what an audit of it found, in words: for card, report and terminal.

Both are read tolerantly: another version may have written them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from grandrounds.config.words import counted, percent
from grandrounds.wire.guarantee import ADJACENCY, PATIENT, RECORD, REHEARSAL

AUDIT = "privacy-audit.json"
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

MOST_SITES = 100
"""Sites whose ε a line lists."""

Section = Mapping[str, Any]
"""`privacy` of summary.json, or the content of an audit's file."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value read from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def text_of(value: object, digits: int = 2) -> str:
    """Return a number with two decimals; `not told` for anything else."""
    return f"{value:.{digits}f}" if is_number(value) else "not told"


# --- The guarantee --------------------------------------------------------------------------------


def unit_of(section: Section) -> str:
    """Return what is hidden: `record`, `patient`, or `unit` where the sites differ."""
    unit = section.get("unit")
    return unit if unit in (RECORD, PATIENT) else "unit"


def is_rehearsed(section: Section) -> bool:
    """Whether nobody enforced the guarantee; so too if nothing says that somebody did."""
    return section.get("mode") != "enforced"


def guarantee_rows(section: Section, name: Callable[[str], str] = str) -> list[tuple[str, str]]:
    """Return a run's guarantee as (item, value).

    Parameters
    ----------
    name : function
        Partition id, as text → how the site is called.
    """
    spent, reserved = section.get("epsilon"), section.get("reserved_epsilon")
    constants = [
        f"{word} {section[key]:.4g}"
        for key, word in (
            ("noise_multiplier", "noise multiplier"),
            ("clipping_norm", "clipping norm"),
            ("sampling_rate", "sampling rate"),
        )
        if is_number(section.get(key))
    ]
    delta = section.get("delta")
    told = f"{text_of(spent)} at most for one {unit_of(section)} of one site"
    rows = [
        ("guarantee", REHEARSAL if is_rehearsed(section) else "enforced by the sites"),
        ("unit", unit_of(section)),
        ("neighbours", str(section.get("adjacency") or ADJACENCY)),
        ("epsilon spent", told if is_number(spent) else "not told"),
        ("epsilon by site", by_site(section, name)),
        ("delta", f"{delta:g}" if is_number(delta) else "differs by site"),
    ]
    if is_number(reserved):
        rows.append(("epsilon if all visits are made", text_of(reserved)))
    if constants:
        rows.append(("mechanism", f"DP-SGD on LoRA factors: {', '.join(constants)}"))
    if is_number(deviation := section.get("train_loss_deviation")):
        rows.append(("training loss", f"told with noise: +- {deviation:.2g} nats a visit"))
    if section.get("accountant"):
        rows.append(("accountant", str(section["accountant"])))
    if gone := section.get("budget_spent"):
        rows.append(("budget spent", ", ".join(name(str(site)) for site in gone)))
    return rows


def by_site(section: Section, name: Callable[[str], str] = str) -> str:
    """Return the ε of each site in one line."""
    told = section.get("epsilon_by_site") or {}
    listed = [f"{name(site)}: {text_of(value)}" for site, value in list(told.items())[:MOST_SITES]]
    more = f", and {len(told) - MOST_SITES:,} more" if len(told) > MOST_SITES else ""
    return ", ".join(listed) + more if listed else "not told"


def not_covered(section: Section, name: Callable[[str], str] = str) -> list[str]:
    """Return what the guarantee does not cover, a sentence each."""
    lines = []
    if is_rehearsed(section):
        lines.append(
            "Everything, against whoever ran it: in process and in simulation the server and the "
            "sites share one process and its memory. Only a site's own agent enforces a guarantee."
        )
    if without := section.get("sites_without_guarantee"):
        names = ", ".join(name(str(site)) for site in without[:MOST_SITES])
        lines.append(f"The data of {counted(len(without), 'site')} without a guarantee: {names}.")
    if section.get("continued_from"):
        lines.append(
            "What the adapter from which the run went on had learned: its own training spent its "
            "own epsilon, or guarantees nothing."
        )
    if unit_of(section) == PATIENT:
        lines.append("A patient with records at several sites: there the epsilons add up.")
    else:
        lines.append(
            "A patient with several records: the guarantee is for one of them, and for k records "
            "it is about k times as weak."
        )
    lines += [
        "A whole site: that it took part, and what many of its patients have in common.",
        "When replies arrive; other runs on the same data, each of which spends its own epsilon; "
        "and choices that were made by looking at the data.",
    ]
    return lines


# --- Its audit ------------------------------------------------------------------------------------


def is_broken(audit: Section) -> bool:
    """Whether an audit contradicts the claim, at 99.9 % confidence."""
    return _exceeds(audit, "surely-at-least-epsilon")


def _exceeds(audit: Section, key: str) -> bool:
    claimed, mechanism = audit.get("claimed-epsilon"), audit.get("mechanism") or {}
    bounds = [audit.get(key), mechanism.get(key)]
    return is_number(claimed) and any(is_number(b) and b > claimed for b in bounds)


def verdict(audit: Section) -> str:
    """Return in a sentence what an audit shows, and what it does not."""
    if not is_number(audit.get("claimed-epsilon")):
        return "no guarantee is claimed: these figures are what an attack found"
    if is_broken(audit):
        return (
            "the bound is above the claim at 99.9 % confidence: the guarantee does not hold. Do "
            "not use data of sites with this version and recipe, and report it"
        )
    if _exceeds(audit, "at-least-epsilon"):
        return (
            "the bound is above the claim at 95 % confidence, but not at 99.9 %: of twenty audits "
            "of a correct implementation one may be. Audit again, with more canaries"
        )
    return NO_PROOF


def audit_line(audit: Section) -> str:
    """Return an audit in one line, the claim first."""
    claimed = audit.get("claimed-epsilon")
    claim = f"claimed epsilon {claimed:.2f}" if is_number(claimed) else "no epsilon claimed"
    told = audit.get("membership") or {}
    parts = [claim, f"at least {text_of(audit.get('at-least-epsilon'))} (95 %)"]
    parts.append(f"AUC {text_of(told.get('auc'))}")
    for one in (told.get("tpr-at-fpr") or ())[:1]:
        rate = one.get("tpr")
        shown = percent(rate) if is_number(rate) else "not told"
        parts.append(f"TPR at {rate_text(one)} FPR {shown}")
    extracted = (audit.get("extraction") or {}).get("in") or {}
    return ", ".join([*parts, f"extraction {matches_text(extracted)}"])


def rate_text(hits: Section) -> str:
    """Return the false positive rate of some hits: `1 %`, `0.1 %`."""
    rate = hits.get("fpr", 0.0)
    return percent(rate, 0 if rate >= 0.01 else 1)


def matches_text(extracted: Section) -> str:
    """Return how many answers were extracted: `3 of 98`."""
    return f"{extracted.get('matches', '-')} of {extracted.get('canaries', '-')}"
