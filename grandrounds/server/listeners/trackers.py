"""Tells experiment trackers how a run goes: TensorBoard, Weights & Biases, MLflow, Trackio.

A tracker is told the recipe, and after each round sums and means over the cohort; nothing of a
single site. One that fails is told once and switched off: no run ends for its tracker.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from grandrounds.config.keys import PLACES, Config
from grandrounds.config.values import Scalar, words_of
from grandrounds.errors import ConfigError, first_line
from grandrounds.server.listeners import Facts, Listener

PROJECT = "grandrounds"
"""Project or experiment where the environment names none."""

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
"""What is told of a round, by its names in metrics.jsonl."""


class Tracker(Protocol):
    """One tracker of one run."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Begin, and return where to look; `resumed_after` is 0 for a new run."""

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a round."""

    def finish(self, completed: bool) -> None:
        """End, and send what is not sent yet."""


class TensorBoard:
    """Event files in the run directory, under `tensorboard/`."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Begin; of a resumed run the rounds that come again are purged."""
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / "tensorboard"
        purge = resumed_after + 1 if resumed_after else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        rows = "".join(f"| {key} | `{value}` |\n" for key, value in settings.items())
        self._writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", resumed_after)
        return f"tensorboard --logdir {folder}"

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Write and flush: it is watched while the run goes on."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round_number)
        self._writer.flush()

    def finish(self, completed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE hold."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Begin, or go on with the same run; neither terminal, code nor machine are sent."""
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
    """MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME hold. A resumed run is a new one."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Begin a run of the directory's name."""
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
    """Trackio, on this machine; TRACKIO_PROJECT, TRACKIO_SPACE_ID and its other variables hold."""

    def start(self, directory: Path, settings: Mapping[str, Scalar], resumed_after: int) -> str:
        """Begin, or go on with the run of the directory's name."""
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
"""Name in `train.report-to`, and of the package that must be installed → tracker."""


def trackers_of(report_to: str) -> dict[str, Tracker]:
    """Return the trackers that `train.report-to` names; nothing is started.

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
    """Return what a tracker may know of the recipe: of local files the name alone."""
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in config.flat().items()
        if key not in PLACES
    }


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what a tracker is told of one line of metrics.jsonl."""
    figures = {name: float(record[name]) for name in FIGURES if record.get(name) is not None}
    if "cohort" in record:
        figures["good-replies"] = float(len(record["good"]))
        figures["failed-replies"] = float(len(record["failed"]))
    return figures


class Tracked(Listener):
    """A run's listener that reports to trackers too, after the one that it wraps.

    The trackers are ended with the run, however that ends.
    """

    def __init__(self, config: Config, listener: Listener, trackers: Mapping[str, Tracker]) -> None:
        self._settings = settings_of(config)
        self._listener = listener
        self._waiting = dict(trackers)
        self._active: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        self._listener.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.__exit__(kind, error, trace)
        for name, tracker in list(self._active.items()):
            with self._kept_apart(name):
                tracker.finish(kind is None)

    def on_plan(self, plan: Facts) -> None:
        """Start the trackers."""
        self._listener.on_plan(plan)
        self._start(Path(plan["directory"]), plan.get("resumed-after") or 0)

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        """Pass it on; trackers learn nothing of single sites."""
        self._listener.on_roll_call(sites)

    def on_reply(self, site: int, failure: str | None) -> None:
        """Pass it on; trackers learn nothing of single sites."""
        self._listener.on_reply(site, failure)

    def on_checkpoint(self, round_number: int, folder: str) -> None:
        """Pass it on."""
        self._listener.on_checkpoint(round_number, folder)

    def on_finished(self, summary: Facts) -> None:
        """Pass it on; trackers are ended by `__exit__`."""
        self._listener.on_finished(summary)

    def on_round(self, record: Facts) -> None:
        """Log the round's figures."""
        self._listener.on_round(record)
        figures = figures_of(record)
        for name, tracker in list(self._active.items()):
            with self._kept_apart(name):
                tracker.log(record["round"], figures)

    def _start(self, directory: Path, resumed_after: int) -> None:
        for name, tracker in self._waiting.items():
            with self._kept_apart(name):
                where = tracker.start(directory, self._settings, resumed_after)
                self._active[name] = tracker
                print(f"reports to {name}: {where}", file=sys.stderr)

    @contextmanager
    def _kept_apart(self, name: str) -> Iterator[None]:
        """Keep a tracker's failure from the run, and its words from the run's own output."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # whatever a tracker's library raises, the run goes on
            self._active.pop(name, None)
            reason = first_line(error)
            print(
                f"grandrounds: {name} failed and is switched off; the run goes on: {reason}",
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
