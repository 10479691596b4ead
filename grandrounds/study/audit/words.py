"""The findings of an audit as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grandrounds.server.guarantees import matches_text, rate_text, text_of
from grandrounds.study.tables import NONE, Table, interval, is_number, percent


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return an audit as (item, value); what another version did not write is left open."""
    told, extracted = found.get("membership") or {}, found.get("extraction") or {}
    claimed, gradient = found.get("claimed-epsilon"), found.get("mechanism") or {}
    auc = text_of(told.get("auc"))
    if len(bounds := list(told.get("auc-interval") or [])) == 2:
        auc += f", 95 % interval {bounds[0]:.2f} to {bounds[1]:.2f}"
    lines = [
        ("claimed epsilon of a record", text_of(claimed) if is_number(claimed) else "none"),
        (
            "epsilon, at least (95 %)",
            f"{text_of(found.get('at-least-epsilon'))}: {found.get('correct', NONE)} of "
            f"{found.get('guesses', NONE)} guesses right, best of {found.get('cuts', NONE)} cuts, "
            f"corrected; {text_of(found.get('most-that-shows'))} if all were",
        ),
    ]
    if gradient:
        lines.append(
            (
                "the same of clip and noise alone",
                f"{text_of(gradient.get('at-least-epsilon'))}, {gradient.get('canaries', 0):,} "
                "canaries as gradients",
            )
        )
    lines.append(("canaries", f"{found.get('canaries', NONE)}, {found.get('canaries-in')} in"))
    lines.append(("AUC, in against out", auc))
    if is_number(yardstick := found.get("auc-of-one-release")):
        lines.append(("AUC of one Gaussian release", f"{yardstick:.2f}: about what epsilon allows"))
    for one in told.get("tpr-at-fpr") or ():
        within = interval(one.get("interval") or (0.0, 1.0))
        lines.append((f"TPR at {rate_text(one)} FPR", f"{percent(one.get('tpr'))} ({within})"))
    for side, name in (("in", "those in"), ("out", "those out (chance)")):
        of_side = extracted.get(side) or {}
        lines.append((f"answers extracted, {name}", matches_text(of_side)))
        bits = text_of(of_side.get("mean-exposure-bits"))
        first = f"{of_side.get('ranked-first', NONE)} ranked first"
        lines.append((f"exposure, {name}", f"{bits} bits on average, {first}"))
    return lines


def table(found: Mapping[str, Any]) -> Table:
    """Return an audit as a table."""
    return Table(("item", "value"), rows(found), "Privacy audit, synthetic canaries")
