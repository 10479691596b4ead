"""Runs a comparison unit by unit, and writes down what came out after each.

from grandrounds.comparison_runner import compare
compare(config, arms=["federated", "local"], seeds=[42, 43], ...)
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grandrounds
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.errors import ConfigError, DataError
from grandrounds.server.directory import environment
from grandrounds.server.roll_call import SAME_IN_A_RUN
from grandrounds.site.visit import introduction
from grandrounds.study.comparison.arms import cohort_of, run_unit, site_of, visit_examples
from grandrounds.study.comparison.exams import Exam, exams_of
from grandrounds.study.comparison.folder import RESULT, ComparisonFolder
from grandrounds.study.comparison.results import Exams, figures, results
from grandrounds.study.comparison.units import (
    BASE,
    LEAVE_ONE_OUT,
    LOCAL,
    Unit,
    check_leave_one_out,
    local_visits,
    units,
    visits_of_a_site,
)

FORMAT = 1

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with (event, facts): planned, visited, finished."""


def compare(
    config: Config,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    left_out: Sequence[int],
    out: Path,
    benchmarks: Sequence[str] = (),
    benchmark_data: Path | None = None,
    limit: int | None = None,
    listener: Listener = lambda *_: None,
) -> dict[str, Any]:
    """Do what is missing of a comparison; return comparison.json.

    Parameters
    ----------
    config : Config
        Of the federated arm.
    arms, seeds
        As checked by `comparison.check_arms` and `check_seeds`.
    left_out : sequence of int
        Sites of `leave-one-out`, one at a time.
    out : Path
        The folder.
    benchmarks, benchmark_data, limit
        Exams besides the formulary's; see `evaluation.benchmarks.load_items`.

    Raises
    ------
    GrandRoundsError
        If an arm cannot be trained or judged, or the folder holds another comparison. Finished
        units are kept.
    """
    check_judged(config)
    if LEAVE_ONE_OUT in arms:
        check_leave_one_out(config)
    folder = ComparisonFolder.open(out, config)
    exams = exams_of(config, benchmarks, benchmark_data, limit)
    sites = {str(seed): introductions(config, seed) for seed in seeds}
    folder.begin(config)
    folder.check_same("sites.json", sites, "seed")
    folder.check_same("exams.json", {"asked": {e.name: e.fingerprint() for e in exams}}, "exams")
    folder.write_json("environment.json", environment())
    planned = list(units(arms, seeds, config.data.num_partitions, left_out))
    found = folder.finished(planned)
    sizes = {unit: planned_work(unit, config, exams) for unit in planned}
    asked: dict[str, Any] = {
        "arms": arms,
        "seeds": seeds,
        "left-out": left_out,
        "benchmarks": benchmarks,
    }
    asked |= {"benchmark-data": benchmark_data, "limit": limit}
    listener(
        "planned",
        {
            "directory": str(folder.path),
            "units": len(planned),
            "kept": len(found),
            "work": sum(size for unit, size in sizes.items() if unit not in found),
        },
    )
    content = content_of(folder, config, asked, planned, exams, sites, found)
    folder.write_json(RESULT, content)
    for unit in planned:
        if unit in found:
            continue
        made = run_unit(
            unit,
            config,
            exams,
            folder.run_path(unit),
            lambda count: listener("visited", {"count": count}),
        )
        folder.finish(unit, made)
        found[unit] = made
        content = content_of(folder, config, asked, planned, exams, sites, found)
        folder.write_json(RESULT, content)
        own = (unit.site,) if unit.arm == LOCAL and unit.site is not None else ()
        judged = {**figures(made, exam_facts(exams), *own), "seconds": made["seconds"]}
        listener("finished", {"unit": unit.title, "work": sizes[unit], **judged})
    return content


def check_judged(config: Config) -> None:
    """Raise `ConfigError` if no site holds anything out."""
    if not config.data.held_out_fraction:
        raise ConfigError(
            "data.held-out-fraction = 0 leaves nothing to judge the arms on: set a share, for "
            "example 0.05."
        )


