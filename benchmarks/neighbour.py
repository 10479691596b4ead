"""A run beside other busy processes: how much slower it gets, with idle threads asleep or spinning.

    python benchmarks/neighbour.py [--size 6m|90m] [--rounds 2] [--times 3] [--neighbours N]
        [--waiting asleep spinning] [--out FILE]

Every arm is a whole `grandrounds run` in process; arms alternate. A neighbour is a process that
counts without end, and there are as many as CPUs unless told otherwise: time-sharing alone then
doubles the time of a run that uses every CPU. `asleep` is what a run does by itself
(`OMP_WAIT_POLICY=PASSIVE`), `spinning` is GNU OpenMP's own default. Seconds are those of the
rounds, without start-up. Measure on a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overhead import SIZES, make_base, settings

WAITING = {"asleep": {}, "spinning": {"GOMP_SPINCOUNT": "300000"}}
"""How idle threads wait → environment of the run."""

OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep `count` processes busy within the context."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def seconds_of_a_run(recipe: Path, run_dir: Path, waiting: str) -> float:
    """Run a recipe in a process of its own; return the seconds of its rounds."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP}
    command = [sys.executable, "-m", "grandrounds", "run", "--plain", "--config", str(recipe)]
    subprocess.run(
        [*command, "--run-dir", str(run_dir)],
        check=True,
        capture_output=True,
        env=environment | WAITING[waiting],
    )
    return float(json.loads((run_dir / "summary.json").read_text())["seconds"])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate the arms; return every figure, and the medians."""
    from grandrounds.config.recipes import to_toml
    from grandrounds.data.formulary import facts

    arms = [
        (waiting, count) for waiting in arguments.waiting for count in (0, arguments.neighbours)
    ]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parameters = make_base(arguments.size, work / "base")
        data = work / "cards.jsonl"
        data.write_text("".join(json.dumps(card) + "\n" for card in facts.flashcards()))
        flat = settings(work / "base", data, arguments.rounds, arguments.threads)
        recipe = work / "recipe.toml"
        recipe.write_text(to_toml({**flat, "strategy.fraction-train": 0.05}))
        for i in range(arguments.times):
            for waiting, count in arms:
                name = f"{waiting} {'beside' if count else 'alone'}"
                with neighbours(count):
                    took = seconds_of_a_run(recipe, work / f"{name} {i}", waiting)
                seconds.setdefault(name, []).append(took)
    return {
        "parameters": parameters,
        "threads": arguments.threads,
        "neighbours": arguments.neighbours,
        "seconds": seconds,
        "medians": {name: statistics.median(all_of) for name, all_of in seconds.items()},
    }


def main() -> None:
    """Measure one size; print a table, write JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    cpus = os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="90m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cpus)
    parser.add_argument("--neighbours", type=int, default=cpus)
    parser.add_argument("--waiting", nargs="+", choices=list(WAITING), default=list(WAITING))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    result = measure(arguments)
    medians = result["medians"]
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['threads']} threads, "
        f"{result['neighbours']} busy neighbours, median of {arguments.times}"
    )
    print(f"{'idle threads':<16}{'alone, s':>12}{'beside, s':>12}{'ratio':>8}")
    for waiting in arguments.waiting:
        alone, beside = (medians[f"{waiting} {place}"] for place in ("alone", "beside"))
        print(f"{waiting:<16}{alone:>12.2f}{beside:>12.2f}{beside / alone:>8.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
