"""Attention by one call a layer against one call a sequence, and token totals that return.

    python benchmarks/attention.py --architecture llama-3-8b --quantization 4

First the relative errors (L2) of both paths for layers of several shapes, against attention by its
definition in float64: of the output, and of the gradients of queries, keys and values. Then visits
of 6 steps of 16 examples as long as real ones, on random weights:

    one a sequence       rows without a tail
    one a layer          rows without a tail, on a GPU
    tails of 256 ...     rows that end at multiples of at most so many tokens

Each arm plays a visit to start with, two with new examples, and one of these a second time. The
milliseconds are of a step. Examples differ from arm to arm: the time of 1,000 tokens compares them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from bare_loops import ALPHA, BATCH, RANK, RATE, STEPS, TARGETS, TOKENS, synchronize
from random_base import (
    ANSWER_CHARACTERS,
    CHARACTERS_PER_TOKEN,
    QUESTION_CHARACTERS,
    _quantile,
    model_config,
    write_base,
)

HEADS = {
    "Llama 3 8B": (32, 8, 128),
    "Llama 3.2 1B": (32, 8, 64),
    "Phi 3 mini": (32, 32, 96),
    "Qwen 2.5 0.5B": (14, 2, 64),
    "Gemma 2 9B": (16, 8, 256),
}
"""Heads, key-value heads and head size."""


def kernel_errors() -> list[dict[str, Any]]:
    """Return the errors of each path that takes a layer."""
    import torch

    from grandrounds.model.attention import PARTS, PATHS, Layer, errors

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = []
    for name, (heads, key_value_heads, size) in HEADS.items():
        for windowed in (False, True):
            layer = Layer(
                device, torch.bfloat16, heads, key_value_heads, size, size, windowed=windowed
            )
            for path in PATHS:
                if path.takes(layer):
                    found = dict(zip(PARTS, errors(path, layer), strict=True))
                    rows.append({"heads": name, "windowed": windowed, "path": path.name, **found})
    return rows


def batches_of(count: int, vocabulary: int, draw: random.Random) -> list[list[Any]]:
    """Return batches of random examples, as long as WikiDoc's with their prompt."""
    from grandrounds.data.tokenization import TokenizedExample

    def example() -> TokenizedExample:
        question, answer = (
            max(1, round(_quantile(q, draw.random()) / CHARACTERS_PER_TOKEN))
            for q in (QUESTION_CHARACTERS, ANSWER_CHARACTERS)
        )
        ids = [draw.randrange(3, vocabulary) for _ in range(min(TOKENS, 30 + question + answer))]
        return TokenizedExample(tuple(ids), min(30 + question, len(ids) - 1))

    return [[example() for _ in range(BATCH)] for _ in range(count)]


def visits(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return milliseconds of each arm."""
    import dataclasses

    from grandrounds.config import recipes
    from grandrounds.model import attention, machine
    from grandrounds.model.base import device_and_dtype
    from grandrounds.site.training import VisitSettings, train_visit
    from grandrounds.wire.schedule import VisitSchedule

    device, dtype = device_and_dtype("auto")
    stored = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        base = given.base or Path(folder, "base")
        if not given.base:
            write_base(given.architecture, base, str(device), stored)
        config = recipes.resolve(
            {
                "model.name": str(base),
                "model.quantization": given.quantization,
                "model.lora.target-modules": ",".join(TARGETS),
                "model.lora.peft-lora-r": RANK,
                "model.lora.peft-lora-alpha": ALPHA,
            }
        )
        resident, how = machine.prepare_model(config), machine.forward(config)
    parameters, paths = list(resident.parameters.values()), attention.PATHS
    plain = dataclasses.replace(how, bucket_tokens=1)
    arms = {
        "one a sequence": (paths[-1:], plain),
        "one a layer": (paths, plain),
    }
    for tokens in given.tails:
        arms[f"tails of {tokens}"] = (paths, dataclasses.replace(how, bucket_tokens=tokens))
    draw, vocabulary, rows = random.Random(1), model_config(given.architecture).vocab_size, []
    for arm, (offered, forward) in arms.items():
        attention.PATHS = offered
        attention._paths.clear()
        settings = VisitSettings(
            1, VisitSchedule(RATE, 0), "adamw_torch", 0.0, 1.0, 0.01, forward, 1
        )
        new = batches_of(2 * given.steps, vocabulary, draw)
        row: dict[str, Any] = {"arm": arm}
        for phase, batches in {
            "start": batches_of(given.steps, vocabulary, draw),
            "new": new,
            "again": new[: given.steps],
        }.items():
            started = time.perf_counter()
            result = train_visit(resident.model, parameters, batches, settings, 0)
            synchronize()
            seconds = time.perf_counter() - started
            row[f"{phase}_ms"] = 1e3 * seconds / result.steps
            row[f"{phase}_ms_of_1000"] = 1e6 * seconds / result.tokens
            row[f"{phase}_tail"] = result.padding_tokens / result.tokens
        row["paths"] = sorted({path.name for path in attention._paths.values()})
        rows.append(row)
    attention.PATHS = paths
    return rows


def main() -> None:
    """Measure; print two tables, write JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architecture", default="tiny")
    parser.add_argument("--quantization", type=int, choices=(0, 4), default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tails", type=int, nargs="*", default=[256])
    parser.add_argument("--base", type=Path, help="a base of the architecture that is there")
    parser.add_argument("--scratch", type=Path, help="where the base is written")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from grandrounds.quiet import quiet_libraries

    quiet_libraries()
    result = {"errors": kernel_errors(), "visits": visits(given)}
    for row in result["errors"]:
        values = "".join(f"{value:>10.2e}" for value in row.values() if isinstance(value, float))
        window = "window" if row["windowed"] else ""
        print(f"{row['heads']:<14} {window:<7} {row['path']:<21}{values}")
    print(f"\n{'ms a step (of 1,000 tokens)':<30}{'start':>16}{'new':>16}{'again':>16}{'tail':>8}")
    for row in result["visits"]:
        cells = "".join(
            f"{row[f'{phase}_ms']:>8.0f} ({row[f'{phase}_ms_of_1000']:>5.1f})"
            for phase in ("start", "new", "again")
        )
        print(f"{row['arm']:<30}{cells}{row['new_tail']:>8.1%}")
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
