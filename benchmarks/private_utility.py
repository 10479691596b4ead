"""What a guarantee leaves of the utility: common and rare facts, the formulary, a language model.

    python benchmarks/private_utility.py common-and-rare [--seeds 5] [--out FILE]
    python benchmarks/private_utility.py formulary [--out FILE]
    python benchmarks/private_utility.py wikidoc --data FILE [--folder DIR] [--out FILE]

`common-and-rare`: the arms of `grandrounds privacy demo`, each seed with another draw of the rare
patients, against these limits: of the common facts at least 90 % are known at ε = 8, 85 % at 4 and
70 % at 1, where a fact is known if its value is the likeliest of four, as in the formulary's exam
(chance is 25 %; the stricter share, likeliest of all 24, is printed beside it); the lower 95 %
limit of the mean AUC over seeds is not above that of one Gaussian release of the same ε; at ε = 1
rare facts are extracted at most 5 points above chance. Exit code 1 if one is missed.

`formulary`: the stock formulary at ε = 8 beside none. Each of its facts is in five records, and a
site has 75: it is expected to fail, and its figures are printed whatever they are.

`wikidoc`: SmolLM2-135M-Instruct on WikiDoc's patient information at one site, ε = 4 beside none,
one seed: held-out loss by round. Minutes a round on a CPU; the same command continues.

What is done stands in `--out` or `--folder`, and is not done again. `--stop-after N` ends after N
units of work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formulary_runs import SETTING, mean_interval

from grandrounds.quiet import quiet_libraries

LEAST_KNOWN = {"8": 0.90, "4": 0.85, "1": 0.70}
"""Share of common facts known, at least, by target ε."""

MOST_ABOVE_CHANCE = 0.05
"""Share of rare facts extracted at ε = 1, at most, above that of patients not in the data."""

FORMULARY: dict[str, Any] = {
    **SETTING,
    "strategy.name": "ffa",
    "strategy.proximal-mu": 0.0,
    "train.training-arguments.max-grad-norm": 0.0,
}
"""The formulary's twenty sites, 4 a round; both arms train B alone."""

WIKIDOC: dict[str, Any] = {
    "model.name": "smollm2-135m-instruct",
    "model.lora.peft-lora-r": 2,
    "model.lora.peft-lora-alpha": 4,
    "model.lora.target-modules": "q_proj,v_proj",
    "num-server-rounds": 3,
    "data.partitioner": "iid",
    "data.num-partitions": 1,
    "data.held-out-fraction": 0.01,
    "data.prompt-template": "chat",
    "strategy.name": "ffa",
    "strategy.proximal-mu": 0.0,
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 1.0,
    "train.learning-rate-max": 2e-3,
    "train.learning-rate-min": 5e-4,
    "train.seq-length": 96,
    "train.training-arguments.max-steps": 4,
    "train.training-arguments.per-device-train-batch-size": 16,
    "train.training-arguments.gradient-accumulation-steps": 4,
    "train.training-arguments.max-grad-norm": 0.0,
}
"""One site; r = 2 and steps of 64: what matters is the noise to clip, sigma sqrt(d) / B."""

WIKIDOC_UNITS = 4700
"""Declared records of the site."""


class Kept:
    """Results by name in a JSON file, written after every unit of work."""

    def __init__(self, file: Path | None, stop_after: int | None) -> None:
        self._file, self._left = file, stop_after
        self.results: dict[str, Any] = {}
        if file and file.is_file():
            self.results = json.loads(file.read_text())

    def get(self, name: str, work: Any) -> Any:
        """Return a result, doing the work if it is missing."""
        if name not in self.results:
            if self._left == 0:
                sys.exit("stopped: the same command continues")
            started = time.perf_counter()
            self.results[name] = work()
            if self._left is not None:
                self._left -= 1
            print(f"done: {name}, {time.perf_counter() - started:.0f} s", flush=True)
            if self._file:
                self._file.write_text(json.dumps(self.results, indent=1))
        return self.results[name]


# --- Common and rare facts ------------------------------------------------------------------------


def common_and_rare(kept: Kept, seeds: int) -> bool:
    """Print the table over seeds; return whether every limit holds."""
    from dataclasses import asdict

    from grandrounds.study.demonstration.arms import ARMS
    from grandrounds.study.demonstration.exam import Answers, knowledge
    from grandrounds.study.demonstration.runner import Task, played

    def work(task: Task) -> dict[str, Any]:
        one = played(task)
        return {"answers": asdict(one.answers), "guarantee": dict(one.guarantee)}

    found: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in ARMS}
    for seed in range(seeds):
        base = kept.get(f"base {seed}", lambda s=seed: work(Task(None, s)))
        for arm in ARMS:
            one = kept.get(f"{arm.name} {seed}", lambda a=arm, s=seed: work(Task(a, s)))
            known = knowledge(Answers(**one["answers"]), Answers(**base["answers"]))
            found[arm.name].append({**known, "epsilon": one["guarantee"].get("reserved-epsilon")})
    held = [report_arm(name, of_arm) for name, of_arm in found.items()]
    return all(held)


