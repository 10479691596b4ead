"""The Python API: what the commands do, as functions that return objects.

    import grandrounds as gr

    run = gr.run("smollm2-135m-instruct", data="cards.jsonl", sites=4, rounds=10)
    run.summary["held_out_loss"]
    gr.evaluate(run, benchmarks=["held-out"])
    gr.report(run)

Importing it loads neither PyTorch nor Flower; a call loads what it needs. Expected failures are
`grandrounds.errors.GrandRoundsError`. Results show themselves as tables in a notebook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from grandrounds.api import played
from grandrounds.api.asked import Asked, asked_for, check_options, resolved_run
from grandrounds.api.results import Comparison, Evaluation, Filed, Plan, Run
from grandrounds.config.bases import find_base
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError
from grandrounds.server.listeners import Listener

__all__ = [
    *("Asked", "Comparison", "Evaluation", "Filed", "Plan", "Run"),
    *("compare", "dossier", "evaluate", "open_run", "plan", "recipe", "report", "run"),
]

Settings = Mapping[str, Scalar]
"""Configuration keys and values, as in `--set`."""


def recipe(
    source: str | Path | Asked | None = None, settings: Settings | None = None, **options: Any
) -> Asked:
    """Return a resolved recipe, checked as a run would check it.

    Parameters
    ----------
    source
        A packaged recipe's name, a .toml file, the pyproject.toml of a FlowerTune entry, or a
        recipe to be changed; None: the packaged defaults, which are the embedded run.
    settings
        Configuration keys, which override the recipe.
    options
        `model`, `data`, `rounds`, `sites`, `sites_per_round`, `seed` and `from_adapter`, as the
        command's options; they override `settings`.

    Raises
    ------
    ConfigError
        If a key, value or option is not allowed; all problems are told at once.
    """
    check_options(options)
    return asked_for(source, settings, **options)


def run(
    source: str | Path | Asked | None = None,
    settings: Settings | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: str | Path | Run | None = None,
    from_round: int | None = None,
    engine: Literal["in-process", "simulation"] = "in-process",
    client_cpus: int | None = None,
    client_gpus: float | None = None,
    progress: bool | Listener = True,
    **options: Any,
) -> Run:
    """Train one adapter across all sites; see `recipe` for the first two and the other options.

    Parameters
    ----------
    run_dir
        Run directory; default: `runs/<date>-<time>-<model>`.
    resume
        A run, or its directory, to go on from its last finished round, or from `from_round`.
    engine
        Sites one after another in this process, or Flower's simulation on Ray, where a site has
        `client_cpus` and `client_gpus`. Real sites are for the command line.
    progress
        Whether notes and a line per round are printed; or a listener of the run's events.

    Raises
    ------
    GrandRoundsError
        If the configuration, data or base cannot be used, or a round fails; finished rounds are
        kept.
    """
    check_options(options)
    if engine not in ("in-process", "simulation"):
        raise ConfigError(f"engine = {engine!r} must be 'in-process' or 'simulation'.")
    if engine == "in-process" and (client_cpus is not None or client_gpus is not None):
        raise ConfigError("client_cpus and client_gpus belong to engine = 'simulation'.")
    if client_cpus is not None and client_cpus < 1:
        raise ConfigError(f"client_cpus = {client_cpus} must be at least 1.")
    if client_gpus is not None and not 0 <= client_gpus < math.inf:
        raise ConfigError(f"client_gpus = {client_gpus} must be at least 0.")
    place = None if resume is None else _place(resume)
    if run_dir is not None:
        options["run_dir"] = str(_place(run_dir))
    if place is None:
        if from_round is not None:
            raise ConfigError("from_round belongs to resume, the run that goes back.")
        asked = asked_for(source, settings, **options)
        config, notes = asked.config, asked.all_notes()
    else:
        config, notes = resolved_run(source, settings, place, from_round, options), []
    config = played.with_place(config)
    warnings = played.checked(config, from_round)
    if resume is not None and (engine == played.SIMULATION or from_round is not None):
        from grandrounds.server import resumption

        resumption.prepare(config, from_round)
    if resume is None:
        config = played.with_day(config)
    if progress is True:
        _print(notes, "note")
        _print(warnings, "warning")
        from grandrounds.server.listeners.plain import PlainReporter

        progress = PlainReporter(config)
    listener = progress or Listener()
    played.play(config, listener, engine, client_cpus, client_gpus)
    return Run(played.place_of(config))


def open_run(path: str | Path) -> Run:
    """Return the run in a directory.

    Raises
    ------
    RunDirectoryError
        If there is none.
    """
    from grandrounds.server.directory import RunDirectory

    return Run(RunDirectory.open(_place(path)).path)


def evaluate(
    target: str | Path | Run,
    *,
    benchmarks: Sequence[str] | None = None,
    exams: Sequence[str | Path] = (),
    exam_style: str = "texts",
    protocol: str = "likelihood",
    data: str | Path | None = None,
    limit: int | None = None,
    base: str | None = None,
    quantization: int | None = None,
    batch_size: int | None = None,
    permutations: int = 3,
    answer_tokens: int = 128,
    out: str | Path | None = None,
    resume: bool = False,
) -> Evaluation:
    """Ask a run's adapters, or one adapter, and their base; see `grandrounds evaluate --help`.

    Parameters
    ----------
    target
        A run, its directory, a checkpoint, an adapter's folder, or `none` for the base alone.
    benchmarks
        Of `pubmedqa`, `medqa`, `medmcqa`, `careqa`, `general`, `formulary` and `held-out`; None:
        the target's own.
    exams
        Files of own questions, asked in the style `texts` or `letters`.
    protocol
        `likelihood`, `flowertune` or `all`.

    Raises
    ------
    GrandRoundsError
        If base, adapter or questions cannot be used.
    """
    from grandrounds.quiet import quiet_libraries
    from grandrounds.study.evaluation.benchmarks import check_names
    from grandrounds.study.evaluation.own_exam import style_of
    from grandrounds.study.evaluation.questions import Wanted, questions_for
    from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, find_target

    method = Method(protocol, permutations, batch_size, answer_tokens)
    names = check_names(list(benchmarks)) if benchmarks else []
    files = [Path(exam) for exam in exams]
    wanted = Wanted(names, files, style_of(exam_style), _path(data), limit)
    found = find_target(str(_place(target)), base, quantization)
    find_base(found.base)
    quiet_libraries()
    tasks = EvaluationTasks(found, questions_for(found, wanted), method, _path(out))
    from grandrounds.study.evaluation import runner

    return Evaluation(tasks.folder, runner.evaluate(tasks, resume=resume))


def compare(
    source: str | Path | Asked | None = None,
    settings: Settings | None = None,
    *,
    arms: Sequence[str] | None = None,
    seeds: int = 1,
    left_out: Sequence[int] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Comparison:
    """Measure what federation gains, and for which sites; see `grandrounds compare --help`.

    Parameters
    ----------
    arms
        Of `federated`, `private`, `personal`, `centralised`, `local` and `leave-one-out`; None:
        what suits the recipe.
    seeds
        Number of consecutive seeds, from the recipe's on.
    left_out
        Sites that `leave-one-out` leaves out; None: all.
    out
        A new folder, or one to continue.

    Raises
    ------
    GrandRoundsError
        If an arm cannot be trained or evaluated; finished parts are kept.
    """
    from grandrounds.quiet import quiet_libraries
    from grandrounds.study.comparison import units as comparison

    check_options(options)
    config = asked_for(source, settings, **options).config
    chosen = comparison.check_arms(comparison.default_arms(config) if arms is None else arms)
    comparison.check_recipe(chosen, config)
    numbers = comparison.check_seeds(config.federation.seed, seeds)
    sites = "all" if left_out is None else ",".join(map(str, left_out))
    without = comparison.check_sites(sites, config.data.num_partitions, None)
    played.checked(config)
    quiet_libraries()
    from grandrounds.model.tokenizers import dated
    from grandrounds.study.comparison import runner
    from grandrounds.study.comparison.folder import day_in

    folder = _path(out) or runner.default_folder(config)
    design = comparison.Design(chosen, numbers, without)
    return Comparison(folder, runner.compare(dated(config, day_in(folder)), design, folder))


def plan(
    source: str | Path | Asked | None = None,
    settings: Settings | None = None,
    *,
    architecture: str | None = None,
    rows: int | None = None,
    **options: Any,
) -> Plan:
    """Plan communication, memory and data of a run, without loading or downloading anything.

    Parameters
    ----------
    architecture
        A known base with the same shapes, where the recipe's is not known.
    rows
        Number of rows, for data that cannot be counted.
    """
    from grandrounds.study import preflight
    from grandrounds.study.plan.forecast import forecast

    if rows is not None and rows < 1:
        raise ConfigError(f"rows = {rows} must be at least 1.")
    check_options(options)
    config = asked_for(source, settings, may_load=False, **options).config
    warnings = preflight.check(config)
    return Plan(forecast(config, architecture=architecture, rows=rows), warnings)


def report(*targets: str | Path | Run | Comparison, out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page of a run, several runs or a comparison; return its file.

    Raises
    ------
    GrandRoundsError
        If a target cannot be read, or jinja2 is not installed.
    """
    from grandrounds.study.report.written import write_report

    if not targets:
        raise ConfigError("report has no target: give a run, several runs, or a comparison.")
    return write_report([_place(target) for target in targets], _path(out)).file


def dossier(target: str | Path | Run, out: str | Path | None = None) -> Filed:
    """Write what an ethics board needs of a run, as a page and as JSON; see `grandrounds dossier`.

    Parameters
    ----------
    out
        The page, by default `dossier.html` in the run; the JSON is written beside it.

    Raises
    ------
    GrandRoundsError
        If the run has not ended or is damaged, or a file cannot be written.
    """
    from grandrounds.study.dossier.written import write_dossier

    written = write_dossier(_place(target), _path(out))
    return Filed(written.file, written.run, written.dossier)


def _place(target: str | Path | Run | Comparison) -> Path:
    if isinstance(target, Run | Comparison):
        return target.path
    if not isinstance(target, str | Path):
        raise ConfigError(f"{target!r} is no run: give a run, a comparison, or its directory.")
    return Path(target)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _print(lines: Sequence[str], kind: str) -> None:
    for line in lines:
        print(f"{kind}: {line}", flush=True)
