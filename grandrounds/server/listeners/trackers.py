"""Logs a run to experiment trackers: TensorBoard, Weights & Biases, MLflow, Trackio.

A tracker receives the recipe, and sums and means over the cohort after each round, but nothing
about a single site. A tracker that fails is reported once and disabled; the run continues.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, Self

from grandrounds.config.keys import PLACES, Config
from grandrounds.config.values import Scalar, words_of
from grandrounds.errors import ConfigError, first_line
from grandrounds.server.listeners import Facts, Listener

PROJECT = "grandrounds"
"""Project or experiment, if the environment names none."""

FIGURES = (
    "train-loss",
    "held-out-loss",
    "learning-rate",
    "proximal-penalty",
    "coverage",
    "examples",
    "tokens",
    "communication-mib",
    "product-error-of-update",
    "server-learning-rate",
    "truncation-error",
    "seconds",
    "train-seconds",
    "evaluate-seconds",
)
"""The figures logged for a round, under their names in metrics.jsonl."""


class Tracker(Protocol):
    """One tracker of one run."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Start, and return where to find the run; `resumed_after` is 0 for a new run."""

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a round."""

    def finish(self, completed: bool) -> None:
        """Send what is left, and end."""


class TensorBoard:
    """Event files in the run directory, under `tensorboard/`."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Start; for a resumed run, purge the rounds that are repeated."""
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / "tensorboard"
        purge = resumed_after + 1 if resumed_after else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        rows = "".join(f"| {key} | `{value}` |\n" for key, value in settings.items())
        self._writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", resumed_after)
        return f"tensorboard --logdir {folder}"

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Write and flush, so that the run can be watched live."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round_number)
        self._writer.flush()

    def finish(self, completed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases; respects WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Start or continue the run; sends neither terminal output, code nor machine details."""
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.name,
            id=hashlib.sha256(str(directory).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(directory),
            config=dict(settings),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        if self._run.offline:
            return f"wandb sync {Path(self._run.dir).parent}"
        return str(self._run.url)

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log with the round as the step."""
        self._run.log(dict(figures), step=round_number)

    def finish(self, completed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=0 if completed else 1)


class MLflow:
    """MLflow; respects MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME. A resume is a new run."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Start a run named after the directory."""
        import mlflow

        self._mlflow: Any = mlflow
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_name=directory.name, log_system_metrics=False)
        mlflow.log_params(dict(settings))
        return f"MLflow at {mlflow.get_tracking_uri()}, run {run.info.run_id}"

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log with the round as the step."""
        self._mlflow.log_metrics(dict(figures), step=round_number)

    def finish(self, completed: bool) -> None:
        """End the run with its status."""
        self._mlflow.end_run("FINISHED" if completed else "FAILED")


class Trackio:
    """Trackio, on this machine; respects TRACKIO_PROJECT, TRACKIO_SPACE_ID and others."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Start or continue the run named after the directory."""
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._trackio: Any = trackio
        trackio.init(
            project=project,
            name=directory.name,
            config=dict(settings),
            resume="allow" if resumed_after else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return f"trackio show --project {project}"

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log with the round as the step."""
        self._trackio.log(dict(figures), step=round_number)

    def finish(self, completed: bool) -> None:
        """Wait until everything is written."""
        self._trackio.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Name in `train.report-to`, which is also the required package → tracker."""


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
    return {name: TRACKERS[name]() for name in names}


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
        directory, resumed_after = Path(plan["directory"]), plan.get("resumed-after") or 0
        for name, tracker in self._waiting.items():
            with self._kept_apart(name):
                where = tracker.start(directory, self._settings, resumed_after)
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
        figures = figures_of(record)
        for name, tracker in list(self._active.items()):
            with self._kept_apart(name):
                tracker.log(record["round"], figures)

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