def report_arm(name: str, found: Sequence[Mapping[str, Any]]) -> bool:
    """Print an arm over seeds, and whether its limits hold."""
    from grandrounds.study.audit.membership import auc_of_gaussian

    shares = [one["common-of-four"] for one in found]
    strict = [one["common-known"] / one["common-facts"] for one in found]
    rare, absent = (
        sum(one[kind]["matches"] for one in found) / sum(one[kind]["canaries"] for one in found)
        for kind in ("rare", "absent")
    )
    aucs = [one["membership"]["auc"] for one in found]
    auc, half = mean_interval(aucs)
    epsilon = found[0]["epsilon"]
    print(f"epsilon {f'{epsilon:.2f}' if epsilon else 'none'} (target {name}), {len(found)} seeds")
    known, strictly = (", ".join(f"{100 * share:.0f}" for share in of) for of in (shares, strict))
    print(f"  common facts, of 4    {100 * sum(shares) / len(shares):.1f} % (by seed {known})")
    print(f"  common facts, of 24   {100 * sum(strict) / len(strict):.1f} % (by seed {strictly})")
    print(f"  rare facts extracted  {100 * rare:.1f} %, chance {100 * absent:.1f} %")
    print(
        f"  AUC of membership     {auc:.3f} +- {half:.3f} ({', '.join(f'{a:.3f}' for a in aucs)})"
    )
    if not epsilon:
        return True
    allowed = auc_of_gaussian(epsilon, 1e-5)
    limits = [
        (
            f"common facts at least {100 * LEAST_KNOWN[name]:.0f} %",
            min(shares) >= LEAST_KNOWN[name],
        ),
        (f"AUC's lower limit at most {allowed:.3f}", not auc - half > allowed),
    ]
    if name == "1":
        limits.append(("extraction at most chance + 5 points", rare <= absent + MOST_ABOVE_CHANCE))
    for limit, holds in limits:
        print(f"  {'ok    ' if holds else 'MISSED'} {limit}")
    return all(holds for _, holds in limits)


# --- The formulary --------------------------------------------------------------------------------


def formulary(kept: Kept) -> None:
    """Print the private facts known at ε = 8 beside none."""
    from formulary_runs import play

    private = {"privacy.unit-guarantee": "example", "privacy.target-epsilon": 8.0}
    for name, own in (("none", {}), ("8", private)):
        one = kept.get(f"formulary {name}", lambda own=own: play({**FORMULARY, **own, "seed": 1}))
        print(
            f"formulary, epsilon {name}: private facts {one['private']:.1f} % "
            f"(base {one['private_base']:.1f} %), public facts {one['public']:.1f} %"
        )
    print("expected to fail at 8: five records a fact, 75 a site; that is what it hides")


# --- WikiDoc --------------------------------------------------------------------------------------


def wikidoc(data: Path, folder: Path) -> None:
    """Run ε = 4 and none, or go on with them; print the held-out loss by round."""
    private = {
        "privacy.unit-guarantee": "example",
        "privacy.target-epsilon": 4.0,
        "privacy.declared-units": WIKIDOC_UNITS,
    }
    for name, own in (("none", {}), ("4", private)):
        run = folder / f"wikidoc-{name}"
        if not (run / "summary.json").is_file() or not completed(run):
            settings = {**WIKIDOC, **own, "static.dataset.name": str(data), "seed": 1}
            pairs = [f"{key}={toml(value)}" for key, value in settings.items()]
            anew = [part for pair in pairs for part in ("--set", pair)] + ["--run-dir", str(run)]
            how = ["--resume", str(run)] if (run / "config.toml").is_file() else anew
            command = [sys.executable, "-m", "grandrounds", "run", "--plain", *how]
            subprocess.run(command, check=True)
        rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = ", ".join(f"{one['held-out-loss']:.4f}" for one in rounds)
        print(f"wikidoc, epsilon {name}: held-out loss by round {losses}")


def completed(run: Path) -> bool:
    """Whether a run has played all its rounds."""
    return bool(json.loads((run / "summary.json").read_text())["status"] == "completed")


def toml(value: Any) -> str:
    """Return a value as --set takes it."""
    return json.dumps(value) if isinstance(value, bool | int | float) else str(value)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("common-and-rare", "formulary", "wikidoc"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="WikiDoc's rows, columns input and output")
    parser.add_argument("--folder", type=Path, default=Path("private-utility"))
    parser.add_argument("--out", type=Path, help="results so far, as JSON")
    parser.add_argument("--stop-after", type=int, metavar="N")
    given = parser.parse_args()
    quiet_libraries()
    if given.part == "wikidoc":
        if given.data is None:
            parser.error("wikidoc needs --data FILE")
        wikidoc(given.data.absolute(), given.folder)
        return
    kept = Kept(given.out, given.stop_after)
    if given.part == "formulary":
        formulary(kept)
    elif not common_and_rare(kept, given.seeds):
        sys.exit(1)


if __name__ == "__main__":
    main()
