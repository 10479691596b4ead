"""SIGKILL at random moments: is anything lost, and does a resume end with the same bits?

    python benchmarks/kills.py [--kills 100] [--agent-kills 100] [--rounds 30] [--seed 1]
        [--out FILE]

Real processes train the embedded base on 4 sites of a few flashcards, in process, with every flush
to disk on. Each is killed after a random time and resumed by the next, until a run is complete;
then another begins. After each kill no finished round may be missing, and each complete run must
equal one that nobody killed: adapters, metrics but for seconds, and ledger. Then the same at the
sites' agents (`kills_at_agents.py`). Also measured: what a
round's writes take, without the flushes, and the checksums in them, by size of the adapter. SIGKILL
leaves the system's cache alone; what a power cut may leave of a file is in
tests/end_to_end/test_damaged_runs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kills_at_agents
import numpy as np
import peft  # noqa: F401  here, so that the processes need not load it
import transformers  # noqa: F401

from grandrounds import client_app, server_app
from grandrounds.config.recipes import load_recipe, resolve
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.quiet import quiet_libraries
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners import Listener
from grandrounds.storage import sha256_of

LONGEST_SECONDS = 4.0
MIB = 2**20
ADAPTERS_MIB = (1, 13, 160)
"""Of the embedded base; of Llama-3-8B with r = 8 on q and v, and with r = 32 on all but MLP."""


def settings(folder: Path, rounds: int) -> dict[str, Any]:
    """Return the settings of a small run, and write its data."""
    data = folder / "cards.jsonl"
    rows = [{"input": f"What helps patient {i}?", "output": f"{i % 7} cups."} for i in range(80)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "static.dataset.name": str(data),
        "data.num-partitions": 4,
        "data.partitioner": "iid",
        "num-server-rounds": rounds,
        "strategy.name": "fedadam",  # whose moments a resume needs
        "strategy.fraction-train": 0.5,
        "model.lora.peft-lora-r": 4,
        "train.save-every-round": 4,
        "train.training-arguments.max-steps": 1,
        "train.training-arguments.per-device-train-batch-size": 4,
    }


def play(values: dict[str, Any], run: Path) -> None:
    """Play a run in this process, or resume it."""
    place = {"run-directory": str(run)}
    if (run / "config.toml").is_file():
        values, place = load_recipe(run / "config.toml"), {"resume-from": str(run)}
    config = resolve({**values, **place})
    grid = InProcessGrid(client_app.app, config.flat(), config.data.num_partitions)
    server_app.federate(grid, config, Listener())


def live(values: dict[str, Any], run: Path, seconds: float | None) -> bool:
    """Play a run in a process of its own, killed after some seconds; return whether it ended."""
    process = os.fork()
    if not process:
        try:
            play(values, run)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ends = time.monotonic() + (seconds if seconds is not None else 600)
    while time.monotonic() < ends:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                sys.exit(f"the process failed with status {status}; see above")
            return True
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def finished_rounds(run: Path) -> int:
    """Return the last finished round of a run, -1 for none."""
    records = RunDirectory(run).read_metrics()
    return records[-1]["round"] if records else -1


def bits(run: Path) -> dict[str, Any]:
    """Return what must not depend on kills."""
    records = RunDirectory(run).read_metrics()
    return {
        **{f.parent.name: f.read_bytes() for f in run.glob("peft_*/adapter_model.safetensors")},
        "metrics": [{k: v for k, v in m.items() if "seconds" not in k} for m in records],
        "ledger": (run / "ledger.json").read_bytes(),
    }


def killed(values: dict[str, Any], count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill processes until there were `count` kills and the last run is complete."""
    moments = random.Random(seed)
    whole = folder / "whole"
    live(values, whole, None)
    expected, kills, runs, lost, unequal = bits(whole), 0, 0, 0, 0
    while kills < count:
        run, before = folder / f"run-{runs}", -1
        while True:
            seconds = moments.uniform(0, LONGEST_SECONDS) if kills < count else None
            if live(values, run, seconds):
                break
            kills += 1
            after = finished_rounds(run)
            lost += after < before
            before = after
            print(f"kill {kills}: round {after} of run {runs + 1}", flush=True)
        runs += 1
        unequal += bits(run) != expected
    return {"kills": kills, "runs": runs, "rounds-lost": lost, "runs-with-other-bits": unequal}


def write_seconds(size_mib: int, folder: Path, times: int = 7) -> float:
    """Return the median seconds of a round's writes without a checkpoint."""
    config = resolve({"run-directory": str(folder / f"writes-{size_mib}-{time.monotonic()}")})
    directory = RunDirectory.create(Path(config.federation.run_directory), config)
    adapter = {"a": np.zeros(size_mib * MIB // 4, np.float32)}
    taken = []
    for number in range(times):
        record = {"round": number, "train-loss": 1.0, "cohort": list(range(20))}
        state = {"round": number, "record": record}
        started = time.perf_counter()
        directory.save_state(adapter, state, {}, [{"partition-id": site} for site in range(20)])
        directory.append_metrics(record)
        directory.write_json("ledger.json", {"totals": {}})
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def hash_seconds(size_mib: int, folder: Path) -> float:
    """Return the seconds of the SHA-256 of an adapter."""
    file = folder / "bytes"
    file.write_bytes(bytes(size_mib * MIB))
    started = time.perf_counter()
    sha256_of(file)
    return time.perf_counter() - started


def write_costs(sizes_mib: Sequence[int], folder: Path) -> dict[str, dict[str, float]]:
    """Return adapter's size → milliseconds of a round's writes and of parts of them."""
    flush, costs = os.fsync, {}
    for size in sizes_mib:
        seconds = {"all": write_seconds(size, folder)}
        os.fsync = lambda handle: None
        try:
            seconds["without-flushes"] = write_seconds(size, folder)
        finally:
            os.fsync = flush
        seconds["checksum"] = hash_seconds(size, folder)
        costs[f"{size} MiB"] = {name: round(1000 * taken, 1) for name, taken in seconds.items()}
    return costs


def main() -> None:
    """Kill, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--agent-kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--adapters-mib", type=int, nargs="+", default=ADAPTERS_MIB)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grandrounds-kills-") as folder:
        values = settings(Path(folder), options.rounds)
        found = killed(values, options.kills, options.seed, Path(folder))
        found["agents"] = kills_at_agents.killed(
            values, options.agent_kills, options.seed, Path(folder, "agents"), bits
        )
        found["write-milliseconds"] = write_costs(options.adapters_mib, Path(folder))
    found["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    agents = found["agents"]
    failed = agents["audit-lines-lost"] or agents["runs-with-other-bits"]
    sys.exit(bool(found["rounds-lost"] or found["runs-with-other-bits"] or failed))


if __name__ == "__main__":
    main()
