"""A real language model on real data: what federated tuning gains, and what it costs.

    grandrounds base fetch smollm2-135m-instruct
    python benchmarks/real_model.py --data ../shared/data --folder real-model --out real_model.json

`--data` is a folder with `train/wikidoc_patient_information.jsonl.gz` (columns `input`, `output`)
and `eval/` with medmcqa and pubmedqa. Parts:

    wikidoc     held-out loss of the base, the federation, training on the pooled data and each site
                alone: 20 sites, 3 a round, 6 steps of 16, 256 tokens, LoRA r = 16 on q_proj, v_proj
    benchmarks  MedMCQA and PubMedQA by likelihood, base and federated model of the first seed. A
                model of 135 M parameters is expected at chance (25 % and the largest class)
    formulary   the private facts of twenty sites taught to the same base
    forgetting  the same benchmarks and WikiDoc's held-out loss after the formulary

It takes hours on a CPU. Everything finished is kept in `--folder`; the same command continues.
`--stop-after N` ends after N units of work, for a machine that is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grandrounds.cli.screen import Screen, say
from grandrounds.config.bases import REAL_BASE, find_base
from grandrounds.quiet import quiet_libraries

PARTS = ("wikidoc", "benchmarks", "formulary", "forgetting")
BENCHMARKS = ("medmcqa", "pubmedqa")
WIKIDOC = Path("train", "wikidoc_patient_information.jsonl.gz")

SETTING: dict[str, Any] = {
    "model.lora.peft-lora-r": 16,
    "model.lora.peft-lora-alpha": 32,
    "model.lora.target-modules": "q_proj,v_proj",
    "train.learning-rate-max": 1e-3,
    "train.learning-rate-min": 1e-4,
    "train.seq-length": 256,
    "train.training-arguments.max-steps": 6,
    "train.training-arguments.per-device-train-batch-size": 16,
    "train.training-arguments.bf16": False,
    "train.save-every-round": 5,
    "strategy.name": "fedavg",
    "strategy.proximal-mu": 0.0,
    "strategy.cohorts": "balanced",
    "data.prompt-template": "chat",
}

FORMULARY: dict[str, Any] = {
    "static.dataset.name": "formulary",
    "data.partitioner": "natural",
    "data.partition-by": "site",
    "data.num-partitions": 20,
    "strategy.fraction-train": 0.2,
}


class Enough(Exception):  # noqa: N818 - no error
    """As many units of work are done as were asked for."""


class Counter:
    """Counts finished units of work; raises `Enough` at the last one."""

    def __init__(self, most: int | None) -> None:
        self._left = most
        self._started = time.perf_counter()

    def done(self, what: str) -> None:
        """Count one unit and say so."""
        seconds = time.perf_counter() - self._started
        self._started = time.perf_counter()
        say(f"done: {what}, {seconds:,.0f} s")
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                raise Enough

    def listen(self, event: str, facts: Mapping[str, Any]) -> None:
        """Listen to a comparison."""
        if event == "finished":
            self.done(facts["unit"])


def config_of(given: argparse.Namespace, part: str) -> Any:
    """Return the configuration of a part's federation."""
    from grandrounds.config import recipes

    own = {
        "static.dataset.name": str(given.data / WIKIDOC),
        "data.partitioner": "iid",
        "data.num-partitions": given.sites,
        "strategy.fraction-train": min(3, given.sites) / given.sites,
        "strategy.fraction-evaluate": min(3, given.sites) / given.sites,
        "num-server-rounds": given.rounds,
    }
    if part == "formulary":
        own |= {**FORMULARY, "num-server-rounds": given.formulary_rounds}
    settings = {**SETTING, **own, "model.name": given.model, "seed": given.seeds[0]}
    settings |= {"data.prompt-template": given.template}
    return recipes.with_absolute_paths(recipes.resolve(settings))


def compared(given: argparse.Namespace, part: str, arms: tuple[str, ...], counter: Counter) -> Any:
    """Return a comparison, continuing it where it was left."""
    from grandrounds.study.comparison.runner import compare
    from grandrounds.study.comparison.units import Design

    seeds = given.seeds if part == "wikidoc" else given.seeds[:1]
    folder = given.folder / part
    return compare(config_of(given, part), Design(arms, seeds), folder, counter.listen)


def run_of(given: argparse.Namespace, part: str) -> Path:
    """Return the run directory of a part's federation with the first seed."""
    return Path(given.folder, part, "runs", "federated", f"seed-{given.seeds[0]}")


