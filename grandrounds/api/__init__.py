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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from grandrounds.api import compared, evaluated, given, planned, played
from grandrounds.api.asked import Asked, asked_for, check_options, resolved_run
from grandrounds.api.progress import Clock, comparison_line, evaluation_line
from grandrounds.api.results import Comparison, Evaluation, Filed, Plan, Run
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError
from grandrounds.server.listeners import Facts, Listener

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
    client_cpus = given.integer_or_none("client_cpus", client_cpus, 1)
    client_gpus = given.number_or_none("client_gpus", client_gpus)
    from_round = given.integer_or_none("from_round", from_round, 0)
    if not isinstance(progress, bool | Listener):
        raise ConfigError(f"progress = {progress!r} must be True, False or a Listener.")
    place = None if resume is None else _place("resume", resume)
    if run_dir is not None:
        options["run_dir"] = str(given.path("run_dir", run_dir))
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
        _print(notes, "note: ")
        _print(warnings, "warning: ")
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

    return Run(RunDirectory.open(_place("path", path)).path)


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
    site: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
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
    site
        Number or name of a site whose personal adapter is asked beside the run's.
    progress
        Whether a line is printed per model and benchmark.

    Raises
    ------
    GrandRoundsError
        If base, adapter or questions cannot be used.
    """
    names = [] if benchmarks is None else given.names("benchmarks", benchmarks, "medqa")
    files = given.paths("exams", exams, "exam.csv")
    place = str(_place("target", target))
    folder, result = given.path_or_none("data", data), given.path_or_none("out", out)
    limit = given.integer_or_none("limit", limit, 1)
    from grandrounds.study.evaluation.benchmarks import check_names
    from grandrounds.study.evaluation.own_exam import style_of
    from grandrounds.study.evaluation.questions import Wanted
    from grandrounds.study.evaluation.tasks import Method

    method = Method(
        given.text("protocol", protocol),
        given.integer("permutations", permutations, 0),
        given.integer_or_none("batch_size", batch_size, 1),
        given.integer("answer_tokens", answer_tokens, 1),
    )
    style = style_of(given.text("exam_style", exam_style))
    wanted = Wanted(check_names(names), files, style, folder, limit)
    base, site = given.text_or_none("base", base), given.text_or_none("site", site)
    models = evaluated.target_of(place, base, quantization, site)
    tasks = evaluated.prepared(models, wanted, method, result)

    _print([tasks.assumption] * progress)

    def listen(event: str, facts: Facts) -> None:
        _print([evaluation_line(event, facts)] * progress)

    return evaluated.play(tasks, listen, resume=resume)


def compare(
    source: str | Path | Asked | None = None,
    settings: Settings | None = None,
    *,
    arms: Sequence[str] | None = None,
    seeds: int = 1,
    left_out: Sequence[int | str] | None = None,
    equal_visits: bool = False,
    benchmarks: Sequence[str] = (),
    benchmark_data: str | Path | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
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
        Numbers or names of the sites that `leave-one-out` leaves out; None: all, one by one.
    equal_visits
        Whether `personal` follows fewer rounds, so that with the sites' own steps it makes no more
        example visits than the other arms.
    benchmarks, benchmark_data, limit
        Further benchmarks, the folder of their files, and the maximum number of items of each.
    out
        A new folder, or one to continue.
    progress
        Whether notes and a line per part are printed.

    Raises
    ------
    GrandRoundsError
        If an arm cannot be trained or evaluated; finished parts are kept.
    """
    check_options(options)
    named = None if arms is None else given.names("arms", arms, "local")
    without = None if left_out is None else given.sites("left_out", left_out)
    asked = asked_for(source, settings, **options)
    wanted = compared.Wanted(
        named,
        given.integer("seeds", seeds, 1),
        "all" if without is None else ",".join(without),
        given.names("benchmarks", benchmarks, "medqa"),
        given.path_or_none("benchmark_data", benchmark_data),
        given.integer_or_none("limit", limit, 1),
        given.truth("equal_visits", equal_visits),
    )
    place = given.path_or_none("out", out)
    made = compared.prepared(asked, wanted, place, option="left_out")
    if progress:
        _print(asked.all_notes(), "note: ")
        _print(made.warnings, "warning: ")
    clock = Clock()

    def listen(event: str, facts: Facts) -> None:
        clock(event, facts)
        _print([comparison_line(event, facts, clock)] * progress)

    return made.play(listen)


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
    rows = given.integer_or_none("rows", rows, 1)
    architecture = given.text_or_none("architecture", architecture)
    check_options(options)
    return planned.planned(
        asked_for(source, settings, may_load=False, **options), architecture, rows
    )


def report(*targets: str | Path | Run | Comparison, out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page of a run, several runs or a comparison; return its file.

    Raises
    ------
    ConfigError, DataError, RunDirectoryError
        If a target cannot be read, or jinja2 is not installed.
    """
    from grandrounds.study.report.written import write_report

    if not targets:
        raise ConfigError("report has no target: give a run, several runs, or a comparison.")
    places = [_place("target", target) for target in targets]
    written = write_report(places, given.path_or_none("out", out))
    _print(written.warnings, "warning: ")
    return written.file


def dossier(target: str | Path | Run, out: str | Path | None = None) -> Filed:
    """Write what an ethics board needs of a run, as a page and as JSON; see `grandrounds dossier`.

    Parameters
    ----------
    out
        The page, by default `dossier.html` in the run; the JSON is written beside it.

    Raises
    ------
    ConfigError, DataError, RunDirectoryError
        If the run has not ended or is damaged, or a file cannot be written.
    """
    from grandrounds.study.dossier.written import write_dossier

    written = write_dossier(_place("target", target), given.path_or_none("out", out))
    return Filed(written.file, written.run, written.dossier)


def _place(name: str, target: str | Path | Run | Comparison) -> Path:
    if isinstance(target, Run | Comparison):
        return target.path
    if not isinstance(target, str | Path):
        raise ConfigError(f"{target!r} is no run: give a run, a comparison, or its directory.")
    return given.path(name, target)


def _print(lines: Sequence[str], lead: str = "") -> None:
    for line in filter(None, lines):
        print(f"{lead}{line}", flush=True)
