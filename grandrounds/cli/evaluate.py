"""`grandrounds evaluate`: the command, its progress, and its tables, boxed or in plain lines.

Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grandrounds.cli.screen import Screen
from grandrounds.config.values import words_of
from grandrounds.errors import ConfigError, DataError
from grandrounds.quiet import quiet_libraries

if TYPE_CHECKING:
    from grandrounds.study.evaluation.benchmarks import Questions
    from grandrounds.study.evaluation.tasks import EvaluationTasks

OVERLAP = "overlap.json"
"""File of what `--check-overlap` found."""


def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER|RUN_DIR|none",
            help="An adapter's folder, a run directory (its last and best checkpoints), or `none` "
            "for the base alone. The untouched base is always asked too.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: hub name, local folder, or formulary; a run or an adapter names "
            "its own.",
            metavar="MODEL",
        ),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Some of pubmedqa, medqa, medmcqa, careqa, formulary, with commas; default: "
            "formulary for a run on it, else the first four.",
            metavar="NAMES",
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="`flowertune`: the leaderboard's own rule. `likelihood`: options compared, as "
            "lm-evaluation-harness does. `all`: both.",
        ),
    ] = "likelihood",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with files of the benchmarks; without one they come from the hub.",
            metavar="DIR",
        ),
    ] = None,
    quantization: Annotated[
        int | None,
        typer.Option(help="Bits of the base's weights: 0, 4 or 8; default: the run's, or 0."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Prompts computed together; changes no answer but by rounding.")
    ] = 16,
    limit: Annotated[
        int | None, typer.Option(help="Ask only the first so many items of each benchmark.")
    ] = None,
    permutations: Annotated[
        int,
        typer.Option(help="Random orders of lettered options that `likelihood` asks besides."),
    ] = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write to; default: `evaluation` in the run or adapter.", metavar="DIR"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped evaluation in the same folder.")
    ] = False,
    rescore: Annotated[
        bool,
        typer.Option(
            "--rescore", help="Score recorded generations (the arguments) by FlowerTune's rule."
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Say whether the figures of evaluation.json (the argument) can be."
        ),
    ] = False,
    check_overlap: Annotated[
        bool,
        typer.Option(
            "--check-overlap",
            help="Count benchmark questions that occur in training data (the argument).",
        ),
    ] = False,
    question_column: Annotated[
        str, typer.Option(help="Column of the training data, for `--check-overlap`.")
    ] = "input",
    answer_column: Annotated[
        str, typer.Option(help="Column of the training data, for `--check-overlap`.")
    ] = "output",
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines, no progress bar.")] = False,
) -> None:
    """Measure adapters on medical benchmarks, always against their untouched base.

    The argument is an adapter's folder, a run directory (its last and best checkpoints are asked),
    or `none` for the base alone; with `--rescore`, `--verify` and `--check-overlap`, what these
    read.

    Examples:

    - `grandrounds evaluate runs/first` (best and last checkpoint of a run against its base)

    - `grandrounds evaluate runs/first/peft_24 --benchmarks medqa,medmcqa --data eval/ --limit 200`

    - `grandrounds evaluate none --base HuggingFaceTB/SmolLM2-135M-Instruct --protocol all`

    - `grandrounds evaluate --rescore generation_pubmedqa_run.jsonl`

    - `grandrounds evaluate --verify runs/first/evaluation/evaluation.json`

    - `grandrounds evaluate --check-overlap flashcards.jsonl --benchmarks pubmedqa`
    """
    given = targets or []
    names = _names(benchmarks)
    screen = Screen(plain)
    modes = {"--rescore": rescore, "--verify": verify, "--check-overlap": check_overlap}
    chosen = [mode for mode, wanted in modes.items() if wanted]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are two commands: give one of them")
    if rescore:
        _rescore(_files(given, "--rescore"), screen)
    elif verify:
        _verify(_files(given, "--verify"))
    elif check_overlap:
        training = _only(given, "--check-overlap needs the training data")
        columns = {"question_column": question_column, "answer_column": answer_column}
        quiet_libraries()
        from grandrounds.study.evaluation.benchmarks import MEDICAL, load_questions

        questions = load_questions(names or MEDICAL, data, limit)
        _check_overlap(training, questions, out, columns, screen)
    else:
        from grandrounds.study.evaluation.benchmarks import load_questions
        from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, find_target

        method = Method(protocol, permutations, batch_size)
        name = _only(given, "give an adapter's folder, a run directory or none")
        target = find_target(name, base, quantization)
        questions = load_questions(names or target.benchmarks, data, limit)
        _evaluate(EvaluationTasks(target, questions, method, out), resume, screen)


def _names(benchmarks: str | None) -> list[str] | None:
    """Return the names of benchmarks that a text with commas holds, each of them known."""
    if benchmarks is None:
        return None
    from grandrounds.study.evaluation.benchmarks import get_benchmark

    names = list(words_of(benchmarks))
    if not names:
        raise ConfigError("--benchmarks names none; leave it out for the default")
    return [get_benchmark(name).name for name in names]


def _only(given: Sequence[str], needed: str) -> str:
    if len(given) != 1:
        raise ConfigError(f"{needed}: one argument, got {len(given)}")
    return given[0]


def _files(given: Sequence[str], option: str) -> list[Path]:
    if not given:
        raise ConfigError(f"{option} needs at least one file")
    return [Path(name) for name in given]


# --- Evaluate -------------------------------------------------------------------------------------


def _evaluate(tasks: EvaluationTasks, resume: bool, screen: Screen) -> None:
    """Ask, then show tables, notes and where they are written."""
    quiet_libraries()
    from grandrounds.study.evaluation import runner
    from grandrounds.study.evaluation.tables import notes, tables
    from grandrounds.study.evaluation.verification import evaluations_in

    with screen.progress() as listener:
        content = runner.evaluate(tasks, resume=resume, listener=listener)
    found = tasks.folder / OVERLAP
    overlap = _read_json(found) if found.is_file() else None
    told: set[str] = set()
    for evaluation in evaluations_in(content):
        for table in tables(evaluation):
            screen.table(table.title, table.columns, table.rows)
        new = [note for note in notes(evaluation, overlap) if note not in told]
        screen.notes(new)
        told.update(new)
    screen.say(f"written: {tasks.folder}/evaluation.json")


# --- The other three ------------------------------------------------------------------------------


def _rescore(files: Sequence[Path], screen: Screen) -> None:
    """Show what recorded generations are worth, beside the accuracy recorded with them."""
    from grandrounds.statistics import wilson_interval
    from grandrounds.study.evaluation import flowertune
    from grandrounds.study.tables import in_percent, interval, percent

    rows, differing = [], []
    for file in files:
        score = flowertune.rescore(flowertune.read_generations(file))
        recorded = _recorded_accuracy(file)
        line = flowertune.accuracy_line(score).strip()
        if recorded is not None and recorded != line:
            differing.append(f"{file.name}: recorded {recorded!r}, rescored {line!r}")
        rows.append(
            (
                file.name,
                f"{score.correct:,}/{score.n:,}",
                in_percent(score.accuracy),
                interval(wilson_interval(score.correct, score.n)),
                "-" if recorded is None else recorded.removeprefix("Accuracy: ").rstrip("."),
                "-" if recorded is None else ("yes" if recorded == line else "NO"),
                f"{score.format_failures:,} ({percent(score.format_failures / score.n)})",
                "  ".join(f"{answer} {count:,}" for answer, count in score.spread.items()),
            )
        )
    columns = ("file", "correct", "%", "95% interval", "recorded", "same")
    answers = ("no clean answer", "answers given")
    screen.table("rescored by FlowerTune's rule", (*columns, *answers), rows)
    for text in differing:
        screen.say(text)


def _recorded_accuracy(file: Path) -> str | None:
    """Return the text of the acc_*.txt that lies beside recorded generations, if one does."""
    stem = file.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    beside = file.with_name(f"acc_{stem.removeprefix('generation_')}.txt")
    return beside.read_text(encoding="utf-8").strip() if beside.is_file() else None


def _verify(files: Sequence[Path]) -> None:
    """Say what cannot be in result files; exit with code 1 if there is anything."""
    from grandrounds.study.evaluation.verification import faults_in

    found = False
    for file in files:
        faults = faults_in(_read_json(file))
        found = found or bool(faults)
        print(f"{file}: {f'{len(faults)} fault(s)' if faults else 'the figures are possible'}")
        for fault in faults:
            print(f"  {fault}")
    if found:
        raise typer.Exit(1)


def _check_overlap(
    training: str,
    questions: Questions,
    out: Path | None,
    columns: Mapping[str, str],
    screen: Screen,
) -> None:
    """Show and write which benchmark questions occur in training data."""
    from grandrounds.study.evaluation.answers import write_json
    from grandrounds.study.evaluation.overlap import check_overlap
    from grandrounds.study.tables import percent

    report = check_overlap(training, questions, **columns)
    folder = out or Path()
    write_json(folder / OVERLAP, report)
    rows = [
        (
            name,
            f"{found['n']:,}",
            f"{found['items']:,} ({percent(found['items'] / found['n'])})",
            f"{found['exact']:,}",
            f"{found['near']:,}",
        )
        for name, found in report["benchmarks"].items()
    ]
    title = f"questions that occur in {training} ({report['rows']:,} rows)"
    screen.table(title, ("benchmark", "asked", "found", "word for word", "nearly"), rows)
    for name, found in report["benchmarks"].items():
        for pair in found["found"][:SHOWN]:
            question = " ".join(pair["question"].split())
            where = f"{name} item {pair['item']}, training row {pair['training_row']}"
            screen.say(f"  {where} ({pair['kind']}): {question[:100]}")
        if len(found["found"]) > SHOWN:
            screen.say(f"  {name}: {len(found['found']) - SHOWN:,} more in {OVERLAP}")
    screen.say(f"written: {folder / OVERLAP}")


SHOWN = 10
"""Pairs of each benchmark that are printed; all are in the file."""


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error})") from error
