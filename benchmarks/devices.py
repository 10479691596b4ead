"""A visit on several devices against the same passes in one process: bits and seconds.

    python benchmarks/devices.py --architecture 90m --devices 2
    python benchmarks/devices.py --architecture llama-3-8b --quantization 4 --devices 4
    python benchmarks/devices.py --architecture 90m --devices 2 --one-gpu

The visit is that of full_size.py: steps of 16 examples as long as real ones, LoRA r = 8 on q_proj
and v_proj, FedProx. Arms, on one base with random weights:

    one        this process, each batch whole (`train.devices = 1`)
    shares     this process, each batch in as many shares as there are devices
    again      the same once more: whether this device repeats its own bits
    devices    the same shares, each on a device of its own

`--one-gpu` puts all processes on the same GPU, with gloo in place of NCCL: it shows that the code
runs on CUDA, not what several GPUs gain. On a CPU the processes share its cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bare_loops import ALPHA, BATCH, RANK, RATE, STEPS, TARGETS, TOKENS, synchronize
from random_base import SMALL, write_base, write_cards

ARMS = ("one", "shares", "again", "devices")


def settings(base: Path, data: Path, given: argparse.Namespace) -> dict[str, Any]:
    return {
        "model.name": str(base),
        "static.dataset.name": str(data),
        "model.quantization": given.quantization,
        "model.dtype": given.dtype,
        "model.lora.peft-lora-r": RANK,
        "model.lora.peft-lora-alpha": ALPHA,
        "model.lora.target-modules": ",".join(TARGETS),
        "model.lora.dropout": given.dropout,
        "train.learning-rate-max": 100 * RATE,
        "train.learning-rate-min": RATE,
        "train.num-threads": given.threads,
        "train.seq-length": TOKENS,
        "train.devices": given.devices,
        "train.training-arguments.max-steps": given.steps,
        "train.training-arguments.per-device-train-batch-size": BATCH,
        "strategy.name": "fedprox",
        "strategy.proximal-mu": 0.01,
        "strategy.fraction-evaluate": 0.0,
        "data.num-partitions": 2,
        "data.held-out-fraction": 0.0,
    }


def backend(given: argparse.Namespace) -> str:
    """Return what carries tensors between the processes."""
    import torch

    return "nccl" if torch.cuda.is_available() and not given.one_gpu else "gloo"


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return seconds of each arm, and how far its adapter is from that of `shares`."""
    import torch

    from grandrounds.config import recipes
    from grandrounds.model import devices, machine
    from grandrounds.model.resident import set_adapter
    from grandrounds.site import training, visit
    from grandrounds.site.devices import group
    from grandrounds.site.local_data import open_site
    from grandrounds.wire import schedule
    from grandrounds.wire.adapter import initial_adapter

    on_gpu = torch.cuda.is_available()
    base, cards = folder / "base", folder / "cards.jsonl"
    write_base(given.architecture, base, "cuda" if on_gpu else "cpu", given.stored)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    write_cards(cards, 2 * given.steps * BATCH, vocabulary)
    config = recipes.resolve(settings(base, cards, given))
    if given.one_gpu:
        group._gpu_of = lambda rank: 0
    if devices.processes(config) < given.devices:  # never fewer than asked for
        group.processes = lambda _: given.devices  # type: ignore[attr-defined]

    started = time.perf_counter()
    resident = visit.prepared(config)
    shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    adapter = initial_adapter(shapes, schedule.adapter_generator(1))
    names, parameters = list(shapes), list(resident.parameters.values())
    group.begun(config, resident, names, 0)
    starting = time.perf_counter() - started
    on, by = torch.cuda.get_device_name() if on_gpu else "CPU", backend(given)
    print(f"{on}, {given.devices} processes by {by}, started in {starting:.1f} s", flush=True)

    site = open_site(config.static.name, config.data, config.model.name, TOKENS, 1, 0)
    examples = site.train[: given.steps * BATCH]
    batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    how = training.VisitSettings(
        accumulation_steps=1,
        schedule=schedule.VisitSchedule(100 * RATE, 0),
        optimizer="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        proximal_mu=0.01,
        forward=machine.forward(config),
        seed=1,
        shares=given.devices,
    )
    visits: dict[str, training.VisitSettings] = dict.fromkeys(ARMS, how)
    visits["one"] = dataclasses.replace(how, shares=1)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    adapters: dict[str, list[Any]] = {}
    losses: dict[str, float] = {}
    for _ in range(1 + given.repeats):  # the first time is start-up and not counted
        for arm in ARMS:
            set_adapter(resident, adapter)
            others = group.begun(config, resident, names, 0) if arm == "devices" else None
            how_now = dataclasses.replace(visits[arm], group=others)
            synchronize()
            began = time.perf_counter()
            result = training.train_visit(resident.model, parameters, batches, how_now, 0)
            synchronize()
            seconds[arm].append(time.perf_counter() - began)
            adapters[arm] = [p.detach().clone() for p in parameters]
            losses[arm] = result.train_loss
    group.end()
    moved = [
        p.detach() - torch.tensor(adapter[n], device=p.device)
        for n, p in resident.parameters.items()
    ]
    largest = max(float(t.abs().max()) for t in moved)
    return {
        "device": on,
        "torch": torch.__version__,
        "devices": given.devices,
        "backend": by,
        "starting_seconds": starting,
        "tokens": sum(len(e.input_ids) for e in examples),
        "largest_change": largest,
        "arms": {
            arm: {
                "seconds": sorted(seconds[arm][1:]),
                "train_loss": losses[arm],
                "same_bits": all(map(torch.equal, adapters[arm], adapters["shares"])),
                "largest_difference": max(
                    float((a - b).abs().max())
                    for a, b in zip(adapters[arm], adapters["shares"], strict=True)
                ),
            }
            for arm in ARMS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architecture", default="90m", help=f"{', '.join(SMALL)}, llama-3-8b ...")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--one-gpu", action="store_true", help="all processes on the first GPU")
    parser.add_argument("--quantization", type=int, default=0)
    parser.add_argument("--stored", default="float32", help="type of the weights on disk")
    parser.add_argument("--dtype", default="auto", help="model.dtype")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(given, Path(folder))
    print(f"a visit of {figures['tokens']:,} tokens, median of {given.repeats}:")
    for arm, row in figures["arms"].items():
        median = row["seconds"][len(row["seconds"]) // 2]
        same = "the bits of shares" if row["same_bits"] else "other bits"
        print(
            f"{arm:8} {median:8.2f} s   loss {row['train_loss']:.6f}   {same}, at most "
            f"{row['largest_difference']:.1e} of {figures['largest_change']:.1e} apart"
        )
    if given.out:
        given.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
