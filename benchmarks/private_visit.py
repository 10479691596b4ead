"""A private visit beside a plain one, alternated in one process: seconds and peak memory.

    python benchmarks/private_visit.py --architecture 90m --tokens 46
    python benchmarks/private_visit.py --architecture embedded
    python benchmarks/private_visit.py --architecture llama-3-8b --quantization 4 --tokens 512 \
        --targets q_proj,v_proj --rank 8

Both arms train the same records by the same means: the private one with every unit drawn, so that
neither has more of them. What differs is the gradient of each unit, the clip and the noise. The
first visit of each arm is start-up and not counted. Peak memory is that of one private visit beside
the base, and the plan's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peak_memory import peak_bytes
from random_base import write_base

MIB = 2**20


def configured(base: str, given: argparse.Namespace) -> Any:
    """Return the recipe of the private arm."""
    from grandrounds.config import recipes
    from grandrounds.model import machine

    words = {"auto": "auto", "on": True, "off": False}
    settings = {
        "model.name": base,
        "model.quantization": given.quantization,
        "model.gradient-checkpointing": words[given.checkpointing],
        "model.lora.target-modules": given.targets,
        "model.lora.peft-lora-r": given.rank,
        "model.lora.peft-lora-alpha": 2 * given.rank,
        "strategy.name": given.strategy,
        "train.seq-length": given.tokens,
        "train.num-threads": given.threads,
        "train.training-arguments.per-device-train-batch-size": given.microbatch,
        "train.training-arguments.gradient-accumulation-steps": given.records // given.microbatch,
        "privacy.unit-guarantee": "example",
        "privacy.noise-multiplier": 1.0,
        "privacy.declared-units": given.records,
    }
    return machine.settled(recipes.resolve(settings), {})


def arms(config: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Return what to call for each arm, on the base loaded in this process."""
    import numpy as np

    from grandrounds.config.strategies import STRATEGIES
    from grandrounds.data.tokenization import TokenizedExample
    from grandrounds.model import headroom, machine
    from grandrounds.model.resident import checkpoint_activations
    from grandrounds.site.private.coins import secret_coins
    from grandrounds.site.private.mechanism import Mechanism
    from grandrounds.site.private.visit import PrivateSettings, train_private_visit
    from grandrounds.site.training import VisitSettings, train_visit
    from grandrounds.wire.adapter import factor_of
    from grandrounds.wire.schedule import VisitSchedule

    resident = machine.prepare_model(config)
    checkpoint_activations(resident, headroom.checkpoints_activations(config))
    factors = STRATEGIES[given.strategy].trained(1)
    for name, parameter in resident.parameters.items():
        parameter.requires_grad_(factor_of(name) in factors)
    trained = [p for p in resident.parameters.values() if p.requires_grad]
    rng = np.random.default_rng(0)
    vocabulary = resident.model.get_base_model().config.vocab_size
    records = [
        TokenizedExample(tuple(rng.integers(3, vocabulary, given.tokens).tolist()), 1)
        for _ in range(given.records)
    ]
    batches = [records[i : i + given.microbatch] for i in range(0, len(records), given.microbatch)]
    how = VisitSettings(
        accumulation_steps=len(batches),
        schedule=VisitSchedule(1e-4, 0),
        optimizer=config.train.optimizer,
        weight_decay=0.0,
        max_grad_norm=1.0,
        proximal_mu=config.strategy.proximal_mu,
        forward=machine.forward(config),
        seed=0,
    )
    mechanism = Mechanism(1.0, 1.0, 1.0, given.records, given.steps, visits=1, delta=1e-6)
    settings = PrivateSettings(mechanism, given.microbatch, how)
    units = [[record] for record in records]

    def plain() -> None:
        train_visit(resident.model, trained, batches * given.steps, how, 0)

    def private() -> None:
        train_private_visit(resident.model, trained, units, settings, 0, secret_coins())

    print(
        f"{sum(p.numel() for p in trained):,} trained values, {given.records} x {given.tokens} "
        f"tokens a step, {given.steps} steps a visit, {machine.precision(config)}, "
        f"{machine.threads(config)} threads",
        flush=True,
    )
    return {"plain": plain, "private": private}


def measured(run: dict[str, Any], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return wall-clock and CPU seconds of each arm's visits, in turn."""
    taken: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": []} for n in run}
    for repeat in range(repeats + 1):
        for name in list(run) if repeat % 2 else list(run)[::-1]:
            started, cpu = time.perf_counter(), time.process_time()
            run[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                taken[name]["wall"].append(time.perf_counter() - started)
                taken[name]["cpu"].append(time.process_time() - cpu)
    return taken


def memory(config: Any, run: dict[str, Any]) -> dict[str, float]:
    """Return the peak of a private visit beside the base, and the plan's, in MiB."""
    from grandrounds.model import headroom
    from grandrounds.model.resident import resident_bytes

    peak = peak_bytes(run["private"])
    checkpointing = headroom.checkpoints_activations(config)
    needs = headroom.site_needs(config, checkpointing=checkpointing)
    out = {"peak": peak / MIB, "weights": resident_bytes() / MIB}
    if needs is not None:
        # what was there before the visit: the base, and the adapter once
        out["planned"] = (needs.total - resident_bytes()) / MIB
        out["planned/peak"] = out["planned"] / out["peak"]
    return out


def main() -> None:
    """Measure both arms and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", default="90m", help="embedded, tiny, 90m, llama-3-8b")
    parser.add_argument("--quantization", type=int, default=0, choices=(0, 4, 8))
    parser.add_argument("--checkpointing", default="off", choices=("auto", "on", "off"))
    parser.add_argument("--strategy", default="fedavg", choices=("fedavg", "ffa"))
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--records", type=int, default=16, help="records of a step")
    parser.add_argument("--microbatch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=46, help="tokens of a record")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        base = "formulary"
        if given.architecture != "embedded":
            base = str(Path(folder) / "base")
            write_base(given.architecture, Path(base), device, dtype)
        config = configured(base, given)
        run = arms(config, given)
        taken = measured(run, given.repeats)
        found: dict[str, Any] = {}
        for kind in ("wall", "cpu"):
            medians = {name: statistics.median(taken[name][kind]) for name in run}
            pairs = zip(taken["private"][kind], taken["plain"][kind], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            found[kind] = {**medians, "ratio": ratio}
            print(
                f"{kind}: plain {medians['plain']:.3f} s, private {medians['private']:.3f} s a "
                f"visit (medians of {given.repeats}), ratio {ratio:.3f}"
            )
        found["memory"] = memory(config, run)
        print("memory, MiB: " + ", ".join(f"{k} {v:,.3f}" for k, v in found["memory"].items()))
        if given.json:
            given.json.write_text(json.dumps({**vars(given), "json": None, **found}, indent=1))


if __name__ == "__main__":
    main()
