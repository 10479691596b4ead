"""All aggregation rules side by side on the embedded world, and the gap to centralised training.

    python benchmarks/aggregation.py [--seeds 1 2 3 4 5] [--arms NAME ...] [--jobs 2] [--out FILE]

Non-IID by site, 4 of 20 sites a round, 20 rounds of 10 steps of 16. `centralised` makes the same
4 x 10 x 16 example visits a round on one pool of all data, one batch after the other; `centralised,
batch 64` takes them in 10 steps, as many in a row as a site makes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from formulary_runs import SETTING, column, mean_interval, play_all

ROUNDS = {
    **SETTING,
    "num-server-rounds": 20,
    "train.training-arguments.max-steps": 10,
}

POOL = {"data.num-partitions": 1, "data.partitioner": "iid", "strategy.fraction-train": 1.0}

AVERAGE = {"strategy.name": "fedavg", "strategy.proximal-mu": 0.0}

ARMS: dict[str, dict[str, Any]] = {
    "centralised": {**AVERAGE, **POOL, "train.training-arguments.max-steps": 40},
    "centralised, batch 64": {
        **AVERAGE,
        **POOL,
        "train.training-arguments.per-device-train-batch-size": 64,
    },
    "fedavg, uniform cohorts": {**AVERAGE, "strategy.cohorts": "uniform"},
    "fedprox 0.01, uniform cohorts": {"strategy.cohorts": "uniform"},
    "fedavg": AVERAGE,
    "fedprox 0.01": {},
    "fedprox 0.1": {"strategy.proximal-mu": 0.1},
    "fedexp": {"strategy.name": "fedexp", "strategy.proximal-mu": 0.0},
    "fedexp, rate 3e-3": {
        "strategy.name": "fedexp",
        "strategy.proximal-mu": 0.0,
        "train.learning-rate-max": 3e-3,
    },
    "ffa, rate 1e-2": {
        "strategy.name": "ffa",
        "strategy.proximal-mu": 0.0,
        "train.learning-rate-max": 1e-2,
    },
    **{
        name: {"strategy.name": name, "strategy.proximal-mu": 0.0}
        for name in ("product", "rolora", "ffa", "flora")
    },
    "product, ranks 16 8 4": {
        "strategy.name": "product",
        "strategy.proximal-mu": 0.0,
        "strategy.site-ranks": "16,8,4",
    },
    "fedavgm 0.5": {
        "strategy.name": "fedavgm",
        "strategy.proximal-mu": 0.0,
        "strategy.server-momentum": 0.5,
    },
    "server rate 1.5": {
        "strategy.name": "fedavgm",
        "strategy.proximal-mu": 0.0,
        "strategy.server-momentum": 0.0,
        "strategy.server-learning-rate": 1.5,
    },
    **{
        name: {"strategy.name": name, "strategy.proximal-mu": 0.0}
        for name in ("fedadam", "fedyogi", "fedadagrad", "fedmedian", "krum", "multikrum", "bulyan")
    },
    "fedtrimmedavg": {
        "strategy.name": "fedtrimmedavg",
        "strategy.proximal-mu": 0.0,
        "strategy.trimmed-share": 0.25,
    },
}
"""Name → what differs from `ROUNDS`; cohorts are balanced unless said."""


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    arms = {
        name: {**ROUNDS, "num-server-rounds": arguments.rounds, **ARMS[name]}
        for name in arguments.arms
    }
    runs = play_all(arms, arguments.seeds, arguments.jobs, arguments.out)
    rows = []
    pooled = column(runs["centralised"], "private") if "centralised" in runs else None
    for name, by_seed in runs.items():
        private, half = mean_interval(column(by_seed, "private"))
        public, _ = mean_interval(column(by_seed, "public"))
        row = {"arm": name, "private": private, "half_interval": half, "public": public}
        row["mib"] = mean_interval(column(by_seed, "up_mib"))[0]
        row["mib"] += mean_interval(column(by_seed, "down_mib"))[0]
        if pooled:
            differences = [p - q for p, q in zip(pooled, column(by_seed, "private"), strict=True)]
            row["gap"], row["gap_half_interval"] = mean_interval(differences)
        rows.append(row)
    print(f"\n{'arm':<32} {'private %':>14} {'public %':>9} {'gap, points':>15} {'MiB':>8}")
    for row in rows:
        gap = f"{row['gap']:.1f} ± {row['gap_half_interval']:.1f}" if "gap" in row else ""
        mib = "none" if row["arm"].startswith("centralised") else f"{row['mib']:.1f}"
        print(
            f"{row['arm']:<32} {row['private']:>7.1f} ± {row['half_interval']:>4.1f} "
            f"{row['public']:>9.1f} {gap:>15} {mib:>8}"
        )
    if arguments.out:
        written = json.loads(arguments.out.read_text())
        arguments.out.write_text(json.dumps({**written, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
