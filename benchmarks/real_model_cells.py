"""The cells of real_model.py: what decides them, their order, their work; no script by itself."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

PARTS = ("wikidoc", "benchmarks", "formulary", "forgetting")
ARMS = ("federated", "centralised", "local")
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
}

FORMULARY: dict[str, Any] = {
    "static.dataset.name": "formulary",
    "data.partitioner": "natural",
    "data.partition-by": "site",
    "data.num-partitions": 20,
    "strategy.fraction-train": 0.2,
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What decides the figures; the first line of the file, the same in every call."""

    model: str
    dtype: str
    template: str
    sites: int
    rounds: int
    formulary_rounds: int
    seeds: tuple[int, ...]
    limit: int
    """Items of each benchmark."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One piece of work: an arm of a part, or what is asked of a federation's last adapter."""

    part: str
    what: str
    """An arm; `plan` of a part's comparison; `benchmarks` or `loss` after a part's federation."""
    seed: int
    site: int | None = None

    @property
    def name(self) -> str:
        """Its name in messages: `wikidoc local, seed 42, site 3`."""
        site = "" if self.site is None else f", site {self.site}"
        return f"{self.part} {self.what}, seed {self.seed}{site}"

    @property
    def needs(self) -> Cell | None:
        """The federation whose adapter it is about."""
        after = self.what in ("benchmarks", "loss")
        return Cell(self.part, "federated", self.seed) if after else None


def cells(setup: Setup, parts: list[str], arms: list[str]) -> list[Cell]:
    """Return the cells of some parts, the most telling ones first."""
    first, *others = setup.seeds
    trained = [arm for arm in ARMS if arm in arms and arm != "local"]
    made: list[Cell] = []
    if "formulary" in parts:
        made += [Cell("formulary", what, first) for what in ("plan", "federated")]
    if "wikidoc" in parts:
        made += [Cell("wikidoc", what, first) for what in ("plan", *trained, "base")]
    if "benchmarks" in parts:
        made.append(Cell("wikidoc", "benchmarks", first))
    if "formulary" in parts:
        made.append(Cell("formulary", "base", first))
    if "wikidoc" in parts:
        made += [Cell("wikidoc", what, seed) for seed in others for what in (*trained, "base")]
    if "forgetting" in parts:
        made += [Cell("formulary", what, first) for what in ("loss", "benchmarks")]
    if "wikidoc" in parts and "local" in arms:
        each = [(seed, site) for seed in setup.seeds for site in range(setup.sites)]
        made += [Cell("wikidoc", "local", seed, site) for seed, site in each]
    return made


@dataclasses.dataclass(frozen=True)
class Desk:
    """Where a process works, and on what."""

    setup: Setup
    data: Path
    folder: Path

    def config(self, part: str) -> Any:
        """Return the configuration of a part's federation."""
        from grandrounds.config import recipes

        setup = self.setup
        share = min(3, setup.sites) / setup.sites
        own = {
            "static.dataset.name": str(self.data / WIKIDOC),
            "data.partitioner": "iid",
            "data.num-partitions": setup.sites,
            "strategy.fraction-train": share,
            "strategy.fraction-evaluate": share,
            "num-server-rounds": setup.rounds,
        }
        if part == "formulary":
            own |= {**FORMULARY, "num-server-rounds": setup.formulary_rounds}
        settings = {**SETTING, **own, "model.name": setup.model, "model.dtype": setup.dtype}
        settings |= {"seed": setup.seeds[0], "data.prompt-template": setup.template}
        return recipes.with_absolute_paths(recipes.resolve(settings))

    def run(self, cell: Cell) -> Path:
        """Return the run directory of a federation."""
        return self.folder / cell.part / f"seed-{cell.seed}"

    def adapter(self, cell: Cell) -> Path:
        """Return the last adapter of a federation."""
        run = self.run(cell)
        return run / str(json.loads((run / "summary.json").read_text())["adapter"])

    def play(self, cell: Cell) -> dict[str, Any]:
        """Do a cell's work; return what is written down."""
        if cell.what == "plan":
            return self.plan(cell)
        if cell.what == "benchmarks":
            return self.benchmarked(cell)
        if cell.what == "loss":
            return {"held-out": self.forgotten(cell)}
        return self.unit(cell)

    def plan(self, cell: Cell) -> dict[str, Any]:
        """Return what a comparison records before its first unit."""
        from grandrounds.study.comparison.runner import Comparison

        plan = Comparison(
            self.config(cell.part), self.design(cell), self.folder / "plans" / cell.part
        )
        return {"content": plan.write(), "entries": plan.entries}

    def design(self, cell: Cell) -> Any:
        """Return the comparison that a cell belongs to."""
        from grandrounds.study.comparison.units import Design

        seeds = self.setup.seeds if cell.part == "wikidoc" else self.setup.seeds[:1]
        return Design(ARMS if cell.part == "wikidoc" else ("federated",), seeds)

    def unit(self, cell: Cell) -> dict[str, Any]:
        """Train and evaluate an arm; a federation that was stopped is resumed."""
        from grandrounds.study.comparison.arms import run_unit
        from grandrounds.study.comparison.units import Unit

        unit, run = Unit(cell.what, cell.seed, cell.site), self.run(cell)
        exams = exams_of_part(self, cell.part)
        found = run_unit(unit, self.config(cell.part), exams, run, lambda count: None)
        if cell.what == "federated":
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            keys = ("round", "held-out-loss", "seconds")
            found["rounds"] = [{key: line.get(key) for key in keys} for line in lines]
        return found

    def benchmarked(self, cell: Cell) -> dict[str, Any]:
        """Return the evaluation of the base and of a federation's last adapter."""
        from grandrounds.study.evaluation.benchmarks import load_questions
        from grandrounds.study.evaluation.runner import evaluate
        from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, find_target

        questions = load_questions(BENCHMARKS, self.data / "eval", self.setup.limit)
        target = find_target(str(self.adapter(cell)), base=self.setup.model)
        out = self.folder / f"{cell.part}-evaluation"
        tasks = EvaluationTasks(target, questions, Method(permutations=0), out)
        return evaluate(tasks, resume=out.is_dir())

    def forgotten(self, cell: Cell) -> dict[str, Any]:
        """Return WikiDoc's held-out loss after another federation, as `run_unit` returns it."""
        from safetensors.numpy import load_file

        from grandrounds.model import machine
        from grandrounds.model.resident import set_adapter
        from grandrounds.site.local_data import site_of
        from grandrounds.study.comparison.arms import judge
        from grandrounds.wire.adapter import assemble

        config = self.config("wikidoc")
        resident = machine.prepare_model(config)
        shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
        tuned = load_file(self.adapter(cell) / "adapter_model.safetensors")
        set_adapter(resident, assemble(shapes, (tuned, 0)))
        sites = [site_of(config, k) for k in range(config.data.num_partitions)]
        found: dict[str, Any] = judge(resident, config, sites, ())["held-out"]
        return found


@cache
def exams_of_part(desk: Desk, part: str) -> Any:
    """Return the exams of a part: private facts for the formulary."""
    from grandrounds.study.comparison.exams import exams_of
    from grandrounds.study.comparison.units import Design

    return exams_of(desk.config(part), Design((), desk.setup.seeds))


def machine_of(desk: Desk) -> dict[str, Any]:
    """Return device, number formats and versions of this process."""
    import torch

    from grandrounds.model import machine
    from grandrounds.server.directory import cpu_name, environment

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "precision": machine.precision(desk.config("wikidoc")),
        "threads": torch.get_num_threads(),
        "packages": environment()["packages"],
    }
