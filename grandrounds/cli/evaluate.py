"""`grandrounds evaluate`: benchmarks, and checks of recorded results and training data.

Nothing heavy is imported before the arguments have been validated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import MofNCompleteColumn

from grandrounds.api import evaluated
from grandrounds.api.progress import evaluation_line
from grandrounds.api.results import OVERLAP
from grandrounds.cli.options import AsJson, BenchmarkData, Limit, OfSite, Plain, Quiet, Verbose
from grandrounds.cli.screen import Screen, say
from grandrounds.config.values import words_of
from grandrounds.config.words import command, counted
from grandrounds.errors import ConfigError, DataError
from grandrounds.quiet import quiet_libraries

if TYPE_CHECKING:
    from grandrounds.study.evaluation.benchmarks import Questions
    from grandrounds.study.evaluation.flowertune import Generation
    from grandrounds.study.evaluation.tasks import EvaluationTasks


def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER|RUN_DIR|none",
            help="Adapter folder, run directory (its last and best checkpoints), or `none` for the "
            "base model alone. The untuned base is always evaluated too.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: Hub name, local folder, or formulary; default: that of the run or "
            "adapter.",
            metavar="MODEL",
        ),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Benchmarks, comma-separated: pubmedqa, medqa, medmcqa, careqa, general, "
            "formulary, held-out (the rows that a run's sites held out); default: formulary for a "
            "run on it, held-out for a run on a local file, else the first four.",
            metavar="NAMES",
        ),
    ] = None,
    site: OfSite = None,
    own_exams: Annotated[
        list[Path] | None,
        typer.Option(
            "--benchmark",
            help="Exam of your own, a file with the columns question, options (or A, B, ...) and "
            "answer (letter, index from 0, or text); repeatable.",
            metavar="FILE",
        ),
    ] = None,
    own_style: Annotated[
        str,
        typer.Option(
            "--benchmark-style",
            help="How your own exams are asked. `texts`: whole options, in the run's prompt. "
            "`letters`: lettered options, as MedMCQA is.",
        ),
    ] = "texts",
    protocol: Annotated[
        str,
        typer.Option(
            help="`flowertune`: the leaderboard's scoring of generated answers. `likelihood`: "
            "option log-likelihoods, as in lm-evaluation-harness. `all`: both.",
        ),
    ] = "likelihood",
    data: BenchmarkData = None,
    quantization: Annotated[
        int | None,
        typer.Option(help="Bits per base weight: 0, 4 or 8; default: the run's, or 0."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Prompts per batch; affects answers only by rounding. Default: 16 on a CPU, as "
            "many as fill a GPU."
        ),
    ] = None,
    limit: Limit = None,
    permutations: Annotated[
        int, typer.Option(help="Additional random orders of lettered options in `likelihood`.")
    ] = 3,
    answer_tokens: Annotated[
        int, typer.Option(help="Maximum length of an answer to `held-out`, in tokens.")
    ] = 128,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder; default: `evaluation` in the run or adapter.", metavar="DIR"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a stopped evaluation in the same folder.")
    ] = False,
    rescore: Annotated[
        bool,
        typer.Option(
            "--rescore", help="Rescore recorded generations (the arguments) by FlowerTune's rule."
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check evaluation.json (the argument) for impossible or inconsistent figures.",
        ),
    ] = False,
    check_overlap: Annotated[
        bool,
        typer.Option(
            "--check-overlap",
            help="Count benchmark questions that occur in the training data (the argument).",
        ),
    ] = False,
    question_column: Annotated[
        str, typer.Option(help="Question column of the training data, for `--check-overlap`.")
    ] = "input",
    answer_column: Annotated[
        str, typer.Option(help="Answer column of the training data, for `--check-overlap`.")
    ] = "output",
    plain: Plain = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate adapters on medical benchmarks, always against their untuned base model.

    The argument is an adapter folder, a run directory (its last and best checkpoints are
    evaluated), or `none` for the base model alone; with `--rescore`, `--verify` and
    `--check-overlap`, the files that these read.

    Examples:

    - `grandrounds evaluate runs/first` (best and last checkpoint of a run against its base)

    - `grandrounds evaluate runs/first/peft_24 --benchmarks medqa,medmcqa --data eval/ --limit 200`

    - `grandrounds evaluate none --base HuggingFaceTB/SmolLM2-135M-Instruct --protocol all`

    - `grandrounds evaluate runs/mine --benchmarks held-out --benchmark exam.csv`

    - `grandrounds evaluate --rescore generation_pubmedqa_run.jsonl`

    - `grandrounds evaluate --verify runs/first/evaluation/evaluation.json`

    - `grandrounds evaluate --check-overlap flashcards.jsonl --benchmarks pubmedqa`
    """
    given = targets or []
    screen = Screen(plain, verbose=verbose, quiet=quiet, as_json=as_json)
    screen.working("reading the questions")
    names = _names(benchmarks)
    modes = {"--rescore": rescore, "--verify": verify, "--check-overlap": check_overlap}
    chosen = [mode for mode, wanted in modes.items() if wanted]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} exclude each other: give one of them")
    if rescore:
        _rescore(_files(given, "--rescore"), data, screen)
    elif verify:
        _verify(_files(given, "--verify"), screen)
    elif check_overlap:
        training = _only(given, "--check-overlap needs the training data")
        columns = {"question_column": question_column, "answer_column": answer_column}
        quiet_libraries()
        from grandrounds.study.evaluation.benchmarks import MEDICAL, Questions, load_questions
        from grandrounds.study.evaluation.own_exam import load_own_exams

        own = load_own_exams(own_exams or [], "texts", limit)
        published = load_questions(names or ([] if own else MEDICAL), data, limit)
        questions = Questions((*own, *published.tasks), limit)
        _check_overlap(training, questions, out, columns, screen)
    else:
        from grandrounds.study.evaluation.own_exam import style_of
        from grandrounds.study.evaluation.questions import Wanted
        from grandrounds.study.evaluation.tasks import Method

        method = Method(protocol, permutations, batch_size, answer_tokens)
        wanted = Wanted(names or [], own_exams or [], style_of(own_style), data, limit)
        name = _only(given, "give an adapter's folder, a run directory or none")
        target = evaluated.target_of(name, base, quantization, site)
        _evaluate(evaluated.prepared(target, wanted, method, out), resume, screen)