def benchmarked(given: argparse.Namespace, part: str, counter: Counter) -> Any:
    """Return the evaluation of the base and of a federation's last adapter."""
    from grandrounds.study.evaluation.benchmarks import load_questions
    from grandrounds.study.evaluation.runner import evaluate
    from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, find_target

    run = run_of(given, part)
    summary = json.loads((run / "summary.json").read_text())
    questions = load_questions(BENCHMARKS, given.data / "eval", given.limit)
    out = given.folder / f"{part}-evaluation"
    file = out / "evaluation.json"
    if file.is_file():
        return json.loads(file.read_text())
    target = find_target(str(run / summary["adapter"]), base=given.model)
    tasks = EvaluationTasks(target, questions, Method(permutations=0), out)

    def listen(event: str, facts: Mapping[str, Any]) -> None:
        if event == "asked":
            say(f"{facts['model']}, {facts['benchmark']}: {facts['asked']} asked")

    content = evaluate(tasks, resume=out.is_dir(), listener=listen)
    counter.done(f"MedMCQA and PubMedQA after {part}")
    return content


def forgotten(given: argparse.Namespace, counter: Counter) -> dict[str, float]:
    """Return WikiDoc's held-out loss, in nats a token, of the base and after the formulary."""
    from safetensors.numpy import load_file

    from grandrounds.model import machine
    from grandrounds.model.resident import set_adapter
    from grandrounds.study.comparison.arms import judge
    from grandrounds.wire.adapter import assemble, drawn_adapter

    file = given.folder / "forgetting.json"
    if file.is_file():
        found: dict[str, float] = json.loads(file.read_text())
        return found
    config = config_of(given, "wikidoc")
    resident = machine.prepare_model(config)
    shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    run = run_of(given, "formulary")
    folder = run / json.loads((run / "summary.json").read_text())["adapter"]
    tuned = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, adapter in (
        ("base", drawn_adapter(shapes, config.federation.seed)),
        ("after the formulary", assemble(shapes, (tuned, 0))),
    ):
        set_adapter(resident, adapter)
        sites = judge(resident, config, ())["held-out"].values()
        found[name] = sum(s["nll-sum"] for s in sites) / sum(s["tokens"] for s in sites)
    file.write_text(json.dumps(found, indent=2) + "\n")
    counter.done("WikiDoc after the formulary")
    return found


# --- Tables ---------------------------------------------------------------------------------------


def show_comparison(content: Any, screen: Screen) -> None:
    """Print arms, gains and notes of a comparison."""
    from grandrounds.study.comparison.tables import notes, tables

    for table in tables(content)[:2]:
        screen.table(table.title, table.columns, table.rows)
    screen.notes(notes(content))


def show_rounds(run: Path, screen: Screen) -> None:
    """Print held-out loss and seconds of each round."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [
        (str(line["round"]), f"{line['held-out-loss']:.3f}", f"{line.get('seconds', 0):.0f}")
        for line in lines
        if "held-out-loss" in line
    ]
    screen.table("rounds", ("round", "held-out loss", "seconds"), rows)


def show_evaluation(content: Any, screen: Screen) -> None:
    """Print accuracies with their intervals."""
    from grandrounds.study.evaluation.tables import tables

    table = tables(content)[0]
    screen.table(table.title, table.columns, table.rows)
    chance = "guessing reaches 25 % in MedMCQA, and the share of the commonest answer in PubMedQA"
    screen.notes(["Wilson intervals, 95 %; vs base: Newcombe's, p by McNemar's test", chance])


def work(given: argparse.Namespace, result: dict[str, Any], screen: Screen) -> None:
    """Do the parts that were asked for, and fill the result."""
    counter = Counter(given.stop_after)
    if "wikidoc" in given.parts:
        arms = tuple(arm for arm in ("federated", "centralised", "local") if arm in given.arms)
        result["wikidoc"] = compared(given, "wikidoc", arms, counter)
        show_rounds(run_of(given, "wikidoc"), screen)
        show_comparison(result["wikidoc"], screen)
    if "benchmarks" in given.parts:
        result["benchmarks"] = benchmarked(given, "wikidoc", counter)
        show_evaluation(result["benchmarks"], screen)
    if "formulary" in given.parts:
        result["formulary"] = compared(given, "formulary", ("federated",), counter)
        show_rounds(run_of(given, "formulary"), screen)
        show_comparison(result["formulary"], screen)
    if "forgetting" in given.parts:
        result["forgetting-benchmarks"] = benchmarked(given, "formulary", counter)
        show_evaluation(result["forgetting-benchmarks"], screen)
        result["forgetting"] = forgotten(given, counter)
        rows = [(name, f"{loss:.3f}") for name, loss in result["forgetting"].items()]
        screen.table("WikiDoc, held-out loss in nats a token", ("model", "loss"), rows)


def main() -> None:
    """Work; print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("real-model"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arms", nargs="+", default=["federated", "centralised", "local"])
    parser.add_argument("--model", default=REAL_BASE)
    parser.add_argument("--template", default="chat", help="prompt template of the training")
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--formulary-rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--limit", type=int, default=300, help="items of each benchmark")
    parser.add_argument("--stop-after", type=int, default=None, help="units of work, then stop")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    find_base(given.model)
    quiet_libraries()
    given.folder, given.data = given.folder.absolute(), given.data.absolute()
    result: dict[str, Any] = {}
    try:
        work(given, result, Screen(plain=True))
    except Enough:
        say(f"stopped as asked; the same command continues in {given.folder}")
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
