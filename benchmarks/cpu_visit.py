"""A visit of a real model on a CPU: float32, float32 by the probed library, bfloat16, in one call.

    grandrounds base fetch smollm2-135m-instruct
    python benchmarks/cpu_visit.py --data ../shared/data --steps 2 --repeats 3

Steps of 16 WikiDoc examples, at most 256 tokens, LoRA r = 16 on q_proj and v_proj, by the product's
own visit; the arms alternate and start from the same adapter. Processor seconds are those of all
threads: beside other busy processes they compare, and wall seconds do not. First the rate of one
product of the base's sizes and of its gradient, per processor second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import grandrounds  # noqa: F401  # before torch: idle threads sleep

import torch  # isort: skip
from real_model_cells import Desk, Setup
from torch.nn.functional import linear

from grandrounds.config.bases import REAL_BASE
from grandrounds.quiet import quiet_libraries

ARMS: dict[str, dict[str, str]] = {
    "float32": {"model.dtype": "float32", "train.cpu-matmul": "default"},
    "auto": {"model.dtype": "float32", "train.cpu-matmul": "auto"},
    "bfloat16": {"model.dtype": "bfloat16"},
}

PRODUCTS = {
    "float32": ("highest", torch.float32),
    "float32 by oneDNN": ("medium", torch.float32),
    "bfloat16": ("highest", torch.bfloat16),
}
"""Name → float32 matmul precision of torch, and number format."""


def rates(hidden: int, inner: int, rows: int = 2048, times: int = 12) -> dict[str, list[float]]:
    """Return GFLOP per processor second of a product and of its input's gradient, by library."""
    found = {}
    for name, (precision, dtype) in PRODUCTS.items():
        torch.set_float32_matmul_precision(precision)
        states, weight, gradient = (
            torch.randn(*shape).to(dtype)
            for shape in ((rows, hidden), (inner, hidden), (rows, inner))
        )
        taken: list[tuple[float, float]] = []
        for _ in range(times):
            first = time.process_time()
            linear(states, weight)
            second = time.process_time()
            gradient @ weight
            taken.append((second - first, time.process_time() - second))
        gigaflop = 2e-9 * rows * hidden * inner
        found[name] = [gigaflop / min(seconds) for seconds in zip(*taken[2:], strict=True)]
    torch.set_float32_matmul_precision("highest")
    return found


def visit(config: Any) -> dict[str, float]:
    """Make one visit to the first site, from the seed's adapter."""
    from flwr.app import RecordDict

    from grandrounds.model import machine
    from grandrounds.model.resident import set_adapter
    from grandrounds.site import visit as visits
    from grandrounds.site.local_data import site_of
    from grandrounds.wire import messages
    from grandrounds.wire.adapter import started_adapter

    resident = machine.prepare_model(config)
    shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    set_adapter(resident, started_adapter(shapes, config.federation.seed, resident.magnitudes))
    asked = messages.content(config={"round": 1, "learning-rate": 1e-3, "cursor": 0})
    made = visits.Visit(asked, RecordDict(), config, site_of(config, 0))
    batches = visits.next_batches(made)
    wall, processor = time.perf_counter(), time.process_time()
    loss = visits.train(made, resident, batches).train_loss
    spent = (time.perf_counter() - wall, time.process_time() - processor)
    return {"wall_seconds": spent[0], "cpu_seconds": spent[1], "train_loss": loss}


def main() -> None:
    """Alternate the arms, print a line for each visit, then medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default=REAL_BASE)
    parser.add_argument("--template", default="chat")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet_libraries()
    from grandrounds.config import recipes
    from grandrounds.model import machine
    from grandrounds.model.headroom import architecture_of
    from grandrounds.server.directory import cpu_name

    setup = Setup(given.model, "auto", given.template, 20, 10, 20, (42,), 300)
    desk = Desk(setup, given.data.absolute(), Path())
    base = architecture_of(given.model)
    rate = rates(*((base.hidden_size, base.intermediate_size) if base else (576, 1536)))
    print(f"{cpu_name()}, torch {torch.__version__}")
    for name, pair in rate.items():
        print(f"{name:<18} {pair[0]:5.0f} and {pair[1]:5.0f} GFLOP per processor second")
    made: dict[str, list[dict[str, float]]] = {arm: [] for arm in given.arms}
    for _ in range(given.repeats):
        for arm, visits in made.items():
            own = {"train.training-arguments.max-steps": given.steps, **ARMS[arm]}
            config = machine.settled(recipes.resolve(desk.config("wikidoc").flat(), own), {})
            visits.append(visit(config) | {"threads": config.train.num_threads})
            told = ", ".join(f"{key} {value:.4g}" for key, value in visits[-1].items())
            print(f"{arm}: products by {config.train.cpu_matmul}, {told}", flush=True)
    keys = ("wall_seconds", "cpu_seconds", "train_loss")
    medians = {
        arm: {key: statistics.median(v[key] for v in visits) for key in keys}
        for arm, visits in made.items()
    }
    for arm, found in medians.items():
        print(f"median {arm}: {', '.join(f'{key} {value:.4g}' for key, value in found.items())}")
    if given.out:
        given.out.write_text(json.dumps({"rates": rate, "medians": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
