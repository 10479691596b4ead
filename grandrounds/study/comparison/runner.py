"""Runs a comparison unit by unit and rewrites comparison.json after each.

from grandrounds.study.comparison.runner import compare
compare(config, Design(arms=["federated", "local"], seeds=[42, 43]), out=Path("comparisons/a"))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grandrounds
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.words import command, counted
from grandrounds.errors import ConfigError, DataError
from grandrounds.server.directory import environment
from grandrounds.site.local_data import site_of
from grandrounds.site.visit import introduction
from grandrounds.study.comparison import budget
from grandrounds.study.comparison.arms import REPORTED, ROUNDS, examples_of_visits, run_unit
from grandrounds.study.comparison.exams import exams_of, pair_entries
from grandrounds.study.comparison.folder import RESULT, ComparisonFolder
from grandrounds.study.comparison.results import FORMAT, figures, results
from grandrounds.study.comparison.units import (
    BASE,
    BY_SITE,
    FEDERATED,
    LEAVE_ONE_OUT,
    LOCAL,
    PERSONAL,
    Design,
    Unit,
    check_equal_visits,
    check_leave_one_out,
    check_recipe,
)
from grandrounds.wire.names import NAME, names_of
from grandrounds.wire.told import SAME_IN_A_RUN

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with an event (planned, visited, finished) and its data."""


def compare(
    config: Config, design: Design, out: Path, listener: Listener = lambda *_: None
) -> dict[str, Any]:
    """Run the units of a comparison that are not finished yet; return comparison.json.

    Parameters
    ----------
    config : Config
        Of the federated arm.
    out : Path
        Folder of the comparison, new or to continue.

    Raises
    ------
    GrandRoundsError
        If an arm cannot be trained or evaluated, or the folder holds another comparison. Finished
        units are kept.
    """
    comparison = Comparison(config, design, out)
    folder, exams, found = comparison.folder, comparison.exams, comparison.found
    work = {unit: comparison.planned_work(unit) for unit in comparison.planned}
    listener(
        "planned",
        {
            "directory": str(folder.path),
            "units": len(work),
            "kept": len(found),
            "work": sum(size for unit, size in work.items() if unit not in found),
        },
    )
    content = comparison.write()
    for unit in [unit for unit in work if unit not in found]:
        made = run_unit(
            unit,
            comparison.recipe_of(unit),
            exams,
            folder.run_path(comparison.run_of(unit)),
            lambda count: listener("visited", {"count": count}),
        )
        folder.finish(unit, made)
        found[unit] = made
        content = comparison.write()
        own = (unit.site,) if unit.arm in BY_SITE and unit.site is not None else ()
        judged = {**figures(made, comparison.entries, *own), "seconds": made["seconds"]}
        listener("finished", {"unit": unit.title(comparison.names), "work": work[unit], **judged})
    return content


