"""Logs a run to experiment trackers: TensorBoard, Weights & Biases, MLflow, Trackio.

A tracker receives the recipe, and sums and means over the cohort after each round, but nothing
about a single site. A tracker that fails, or does not answer in time, is reported once and
disabled; the run continues.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Self

from grandrounds.config.keys import PLACES, Config
from grandrounds.config.values import Scalar, words_of
from grandrounds.errors import ConfigError, first_line
from grandrounds.server.listeners import Facts, Listener
from grandrounds.server.listeners.tracker_libraries import TensorBoard, TrackedRun, Tracker
from grandrounds.server.listeners.tracker_process import Apart
from grandrounds.server.unfinished import AFTER, failures_of

FIGURES = (
    "train-loss",
    "held-out-loss",
    "margin",
    "preference-accuracy",
    "ranking-accuracy",
    "learning-rate",
    "proximal-penalty",
    "coverage",
    "examples",
    "tokens",
    "communication-mib",
    "product-error-of-update",
    "server-learning-rate",
    "truncation-error",
    "correction-error",
    "seconds",
    "train-seconds",
    "evaluate-seconds",
)
"""The figures logged for a round, under their names in metrics.jsonl."""


def trackers_of(report_to: str) -> dict[str, Tracker]:
    """Return the trackers that `train.report-to` names, not yet started.

    Raises
    ------
    ConfigError
        If one of them is not installed.
    """
    names = [name for name in words_of(report_to) if name != "none"]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"train.report-to = {report_to!r} needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install "
            f'{" ".join(missing)}, or set train.report-to = "none".'
        )
    return {name: TensorBoard() if name == "tensorboard" else Apart(name) for name in names}


def settings_of(config: Config) -> dict[str, Scalar]:
    """Return the recipe's values that may be published: only the name of local files."""
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in config.flat().items()
        if key not in PLACES
    }


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures to log for one line of metrics.jsonl."""
    figures = {name: float(record[name]) for name in FIGURES if record.get(name) is not None}
    if "cohort" in record:
        figures["good-replies"] = float(len(record["good"]))
        figures["failed-replies"] = float(len(record["failed"]))
    return figures


class Tracked(Listener):
    """Wraps a listener, and logs the run to trackers too.

    The trackers end with the run, however it ends.
    """

    def __init__(self, config: Config, listener: Listener, trackers: Mapping[str, Tracker]) -> None:
        self._settings = settings_of(config)
        self._listener = listener
        self._waiting = dict(trackers)
        self._active: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        self._listener.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._listener.__exit__(*failure)
        for name, tracker in list(self._active.items()):
            with self._kept_apart(name):
                tracker.finish(failure[0] is None)

    def on_plan(self, plan: Facts) -> None:
        """Start the trackers."""
        self._listener.on_plan(plan)
        run = TrackedRun(
            directory=Path(plan["directory"]),
            key=plan["run"],
            settings=self._settings,
            resumed_after=plan["resumed-after"] or 0,
        )
        for name, tracker in self._waiting.items():
            with self._kept_apart(name):
                where = tracker.start(run)
                self._active[name] = tracker
                print(f"reports to {name}: {where}", file=sys.stderr)

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        """Pass it on; trackers learn nothing about single sites."""
        self._listener.on_roll_call(sites)

    def on_step(self, what: str, site: int, done: int, total: int) -> None:
        """Pass it on; trackers learn nothing about single sites."""
        self._listener.on_step(what, site, done, total)

    def on_reply(self, site: int, failure: str | None) -> None:
        """Pass it on; trackers learn nothing about single sites."""
        self._listener.on_reply(site, failure)

    def on_checkpoint(self, round_number: int, folder: str) -> None:
        """Pass it on."""
        self._listener.on_checkpoint(round_number, folder)

    def on_finished(self, summary: Facts) -> None:
        """Pass it on; trackers end in `__exit__`."""
        self._listener.on_finished(summary)

    def on_round(self, record: Facts) -> None:
        """Log the round's figures."""
        self._listener.on_round(record)
        self._log(record["round"], figures_of(record))

    def on_unfinished(self, line: Facts) -> None:
        """Log what was sent in a round that did not finish, at the round before."""
        self._listener.on_unfinished(line)
        figures = {
            "unfinished-communication-mib": float(line["communication-mib"]),
            "unfinished-failed-replies": float(failures_of(line)),
        }
        self._log(line[AFTER] or 0, figures)

    def _log(self, round_number: int, figures: Mapping[str, float]) -> None:
        for name, tracker in list(self._active.items()):
            with self._kept_apart(name):
                tracker.log(round_number, figures)

    @contextmanager
    def _kept_apart(self, name: str) -> Iterator[None]:
        """Isolate the run from a tracker's failure, and the run's output from its messages."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # whatever a tracker's library raises, the run continues
            self._active.pop(name, None)
            reason = first_line(error)
            print(
                f"grandrounds: {name} failed and is disabled; the run continues: {reason}",
                file=sys.stderr,
            )


def tracked(config: Config, listener: Listener) -> Listener:
    """Return the listener, wrapped where `train.report-to` names trackers.

    Raises
    ------
    ConfigError
        If one of them is not installed.
    """
    trackers = trackers_of(config.train.report_to)
    return Tracked(config, listener, trackers) if trackers else listener
