"""Bytes against accuracy on the embedded world: every pair of codecs, both ways, as counted.

    python benchmarks/communication.py [--seeds 1 2 3 4 5] [--arms NAME ...] [--jobs 2]
                                       [--out FILE] [--png FILE]

Non-IID by site, 4 of 20 sites a round, 40 rounds of 5 steps of 16. MiB are those of the training
messages in the run's own ledger: headers, scales, complete messages to sites that hold nothing.
The loss in points is that against float32 with the same seeds. The picture shows accuracy on the
private facts over MiB, with 95 % intervals over seeds where there are three or more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formulary_runs import SETTING, column, mean_interval, play_all

ROUNDS = {
    **SETTING,
    "num-server-rounds": 40,
    "train.training-arguments.max-steps": 5,
}

FFA = {"strategy.name": "ffa", "strategy.proximal-mu": 0.0, "train.learning-rate-max": 1e-2}
"""B alone moves, and takes a larger step."""

HALF = {"num-server-rounds": 20, "train.training-arguments.max-steps": 10}
"""The same steps in half the rounds: every other message is not sent."""


def both(codec: str, **more: Any) -> dict[str, Any]:
    """Return a complete message both ways by one codec."""
    return {
        "communication.uplink-codec": codec,
        "communication.downlink-codec": codec,
        **{f"communication.{key.replace('_', '-')}": value for key, value in more.items()},
    }


def incremental(codec: str, **more: Any) -> dict[str, Any]:
    """Return changes both ways by one codec."""
    return both(codec, downlink="incremental", **more)


ARMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "FFA ternary incremental, Zstandard": {
        **FFA,
        **incremental("ternary", entropy_coding=True, block_size=128),
    },
    "int4": both("int4"),
    "1 bit incremental": incremental("sign"),
    "FFA 1 bit incremental": {**FFA, **incremental("sign")},
    "ternary incremental": incremental("ternary"),
    "int8": both("int8"),
    "FFA float32": FFA,
    "FFA 1 bit up, int4 down": {**FFA, **both("int4", uplink_codec="sign")},
    "20 rounds, float32": HALF,
    "20 rounds, FFA ternary incremental, Zstandard": {
        **HALF,
        **FFA,
        **incremental("ternary", entropy_coding=True, block_size=128),
    },
    "1 bit up, int4 down": both("int4", uplink_codec="sign"),
    "int4, Zstandard": both("int4", entropy_coding=True),
    "bf16": both("bf16"),
}
"""Name → what differs from `ROUNDS`."""


def table(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return one row an arm."""
    rows = []
    for name, by_seed in runs.items():
        private, half = mean_interval(column(by_seed, "private"))
        up, down = (mean_interval(column(by_seed, f"{way}_mib"))[0] for way in ("up", "down"))
        row: dict[str, Any] = {
            "arm": name,
            "seeds": sorted(by_seed),
            "private": private,
            "half_interval": half,
            "public": mean_interval(column(by_seed, "public"))[0],
            "up_mib": up,
            "down_mib": down,
        }
        if "float32" in runs and runs["float32"].keys() >= by_seed.keys():
            plain = [runs["float32"][seed] for seed in sorted(by_seed)]
            lost = [
                p["private"] - q for p, q in zip(plain, column(by_seed, "private"), strict=True)
            ]
            row["lost"], row["lost_half_interval"] = mean_interval(lost)
            row["times_less"] = (plain[0]["up_mib"] + plain[0]["down_mib"]) / (up + down)
        rows.append(row)
    return rows


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw accuracy over MiB; the best accuracy at most at each cost is joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    points = sorted((r["up_mib"] + r["down_mib"], r["private"], r) for r in rows)
    front: list[tuple[float, float]] = []
    for mib, private, _ in points:
        if not front or private > front[-1][1]:
            front.append((mib, private))
    axes.plot(*zip(*front, strict=True), color="#0072b2", linewidth=1, alpha=0.6, zorder=1)
    for number, (mib, private, row) in enumerate(points, 1):
        color, marker = ("#d55e00", "s") if "FFA" in row["arm"] else ("#0072b2", "o")
        half = row["half_interval"] if len(row["seeds"]) > 2 else 0  # of two it says nothing
        axes.errorbar(
            mib, private, yerr=half, fmt=marker, color=color, capsize=3, linewidth=1, zorder=2
        )
        place = (-4, -15) if number % 2 else (-4, 9)
        axes.annotate(str(number), (mib, private), place, textcoords="offset points", fontsize=9)
    names = [
        f"{number:>2}  {row['arm']}: {mib:.2f} MiB"
        for number, (mib, _, row) in enumerate(points, 1)
    ]
    axes.text(
        1.02, 1, "\n".join(names), transform=axes.transAxes, va="top", fontsize=8.5, linespacing=1.6
    )
    axes.set_xscale("log")
    axes.set_ylim(top=100.8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("MiB of training messages, both ways (log)")
    axes.set_ylabel("private facts answered rightly, %")
    axes.set_title("Accuracy against communication; squares: A frozen (FFA)", loc="left")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=None, help="instead of 40 (or 20)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--png", type=Path, default=None)
    arguments = parser.parse_args()
    fewer = {"num-server-rounds": arguments.rounds} if arguments.rounds else {}
    arms = {name: {**ROUNDS, **ARMS[name], **fewer} for name in arguments.arms}
    rows = table(play_all(arms, arguments.seeds, arguments.jobs, arguments.out))
    print(
        f"\n{'arm':<34} {'private %':>13} {'public %':>9} {'lost, points':>13} "
        f"{'up MiB':>8} {'down MiB':>9} {'less':>6}"
    )
    for row in rows:
        lost = f"{row['lost']:.1f} ± {row['lost_half_interval']:.1f}" if "lost" in row else ""
        less = f"{row['times_less']:.1f}x" if "times_less" in row else ""
        print(
            f"{row['arm']:<34} {row['private']:>6.1f} ± {row['half_interval']:>4.1f} "
            f"{row['public']:>9.1f} {lost:>13} {row['up_mib']:>8.2f} {row['down_mib']:>9.2f} "
            f"{less:>6}"
        )
    if arguments.out:
        written = json.loads(arguments.out.read_text())
        arguments.out.write_text(json.dumps({**written, "rows": rows}, indent=2))
    if arguments.png:
        draw(rows, arguments.png)


if __name__ == "__main__":
    main()