def _names(benchmarks: str | None) -> list[str] | None:
    """Return the benchmarks of a comma-separated list, each of them known."""
    if benchmarks is None:
        return None
    from grandrounds.study.evaluation.benchmarks import check_names

    names = list(words_of(benchmarks))
    if not names:
        raise ConfigError("--benchmarks is empty; omit it for the default")
    return check_names(names)


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
    """Evaluate, then show tables, notes and the output file."""
    screen.working("importing the libraries")
    if told_first := tasks.assumption:
        screen.notes([told_first])
    with progress(screen) as listener:
        result = evaluated.play(tasks, listener, resume=resume)
    for tables, notes in result.shown():
        for table in tables:
            screen.table(table.title, table.columns, table.rows)
        screen.notes(notes)
    screen.tell(f"written: {result.path}/evaluation.json")
    screen.emit(dict(result.content))


@contextmanager
def progress(screen: Screen) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """Yield a listener for `runner.evaluate`: a forecast, a line per benchmark, and a bar."""
    from grandrounds.server.listeners.clock import Clock
    from grandrounds.server.listeners.terminal import TimeLeft

    clock = Clock(1)  # of the whole evaluation
    with screen.bar("loading the base", MofNCompleteColumn(), TimeLeft(clock)) as (bar, task):

        def listen(event: str, facts: Mapping[str, Any]) -> None:
            if event == "asking":
                what = escape(f"{facts['model']}  {facts['benchmark']}  {facts['protocol']}")
                bar.reset(task, total=facts["total"], completed=facts["done"], description=what)
            elif event == "answered":
                bar.advance(task, facts["count"])
                screen.detail(f"  {facts['count']:,} answered")
            elif event == "forecast" and facts["seconds"]:
                clock.expect(facts["seconds"])
            if line := evaluation_line(event, facts):
                screen.tell(line)

        yield listen


# --- Rescore, verify, check overlap ---------------------------------------------------------------


