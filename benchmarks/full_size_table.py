"""What full_size.py's figures come to, in numbers and in lines; no script by itself."""

from __future__ import annotations

import statistics
from typing import Any

from bare_loops import BARE, BATCH, STEPS, TOKENS
from step_profile import profile_lines


def summary(
    rows: list[dict[str, Any]], arms: list[str], template: dict[str, Any] | None, rate: float
) -> dict[str, Any]:
    """Return medians over the rounds, and ratios within each round."""

    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows if name in row)

    arms = [arm for arm in arms if any(arm in row for row in rows)]
    ours = median("ours")
    figures: dict[str, Any] = {
        "seconds": {name: median(name) for name in ("ours", "ours_visits", *arms)},
        "tokens_per_second": statistics.median(r["tokens"] / r["ours"] for r in rows),
        "utilisation": statistics.median(r["flops"] / r["ours"] / rate for r in rows),
        "outside_steps_seconds": statistics.median(r["ours"] - r["ours_visits"] for r in rows),
        "peak_gib": max(row["ours_peak_gib"] for row in rows),
    }
    for arm in arms:
        ratios = [row["ours"] / row[arm] for row in rows if arm in row]
        figures[f"ours_to_{arm}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    if "neither" in arms:
        for arm in (a for a in arms if a != "neither"):
            gains = [row["neither"] / row[arm] for row in rows if arm in row]
            figures[f"gain_{arm}"] = [statistics.median(gains), min(gains), max(gains)]
    if template is not None:
        figures["template_to_ours"] = template["seconds"] / ours
    return figures


def table(r: dict[str, Any]) -> str:
    """Return the result in lines."""
    seconds = r["seconds"]
    lines = [
        f"{r['architecture']}, {r['parameters'] / 1e6:,.1f} M parameters, "
        f"{r['quantization'] or 'no'} bits, {r['device']}, torch {r['torch']}; "
        f"median of {r['rounds']} rounds of 3 visits, {STEPS} steps of {BATCH}",
        f"{'round, seconds':<34}{'':>10}{'ours to it':>12}{'range':>18}",
        f"{'ours, a whole round':<34}{seconds['ours']:>10.2f}",
        f"{'  its visits alone':<34}{seconds['ours_visits']:>10.2f}",
    ]
    labels = {
        "same": "bare loop, same means",
        "neither": "bare loop, padded, all logits",
        "grouped": "  of similar length",
        "answers": "  logits of answers",
    }
    for arm in (a for a in BARE if a in seconds):
        ratio, low, high = r[f"ours_to_{arm}"]
        lines.append(
            f"{labels[arm]:<34}{seconds[arm]:>10.2f}{ratio:>12.3f}{f'{low:.3f} to {high:.3f}':>18}"
        )
    if r["template"]:
        lines.append(
            f"{'template, loads included':<34}{r['template']['seconds']:>10.2f}"
            f"{1 / r['template_to_ours']:>12.3f}"
        )
    for arm in ("grouped", "answers", "same"):
        if f"gain_{arm}" in r:
            gain, low, high = r[f"gain_{arm}"]
            lines.append(
                f"gain over the loop with neither: {arm:<10}{gain:6.2f} ({low:.2f}-{high:.2f})"
            )
    lines += [
        f"tokens/s {r['tokens_per_second']:,.0f} (no padding counted), model FLOP utilisation "
        f"{r['utilisation']:.0%} of a measured {r['product_tflops']:.2f} TFLOP/s",
        f"outside the steps {r['outside_steps_seconds']:.2f} s a round, start-up "
        f"{r['start_up_seconds']:.1f} s, base loads {r['base_loads']}",
    ]
    lines += [peak_line(row) for row in (r.get("memory"), *r.get("peaks", ())) if row]
    if r["peak_gib"]:
        lines.append(f"peak GPU memory of the rounds {r['peak_gib']:.2f} GiB")
    if "profile" in r:
        lines += profile_lines(r["profile"])
    return "\n".join(lines)


def checkpointing_text(row: dict[str, Any]) -> str:
    """Return which layers recompute their activations, and which keep their weights dequantised."""
    layers = row["checkpointing"]
    text = ("on" if layers else "off") if isinstance(layers, bool) else f"of {layers} layers"
    return f"{text}, weights of {row['kept_layers']} kept" if row.get("kept_layers") else text


def peak_line(row: dict[str, Any]) -> str:
    """Return one measured peak against its plan."""
    again = checkpointing_text(row)
    return (
        f"full batches of {BATCH} x {TOKENS}, memory {row.get('memory', 'as it is')}, "
        f"checkpointing {again}: peak {row['measured_gib']:.2f} GiB, planned "
        f"{row['planned_gib']:.2f} (beside the base "
        f"{row['visit_measured_gib']:.2f} and {row['visit_planned_gib']:.2f})"
    )
