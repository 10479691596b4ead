"""The questions of an evaluation: published benchmarks, own files, a run's own held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grandrounds.errors import ConfigError
from grandrounds.study.evaluation.benchmarks import (
    HELD_OUT,
    Questions,
    load_questions,
)
from grandrounds.study.evaluation.own_exam import Style, load_own_exams
from grandrounds.study.evaluation.tasks import Target


@dataclass(frozen=True)
class Wanted:
    """Which questions are asked."""

    names: Sequence[str] = ()
    """Published benchmarks and `held-out`; with no files either, the target's default."""
    files: Sequence[Path] = ()
    """Own exams."""
    style: Style = "texts"
    """How own exams are asked."""
    data: Path | None = None
    """Folder of benchmark files."""
    limit: int | None = None
    """Maximum number of items per benchmark."""


def questions_for(target: Target, wanted: Wanted) -> Questions:
    """Return the questions to ask of a target, own files first, every row checked.

    Raises
    ------
    ConfigError
        If a benchmark is unknown, or held-out rows are asked of a target without a run.
    DataError
        If a source cannot be read, or has rows that cannot be used.
    """
    own = load_own_exams(wanted.files, wanted.style, wanted.limit)
    names = list(wanted.names) or ([] if wanted.files else list(target.benchmarks))
    published = load_questions([n for n in names if n != HELD_OUT], wanted.data, wanted.limit)
    tasks = [*own, *published.tasks]
    if HELD_OUT in names:
        if target.run is None:
            raise ConfigError(
                f"benchmark {HELD_OUT!r} asks the rows that the sites of a run held out: give a "
                "run directory, or one of its checkpoints."
            )
        from grandrounds.study.evaluation.held_out import load_held_out

        tasks.insert(len(own), load_held_out(target.run.directory, target.run.config, wanted.limit))
    return Questions(tuple(tasks), wanted.limit)
