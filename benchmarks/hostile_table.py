"""The table and the picture of docs/aggregation.md from the runs of `hostile.py`.

    python benchmarks/hostile_table.py FILE.jsonl [--png docs/hostile.png]

Each figure is the accuracy on the honest sites' facts in percent. Where a setting was run on
several seeds, their number is in brackets. The difference to `fedavg` without the hostile sites
(`absent`; in the row `none`: to `fedavg`) is paired by seed, from three seeds on with its 95 %
interval by Student's t.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from formulary_runs import mean_interval
from hostile import NAMES, done
from hostile_attacks import HELD_BACK

REFERENCE = "fedavg"
COLUMNS = ("none", *NAMES, HELD_BACK)


def figures(file: Path, partition: str) -> dict[tuple[str, str, int], dict[int, float]]:
    """Return (setting, attack, hostile sites) → seed → accuracy."""
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    for cell, line in done(file).items():
        if cell.partition == partition:
            key = (cell.setting, cell.attack, cell.hostile)
            found.setdefault(key, {})[cell.seed] = line["private"]
    return found


def cell_text(runs: dict[int, float], reference: dict[int, float], *, paired: bool) -> str:
    """Return a mean, the number of seeds, the paired difference, and its interval from three on."""
    mean, _ = mean_interval(list(runs.values()))
    seeds = sorted(set(runs) & set(reference))
    text = f"{mean:.1f}" + (f" ({len(runs)})" if len(runs) > 1 else "")
    if not paired or not seeds:
        return text
    difference, half = mean_interval([runs[s] - reference[s] for s in seeds])
    return f"{text}, {difference:+.1f}" + (f" ± {half:.1f}" if len(seeds) > 2 else "")


def table(file: Path, partition: str, hostile: int) -> list[str]:
    """Return a table in Markdown: attacks by settings."""
    found = figures(file, partition)
    settings = list(dict.fromkeys(setting for setting, _, _ in found))
    lines = [f"| {partition}, {hostile} of 7 | " + " | ".join(f"`{s}`" for s in settings) + " |"]
    lines.append("|---" * (len(settings) + 1) + "|")
    for attack in COLUMNS:
        count = 0 if attack == "none" else hostile
        reference = found.get((REFERENCE, "absent" if count else "none", count), {})
        row = []
        for setting in settings:
            runs = found.get((setting, attack, count))
            is_reference = setting == REFERENCE and attack in ("none", "absent")
            row.append(cell_text(runs, reference, paired=not is_reference) if runs else "")
        if any(row):
            lines.append(f"| {attack} | " + " | ".join(row) + " |")
    return lines


def draw(file: Path, settings: list[str], png: Path) -> None:
    """Draw accuracy by attack for some settings, natural partition, two of seven hostile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = figures(file, "natural")
    attacks = [a for a in COLUMNS if a not in ("none", "absent")]
    attacks = [a for a in attacks if any((s, a, 2) in found for s in settings)]
    axes = plt.subplots(figsize=(9, 4.2), layout="constrained")[1]
    width = 0.8 / len(settings)
    for place, setting in enumerate(settings):
        here = [
            (i, found[setting, a, 2]) for i, a in enumerate(attacks) if (setting, a, 2) in found
        ]
        x = [i + (place - (len(settings) - 1) / 2) * width for i, _ in here]
        axes.bar(x, [mean_interval(list(r.values()))[0] for _, r in here], width, label=setting)
        for at, (_, runs) in zip(x, here, strict=True):
            axes.plot([at] * len(runs), list(runs.values()), "k.", markersize=3)
    absent, _ = mean_interval(list(found[REFERENCE, "absent", 2].values()))
    axes.axhline(absent, color="black", linestyle="--", linewidth=1)
    axes.annotate("those sites absent", (len(attacks) - 0.5, absent + 2), ha="right")
    axes.axhline(25, color="grey", linestyle=":", linewidth=1)
    axes.annotate("chance", (len(attacks) - 0.5, 26), ha="right", color="grey")
    axes.set_xticks(range(len(attacks)), attacks, rotation=20)
    axes.set_ylabel("facts of the honest sites known, %")
    axes.set_ylim(0, 100)
    axes.set_title("Two hostile sites of seven, each site with its own facts")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plt.savefig(png, dpi=130)


def main() -> None:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--settings", nargs="+", default=["fedavg", "nnm", "robust"])
    options = parser.parse_args()
    counts = {(c.partition, c.hostile) for c in done(options.file) if c.hostile}
    for partition, hostile in sorted(counts, reverse=True):
        print("\n".join(table(options.file, partition, hostile)), end="\n\n")
    if options.png:
        draw(options.file, options.settings, options.png)


if __name__ == "__main__":
    main()