class Comparison:
    """A comparison in its folder: the planned units, and the results of the finished ones."""

    def __init__(self, config: Config, design: Design, out: Path) -> None:
        if not config.data.held_out_fraction:
            raise ConfigError(
                "data.held-out-fraction = 0 leaves no examples to evaluate the arms on: set a "
                "share, for example 0.05."
            )
        check_recipe(design.arms, config)
        if LEAVE_ONE_OUT in design.arms:
            check_leave_one_out(config)
        self.rounds = config.federation.num_server_rounds
        if design.equal_visits:
            check_equal_visits(design.arms)
            seeded = (recipes.resolve(config.flat(), {"seed": seed}) for seed in design.seeds)
            # cohorts differ by seed, and visits of whole epochs by site
            self.rounds = min(budget.rounds_before(one, examples_of_visits(one)) for one in seeded)
        self.config, self.design = config, design
        self.folder = ComparisonFolder.open(out, config)
        self.exams = exams_of(config, design)
        self.entries = {e.name: {**e.entry(), "site-of": e.site_of} for e in self.exams}
        self.sites = {str(seed): introductions(config, seed) for seed in design.seeds}
        if config.is_on_pairs:
            counts = [[int(c["held-out-examples"]) for c in of] for of in self.sites.values()]
            self.entries = pair_entries(counts) | self.entries
        self.called = [
            {NAME: name} if (name := site_of(config, k).name) else {}
            for k in range(config.data.num_partitions)
        ]
        self.names = names_of({"partition-id": k, **c} for k, c in enumerate(self.called))
        self.planned = list(design.units(config.data.num_partitions))
        part = REPORTED if config.is_personal and len(config.weights) > 1 else None
        self.found = {
            unit: made
            for unit, made in self.folder.finished(self.planned).items()
            # An earlier version rounded the visits of a site alone to whole steps.
            if (unit.arm != LOCAL or made["example-visits"] == planned_visits(unit, config))
            and made.get("held-out-part") == part
            and made.get(ROUNDS, config.federation.num_server_rounds) == self.rounds_of(unit)
        }
        asked = {exam.name: exam.fingerprint() for exam in self.exams}
        self.folder.begin(config)
        self.folder.check_same("sites.json", self.sites, "seed")
        self.folder.check_same("exams.json", {"asked": asked}, "exams")
        self.environment = environment()
        self.folder.write_json("environment.json", self.environment)

    def rounds_of(self, unit: Unit) -> int:
        """Return the rounds of a unit's federation: before `personal`, fewer with equal visits."""
        return self.rounds if unit.arm == PERSONAL else self.config.federation.num_server_rounds

    def recipe_of(self, unit: Unit) -> Config:
        """Return the configuration of a unit, but for its seed."""
        if (rounds := self.rounds_of(unit)) == self.config.federation.num_server_rounds:
            return self.config
        return recipes.resolve(self.config.flat(), {"num-server-rounds": rounds})

    def run_of(self, unit: Unit) -> Unit:
        """Return the unit whose run directory a unit uses.

        Personal adapters follow the run of `federated`, unless what stays at the sites is trained
        in the rounds, or there are fewer rounds: then one of their own, for all sites of a seed.
        """
        if unit.arm != PERSONAL:
            return unit
        if self.rounds_of(unit) != self.config.federation.num_server_rounds:
            return Unit(f"{PERSONAL}-{self.rounds}-rounds", unit.seed)
        return Unit(PERSONAL if self.config.keeps_a_part else FEDERATED, unit.seed)

    def planned_work(self, unit: Unit) -> float:
        """Return the cost of a unit in example visits; an example or question judged costs half.

        The half was measured on the embedded base, and is good enough to estimate the time left.
        """
        config = recipes.resolve(self.recipe_of(unit).flat(), {"seed": unit.seed})
        sites = [site_of(config, k) for k in range(config.data.num_partitions)]
        judged = sum(len(exam.items) for exam in self.exams) + sum(len(s.held_out) for s in sites)
        run, visits = self.run_of(unit), planned_visits(unit, config)
        if unit.arm == PERSONAL and unit.site == 0 and run.arm != FEDERATED:
            visits += planned_visits(Unit(FEDERATED, unit.seed), config)
        return visits + judged / 2

    def write(self) -> dict[str, Any]:
        """Write comparison.json as far as there are results, and return it."""
        done, planned, first = len(self.found), len(self.planned), next(iter(self.sites.values()))
        content = {
            "format": FORMAT,
            "version": grandrounds.__version__,
            "status": "complete" if done == planned else "unfinished",
            "units": {"done": done, "planned": planned},
            "seconds": sum(made["seconds"] for made in self.found.values()),
            "command": self.command(),
            "arms-asked": list(self.design.arms),
            "seeds": list(self.design.seeds),
            "config": self.config.recipe(),
            "environment": self.environment,
            "budget": {
                **budget.entry(self.config, examples_of_visits(self.config)),
                **({"personal-rounds": self.rounds} if self.design.equal_visits else {}),
            },
            "sites": [
                {
                    "site": k,
                    **self.called[k],
                    **{
                        name: {seed: int(cards[k][name]) for seed, cards in self.sites.items()}
                        for name in ("train-examples", "held-out-examples")
                    },
                }
                for k in range(len(first))
            ],
            "exams": {
                name: {key: value for key, value in entry.items() if key != "site-of"}
                for name, entry in self.entries.items()
            },
            **results(self.found, self.entries),
        }
        self.folder.write_json(RESULT, content)
        return content

    def command(self) -> str:
        """Return the command that continues this comparison, or repeats it in another folder."""
        path, options = self.folder.path, self.design.options()
        recipe = path / "config.toml"
        return command("grandrounds", "compare", "--config", recipe, *options, "--out", path)


def introductions(config: Config, seed: int) -> list[dict[str, Any]]:
    """Return what every site holds under a seed.

    Raises
    ------
    DataError
        If a site has no held-out examples; all such sites are named.
    """
    seeded = recipes.resolve(config.flat(), {"seed": seed})
    cards = [introduction(site_of(seeded, k), seeded) for k in range(config.data.num_partitions)]
    small = [card for card in cards if not int(card["held-out-examples"])]
    if small:
        first = small[0]
        names = names_of(cards)
        named = names.listed(int(card["partition-id"]) for card in small[:10])
        usable = counted(int(first["train-examples"]), "usable example")
        more = f" and {len(small) - 10} more" if len(small) > 10 else ""
        raise DataError(
            f"With seed {seed}, {len(small)} of {len(cards)} sites have too few examples for a "
            f"held-out part ({named}{more}): a site needs at least 2 different questions, one "
            "for training and one for evaluation, after duplicates and empty rows are removed. "
            f"{names[int(first['partition-id'])]}: {usable} of {first['rows']} rows. Lower "
            "data.num-partitions, choose another data.partitioner, raise data.dirichlet-alpha or "
            "train.seq-length, or leave such sites out of the data."
            + " A private recipe holds out each unit by a coin of its own: raise "
            "data.held-out-fraction." * config.is_private
        )
    return [
        {"site": k, **{name: card[name] for name in SAME_IN_A_RUN}} for k, card in enumerate(cards)
    ]


def planned_visits(unit: Unit, config: Config) -> int:
    """Return the example visits of a unit if no reply fails."""
    seeded = recipes.resolve(config.flat(), {"seed": unit.seed})
    each = examples_of_visits(seeded)
    if unit.arm == LOCAL:
        return budget.local_examples(seeded, each)[unit.site or 0]
    if unit.arm == PERSONAL:  # the federation before it is that of its own arm
        return config.personalisation.steps * config.examples_per_step
    return 0 if unit.arm == BASE else sum(n for _, n in budget.pooled_visits(seeded, each))


def default_folder(config: Config) -> Path:
    """Return `comparisons/<date>-<time>-<model>` below the current folder."""
    model = config.model.name.rstrip("/").rpartition("/")[2]
    return Path("comparisons") / f"{time.strftime('%Y%m%d-%H%M%S')}-{model}"
