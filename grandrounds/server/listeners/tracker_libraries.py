"""The experiment trackers, each through its own library.

They receive a run's name, recipe and figures. What else a library would send by itself (host,
user, program, terminal, code, machine) is switched off as far as it can be; docs/export.md lists
the rest.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from grandrounds.config.values import Scalar
from grandrounds.config.words import command

PROJECT = "grandrounds"
"""Project or experiment, if the environment names none."""

WITHOUT_REPORTS = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
"""Environment in which the libraries report nothing about themselves to their makers."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told at the start of a run, or of a part of it."""

    directory: Path
    """The run directory; its last part is the run's name."""
    key: str
    """The run's own key, which a resume keeps: no name of a folder tells two runs apart."""
    settings: Mapping[str, Scalar]
    """The recipe."""
    resumed_after: int = 0
    """The round after which it goes on; 0 for a new run."""

    @property
    def name(self) -> str:
        """The name shown for the run."""
        return self.directory.name

    @property
    def identity(self) -> str:
        """The run's identity at a tracker: 16 hexadecimal digits.

        A run that has gone back to an earlier round is another one there, since trackers do not
        take a round twice. Runs of early versions have no key (`0`); their place stands for it.
        """
        times_gone_back = len(list(self.directory.glob("aside-*")))
        own = str(self.directory) if self.key == "0" else self.key
        return hashlib.sha256(f"{own} {times_gone_back}".encode()).hexdigest()[:16]


class Tracker(Protocol):
    """One tracker of one run."""

    def start(self, run: TrackedRun) -> str:
        """Start, and return where to find the run."""

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a round."""

    def finish(self, completed: bool) -> None:
        """Send what is left, and end."""


class Library(Tracker, Protocol):
    """A tracker that may speak to a server."""

    def prepare(self) -> None:
        """Load the library, and set up what is on this machine; no server is asked."""


class TensorBoard:
    """Event files in the run directory, under `tensorboard/`."""

    def start(self, run: TrackedRun) -> str:
        """Start; for a resumed run, purge the rounds that are repeated."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.directory / "tensorboard"
        purge = run.resumed_after + 1 if run.resumed_after else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        rows = "".join(f"| {key} | `{value}` |\n" for key, value in run.settings.items())
        self._writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", run.resumed_after)
        return command("tensorboard", "--logdir", folder)

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

    def prepare(self) -> None:
        """Load the library."""
        import wandb

        self._wandb: Any = wandb

    def start(self, run: TrackedRun) -> str:
        """Start or continue the run, without host, user, terminal, code or machine."""
        self._run: Any = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.identity,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.settings),
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                host="",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        if self._run.offline:
            return command("wandb", "sync", Path(self._run.dir).parent)
        return str(self._run.url)

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log with the round as the step."""
        self._run.log(dict(figures), step=round_number)

    def finish(self, completed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=0 if completed else 1)


class MLflow:
    """MLflow; respects MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME. A resume is a new run.

    Its client is used rather than `mlflow.start_run`, which adds tags: login, program, commit.
    """

    def prepare(self) -> None:
        """Load the library; create the database, where it is a file of this machine."""
        import mlflow

        self._mlflow: Any = mlflow
        if urlsplit(mlflow.get_tracking_uri()).scheme in ("", "file", "sqlite"):
            self._client: Any = mlflow.MlflowClient()

    def start(self, run: TrackedRun) -> str:
        """Start a run named after the directory; the tag `grandrounds.run` is its identity."""
        self._client = self._mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if experiment is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._mlflow.set_experiment(name).experiment_id
        tags = {"grandrounds.run": run.identity}
        made = self._client.create_run(experiment, tags=tags, run_name=run.name)
        self._id: str = made.info.run_id
        entities = self._mlflow.entities
        told = [entities.Param(key, str(value)) for key, value in run.settings.items()]
        self._client.log_batch(self._id, params=told)
        return f"MLflow at {self._mlflow.get_tracking_uri()}, run {self._id}"

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log with the round as the step."""
        metric, now_ms = self._mlflow.entities.Metric, int(time.time() * 1000)
        told = [metric(name, value, now_ms, round_number) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=told)

    def finish(self, completed: bool) -> None:
        """End the run with its status."""
        self._client.set_terminated(self._id, "FINISHED" if completed else "FAILED")


class Trackio:
    """Trackio, on this machine; respects TRACKIO_PROJECT, TRACKIO_SPACE_ID and others."""

    def prepare(self) -> None:
        """Load the library; on this machine it asks the hub for no user name."""
        if not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):
            os.environ["HF_HUB_OFFLINE"] = "1"
        import trackio

        self._trackio: Any = trackio

    def start(self, run: TrackedRun) -> str:
        """Start or continue the run; Trackio continues by name, so the identity is part of it."""
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._trackio.init(
            project=project,
            name=f"{run.name}-{run.identity[:8]}",
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return command("trackio", "show", "--project", project)

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Log with the round as the step."""
        self._trackio.log(dict(figures), step=round_number)

    def finish(self, completed: bool) -> None:
        """Wait until everything is written."""
        self._trackio.finish()


LIBRARIES: dict[str, Callable[[], Library]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Name in `train.report-to`, which is also the required package → tracker in its own process."""

NAMES = ("tensorboard", *LIBRARIES)
"""Every tracker's name."""