def introductions(config: Config, seed: int) -> list[dict[str, Any]]:
    """Return what every site holds under a seed.

    Raises
    ------
    DataError
        If a site has nothing held out; all such sites are named.
    """
    seeded = recipes.resolve(config.flat(), {"seed": seed})
    cards = [introduction(site_of(seeded, k), seeded) for k in range(config.data.num_partitions)]
    small = [card for card in cards if not int(card["held-out-examples"])]
    if small:
        first = small[0]
        named = ", ".join(str(card["partition-id"]) for card in small[:10])
        more = f" and {len(small) - 10} more" if len(small) > 10 else ""
        raise DataError(
            f"With seed {seed}, {len(small)} of {len(cards)} sites have too few examples for a "
            f"held-out part (site {named}{more}): a site needs at least 2 different questions, one "
            "to train on and one to judge by, after duplicates and empty rows are left out. Site "
            f"{first['partition-id']} has {first['train-examples']} usable example(s) of "
            f"{first['rows']} rows. Lower data.num-partitions, choose another data.partitioner, "
            "raise data.dirichlet-alpha or train.seq-length, or leave such sites out of the data."
        )
    return [
        {"site": k, **{name: card[name] for name in SAME_IN_A_RUN}} for k, card in enumerate(cards)
    ]


def planned_work(unit: Unit, config: Config, exams: Sequence[Exam]) -> float:
    """Return what a unit costs, in example visits: a question, or a held-out example, is half one.

    Measured on the embedded base; good enough for the time that is left.
    """
    seeded = recipes.resolve(config.flat(), {"seed": unit.seed})
    sites = [site_of(seeded, k) for k in range(config.data.num_partitions)]
    each = [visit_examples(seeded, len(site.train)) for site in sites]
    judged = sum(len(exam.items) for exam in exams) + sum(len(site.held_out) for site in sites)
    made = 0
    if unit.arm == LOCAL:
        made = sum(count for _, count in local_visits(seeded, each[unit.site or 0]))
    elif unit.arm != BASE:
        rounds = range(1, config.federation.num_server_rounds + 1)
        made = sum(each[k] for number in rounds for k in cohort_of(seeded, number))
    return made + judged / 2


def content_of(
    folder: ComparisonFolder,
    config: Config,
    asked: Mapping[str, Any],
    planned: Sequence[Unit],
    exams: Sequence[Exam],
    sites: Mapping[str, Sequence[Mapping[str, Any]]],
    found: Mapping[Unit, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return comparison.json as far as it goes."""
    first = next(iter(sites.values()))
    return {
        "format": FORMAT,
        "version": grandrounds.__version__,
        "status": "complete" if len(found) == len(planned) else "unfinished",
        "units": {"done": len(found), "planned": len(planned)},
        "seconds": sum(made["seconds"] for made in found.values()),
        "command": command_of(folder, asked),
        "arms-asked": list(asked["arms"]),
        "seeds": list(asked["seeds"]),
        "config": config.recipe(),
        "environment": folder.read_json("environment.json"),
        "budget": budget(config, int(first[0]["train-examples"])),
        "sites": [
            {
                "site": k,
                **{
                    name: {seed: int(cards[k][name]) for seed, cards in sites.items()}
                    for name in ("train-examples", "held-out-examples")
                },
            }
            for k in range(len(first))
        ],
        "exams": {exam.name: exam.facts() for exam in exams},
        **results(found, exam_facts(exams)),
    }


def exam_facts(exams: Sequence[Exam]) -> Exams:
    """Return the exams as `comparison_results` takes them."""
    return {exam.name: {**exam.facts(), "site-of": exam.site_of} for exam in exams}


def budget(config: Config, train_examples: int) -> dict[str, Any]:
    """Return how many visits are made, and at which learning rates a site alone makes its own."""
    rounds, cohort = config.federation.num_server_rounds, config.cohort_size
    return {
        "rounds": rounds,
        "cohort": cohort,
        "sites": config.data.num_partitions,
        "site-visits": rounds * cohort,
        "local-visits": visits_of_a_site(config),
        "local-rounds": [
            number for number, _ in local_visits(config, visit_examples(config, train_examples))
        ],
    }


def command_of(folder: ComparisonFolder, asked: Mapping[str, Any]) -> str:
    """Return the command that goes on with a comparison, or repeats it in another folder."""
    words = ["grandrounds", "compare", "--config", str(folder.path / "config.toml")]
    words += ["--arms", ",".join(asked["arms"]), "--seeds", str(len(asked["seeds"]))]
    if LEAVE_ONE_OUT in asked["arms"]:
        words += ["--sites", ",".join(map(str, asked["left-out"]))]
    if asked["benchmarks"]:
        words += ["--benchmarks", ",".join(asked["benchmarks"])]
        for option in ("benchmark-data", "limit"):
            words += [f"--{option}", str(asked[option])] if asked[option] else []
    return shlex.join([*words, "--out", str(folder.path)])


def default_folder(config: Config) -> Path:
    """Return `comparisons/<date>-<time>-<model>` below the current folder."""
    model = config.model.name.rstrip("/").rpartition("/")[2]
    return Path("comparisons") / f"{time.strftime('%Y%m%d-%H%M%S')}-{model}"
