"""Runs of the embedded world for the comparisons of this folder; no script by itself.

Private facts are known to single sites (partitioner `natural`), so that accuracy on them is what
the federation taught. Each run is the product's own, in process, one thread.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grandrounds.server.listeners import Listener

MIB = 2**20

SETTING: dict[str, Any] = {
    "model.name": "formulary",
    "static.dataset.name": "formulary",
    "data.partitioner": "natural",
    "data.partition-by": "site",
    "data.num-partitions": 20,
    "strategy.name": "fedprox",
    "strategy.proximal-mu": 0.01,
    "strategy.cohorts": "balanced",
    "strategy.fraction-train": 0.2,
    "strategy.fraction-evaluate": 0.0,
    "model.lora.peft-lora-r": 16,
    "model.lora.peft-lora-alpha": 32,
    "model.lora.target-modules": "all-linear",
    "train.learning-rate-max": 5e-3,
    "train.num-threads": 1,
    "train.replay-examples": 0,
    "train.save-every-round": 1000,
}
"""r = 16 on all linear modules, 4 of 20 sites a round; every site has its own drugs."""


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run once; return accuracy in percent, bytes of training by direction, and seconds."""
    from grandrounds import client_app, server_app
    from grandrounds.config import recipes
    from grandrounds.engines.in_process import InProcessGrid
    from grandrounds.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        config = recipes.resolve({**settings, "run-directory": str(Path(folder, "run"))})
        grid = InProcessGrid(client_app.app, config.flat(), config.data.num_partitions)
        summary = server_app.federate(grid, config, Listener())
        ledger = json.loads(Path(folder, "run", "ledger.json").read_text())["totals"]
    up, down = (ledger.get(f"train.{way}", {"tensor_bytes": 0}) for way in ("up", "down"))
    scores = {
        f"{kind}_{which}": 100 * score["correct"] / score["n"]
        for kind, both in summary["formulary"].items()
        for which, score in both.items()
    }
    return {
        "private": scores["private_tuned"],
        "public": scores["public_tuned"],
        "private_base": scores["private_base"],
        "up_mib": up["tensor_bytes"] / MIB,
        "down_mib": down["tensor_bytes"] / MIB,
        "planned_mib": summary["planned_mib"],
        "counted_mib": summary["communication_mib"],
        "seconds": summary["seconds"],
    }


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t over seeds)."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * error