def _rescore(files: Sequence[Path], data: Path | None, screen: Screen) -> None:
    """Show the score of recorded generations beside the accuracy recorded with them."""
    from grandrounds.statistics import wilson_interval
    from grandrounds.study.evaluation import flowertune
    from grandrounds.study.evaluation.recorded_prompts import altered_prompts
    from grandrounds.study.tables import in_percent, interval, percent

    rows, differing, examples = [], [], []
    for file in files:
        records = _recorded(file)
        score = flowertune.rescore(records)
        found = altered_prompts(records, file.name, data)
        altered = len(found.rows)
        examples.append(found.example)
        if altered:
            differing.append(
                f"{file.name}: {altered:,} of {score.n:,} prompts are not FlowerTune's for "
                f"{found.benchmark.title}, so its score compares with no other: {found.example}"
            )
        if repeated := score.n - len(set(records)):
            differing.append(
                f"{file.name}: {repeated:,} of {score.n:,} rows repeat an earlier one in full, "
                "prompt and output, and are counted again."
            )
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
                f"{altered:,} ({percent(altered / score.n)})" if altered else "0",
                f"{score.format_failures:,} ({percent(score.format_failures / score.n)})",
                "  ".join(f"{answer} {count:,}" for answer, count in score.spread.items()),
            )
        )
    columns = ("file", "correct", "%", "95 % interval", "recorded", "same")
    answers = ("altered prompts", "no clean answer", "answers given")
    screen.table("rescored by FlowerTune's rule", (*columns, *answers), rows)
    say(*differing)
    names = (*columns, *answers, "example of an altered prompt")
    told = [dict(zip(names, (*row, e), strict=True)) for row, e in zip(rows, examples, strict=True)]
    screen.emit(told)


def _recorded(file: Path) -> tuple[Generation, ...]:
    """Return recorded generations; raise `DataError` for an evaluation, which is verified."""
    from grandrounds.study.evaluation import flowertune

    try:
        return flowertune.read_generations(file)
    except DataError:
        if _is_evaluation(file):
            raise DataError(
                f"{file} holds an evaluation, not recorded answers to rescore. Verify it: "
                f"{command('grandrounds', 'evaluate', '--verify', file)}"
            ) from None
        raise


def _is_evaluation(file: Path) -> bool:
    from grandrounds.study.evaluation.verification import read_result

    try:
        content = read_result(file)
    except DataError:
        return False
    return isinstance(content, dict) and bool({"rows", "evaluations"} & content.keys())


def _recorded_accuracy(file: Path) -> str | None:
    """Return the text of the acc_*.txt beside recorded generations, if there is one."""
    stem = file.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    beside = file.with_name(f"acc_{stem.removeprefix('generation_')}.txt")
    return beside.read_text(encoding="utf-8").strip() if beside.is_file() else None


def _verify(files: Sequence[Path], screen: Screen) -> None:
    """Print the faults of result files; exit with code 1 if there are any."""
    from grandrounds.study.evaluation.verification import faults_in, read_result

    found: dict[str, list[str]] = {}
    for file in files:
        _refuse_recorded(file)
        faults = faults_in(read_result(file))
        found[str(file)] = faults
        screen.still()
        say(f"{file}: {counted(len(faults), 'fault') if faults else 'no fault found'}")
        say(*(f"  {fault}" for fault in faults))
    screen.emit(found)
    if any(found.values()):
        raise typer.Exit(1)


def _refuse_recorded(file: Path) -> None:
    """Raise `DataError` for recorded answers or their accuracy, which have no figures to verify."""
    from grandrounds.study.evaluation import flowertune

    recorded, name = file, file.name
    if name.startswith("acc_") and name.endswith(".txt"):
        recorded = file.with_name(f"generation_{name[4:-4]}.jsonl")
    else:
        try:
            if not flowertune.read_generations(file):
                return
        except DataError:
            return
    raise DataError(
        f"{file} holds recorded answers, not an evaluation to verify. Score them again: "
        f"{command('grandrounds', 'evaluate', '--rescore', recorded)}"
    )


def _check_overlap(
    training: str,
    questions: Questions,
    out: Path | None,
    columns: Mapping[str, str],
    screen: Screen,
) -> None:
    """Show and write which benchmark questions occur in the training data."""
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
    screen.table(title, ("benchmark", "items", "found", "exact", "near-duplicate"), rows)
    for name, found in report["benchmarks"].items():
        for pair in found["found"][:SHOWN]:
            question = " ".join(pair["question"].split())
            where = f"{name} item {pair['item']}, training row {pair['training_row']}"
            say(f"  {where} ({pair['kind']}): {question[:100]}")
        if len(found["found"]) > SHOWN:
            say(f"  {name}: {len(found['found']) - SHOWN:,} more in {OVERLAP}")
    say(f"written: {folder / OVERLAP}")
    screen.emit(report)


SHOWN = 10
"""Matches printed per benchmark; the file has all of them."""
