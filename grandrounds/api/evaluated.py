"""An evaluation that was asked for: checked before a model is loaded, then asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grandrounds.api.results import Evaluation
from grandrounds.config.bases import find_base
from grandrounds.quiet import quiet_libraries

if TYPE_CHECKING:
    from grandrounds.study.evaluation.questions import Wanted
    from grandrounds.study.evaluation.runner import Listener
    from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, Target


def target_of(
    name: str, base: str | None = None, quantization: int | None = None, site: str | None = None
) -> Target:
    """Return the models that a target names; see `grandrounds.evaluate`.

    Raises
    ------
    GrandRoundsError
        If target, base or site cannot be used.
    """
    from grandrounds.study.evaluation.tasks import find_target, with_site, without_site

    found = find_target(name, base, quantization)
    found = without_site(found) if site is None else with_site(found, site)
    find_base(found.base)  # fails now if it is not fetched
    return found


def prepared(target: Target, wanted: Wanted, method: Method, out: Path | None) -> EvaluationTasks:
    """Return what an evaluation asks, every question read and checked.

    Raises
    ------
    GrandRoundsError
        If the questions cannot be used, or not by that method.
    """
    quiet_libraries()
    from grandrounds.study.evaluation.questions import questions_for
    from grandrounds.study.evaluation.tasks import EvaluationTasks

    return EvaluationTasks(target, questions_for(target, wanted), method, out)


def play(tasks: EvaluationTasks, listener: Listener, *, resume: bool = False) -> Evaluation:
    """Ask every model every question that has no answer yet."""
    from grandrounds.study.evaluation import runner

    content = runner.evaluate(tasks, resume=resume, listener=listener)
    return Evaluation(tasks.folder, content)
