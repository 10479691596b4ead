"""What gpu.py measured, in Markdown; no script by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bare_loops import BATCH, STEPS, TOKENS
from full_size_table import checkpointing_text


def markdown(found: dict[str, Any]) -> str:
    """Return everything that was measured as one page."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    card = found["card"]
    if "driver" in found:
        card += f", {found['memory']}, driver {found['driver']}"
    about = f"{card}; {versions}; commit {found['commit']}; {found['architecture']}"
    if found["dry_run"]:
        about += "; DRY RUN of small shapes: no figure here says anything"
    parts = {name: part.get("result") for name, part in found["parts"].items()}
    blocks = [f"{about}; {found['seconds']:.0f} s in all", states(found["parts"])]
    if rounds := parts.get("rounds"):
        blocks += [round_table(rounds, parts.get("bfloat16"), parts.get("compiled"))]
        blocks += [peak_table(rounds), profile_table(rounds)]
    if paths := parts.get("paths"):
        blocks.append(path_table(paths))
    if evaluation := parts.get("evaluation"):
        blocks.append(evaluation_table(evaluation))
    return "\n\n".join(block for block in blocks if block) + "\n"


def rows_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def states(parts: dict[str, Any]) -> str:
    """Return which parts passed."""
    return rows_of(
        ("part", "", "seconds", ""),
        [
            (name, part["state"], f"{part['seconds']:.0f}", _cell(part.get("reason", "")))
            for name, part in parts.items()
        ],
    )


def round_table(
    rounds: dict[str, Any], bfloat16: dict[str, Any] | None, compiled: dict[str, Any] | None
) -> str:
    """Return the seconds of a round by arm, and its share of the card's rate."""
    seconds = rounds["seconds"]
    rows = [("Grand Rounds", f"{seconds['ours']:.2f}", _spread(rounds, "ours"))]
    for name, other in (("on a bfloat16 base", bfloat16), ("with compiled MLPs", compiled)):
        if other:
            ours = other["seconds"]["ours"]
            rows.append((f"Grand Rounds {name}", f"{ours:.2f}", _spread(other, "ours")))
    if "neither" in seconds:
        label = "bare loop, base resident, padded batches, all logits"
        rows.append((label, f"{seconds['neither']:.2f}", _spread(rounds, "neither")))
    if rounds["template"]:
        template = rounds["template"]["seconds"]
        times = template / seconds["ours"]
        rows.append(("the template's way", f"{template:.1f}", f"{times:.1f} times ours"))
    head = (
        f"A round: 3 visits of {STEPS} steps of {BATCH}, at most {TOKENS} tokens, "
        f"{rounds['rows'][-1]['tokens']:,} in the last round; {rounds['quantization'] or 'no'} "
        f"bits; {rounds['means']}. {rounds['utilisation']:.0%} of the measured "
        f"{rounds['product_tflops']:.3g} TFLOP/s in the model's operations, "
        f"{rounds['tokens_per_second']:,.0f} tokens/s. Start-up with the load "
        f"{rounds['start_up_seconds']:.0f} s."
    )
    return f"{head}\n\n{rows_of(('arm', 'seconds a round', ''), rows)}"


def peak_table(rounds: dict[str, Any]) -> str:
    """Return measured peaks against plans."""
    rows = [
        (
            row.get("memory", "as it is"),
            checkpointing_text(row),
            f"{row['measured_gib']:.2f}",
            f"{row['planned_gib']:.2f}",
            f"{row['planned_gib'] / row['measured_gib'] - 1:+.1%}",
        )
        for row in rounds.get("peaks", ())
    ]
    heads = ("free memory", "checkpointing", "peak, GiB", "planned", "plan to peak")
    return f"Full batches of {BATCH} x {TOKENS}:\n\n{rows_of(heads, rows)}" if rows else ""


def profile_table(rounds: dict[str, Any]) -> str:
    """Return a step by kind of work."""
    found = rounds.get("profile")
    if not found:
        return ""
    kinds = found["kinds_ms_a_step"]
    total = sum(kinds.values())
    rows = [(kind, f"{ms:.1f}", f"{ms / total:.0%}") for kind, ms in kinds.items()]
    head = f"A step of shapes seen before takes {found['wall_ms_a_step']:.0f} ms"
    if found["busy_share"] is not None:
        head += (
            f", the GPU is busy {found['busy_ms_a_step']:.0f} ms of it "
            f"({found['busy_share']:.0%}), with {found['launches_a_step']:,.0f} kernels"
        )
    return f"{head}:\n\n{rows_of(('kind', 'ms', 'share'), rows)}"


def path_table(paths: dict[str, Any]) -> str:
    """Return errors against float32."""
    rows = [
        (name, f"{row['loss_error']:.1e}", f"{row['gradient_error']:.1e}")
        for name, row in paths["rows"].items()
    ]
    head = f"Relative errors of two layers in {paths['dtype']} against float32 eager attention:"
    return f"{head}\n\n{rows_of(('path', 'loss', 'gradient'), rows)}"


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """Return the seconds of an evaluation by arm, benchmark and protocol."""
    rows = [
        (
            row["arm"],
            row["benchmark"],
            row["protocol"],
            f"{row['answers']:,}",
            f"{row['seconds']:.1f}",
            f"{row['answers'] / row['seconds']:.0f}",
            f"{row['forecast_seconds']:.1f} / {row['seconds_after_forecast']:.1f}",
        )
        for row in evaluation["rows"]
    ]
    head = f"Evaluation; the base is loaded in {evaluation['loading_seconds']:.1f} s beforehand:"
    heads = ("arm", "benchmark", "protocol", "answers", "seconds", "answers/s", "forecast / took")
    differences = "".join(
        f"\n\n{row['benchmark']}, {row['protocol']}: {row['different_answers']} of "
        f"{row['answers']:,} answers differ between the arms; log-likelihoods by at most "
        f"{row['largest_log_likelihood_difference']:.2g}."
        for row in evaluation["differences"]
    )
    return f"{head}\n\n{rows_of(heads, rows)}{differences}"


def _spread(result: dict[str, Any], arm: str) -> str:
    found = [row[arm] for row in result["rows"] if arm in row]
    return f"{min(found):.2f} to {max(found):.2f}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
