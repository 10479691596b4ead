"""The run directory, complete and consistent after every round.

    config.toml        the resolved configuration, itself a recipe
    plan.json          the planned traffic
    environment.json   versions and platform of the server
    packages.json      every package installed beside it
    sites.json         the roll call
    roster.json        of a masked run on real sites: their agent keys
    metrics.jsonl      one line a round; line 0 is before training
    ledger.json        the traffic so far
    unfinished.jsonl   what was sent in rounds that failed or were interrupted
    masks.json         with masks, how far the last round's attempts came
    peft_<round>/      adapters that plain PEFT loads, each with a model card
    state/             the last two rounds and those of checkpoints, from which a run resumes
    sites/             of a rehearsal with personal adapters: each site's own
    summary.json       how the run ended; summary-<round>.json, where it then went on

Files and folders are written under a temporary name, flushed and renamed. safetensors, TOML and
JSON only. What a resume reads is in `state/`, under checksums (see `server/states.py`). Where a run
goes back, what it leaves behind is kept in `aside-<n>/`. A run holds a lock (.lock) while it
writes, so that no second run can use the directory.
"""

from __future__ import annotations

import copy
import errno
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError

import grandrounds
from grandrounds import storage, waiting
from grandrounds.config.keys import Config
from grandrounds.config.recipes import load_recipe, resolve, to_toml
from grandrounds.config.words import command, counted
from grandrounds.errors import ConfigError, RunDirectoryError, first_line, nearest
from grandrounds.server import states
from grandrounds.server.unfinished import UNFINISHED, text_of
from grandrounds.storage import whole_folder, writing
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.personal import PARTS
from grandrounds.wire.told import deciding_loss

SUMMARY = "summary.json"

JOURNAL = "masks.json"

KEPT, NONE_FINISHED = "finished rounds are kept", "no round was finished"
RESUME_WITH = "; resume with "
"""Parts of the note on what is kept of a run that ended early."""


class RunDirectory:
    """Reads and writes one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", timeout=0)
        self._recipe = b""
        self._recorded: list[states.Record] = []

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDirectory:
        """Create a run directory and write the configuration into it.

        Raises
        ------
        RunDirectoryError
            If the path exists and is not an empty folder, or cannot be written.
        """
        path = path.expanduser().absolute()
        check_vacant(path)
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        made = cls(path)
        made._recipe = to_toml(config.recipe()).encode()
        try:
            path.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                storage.flush_folder(folder.parent)
            storage.write_bytes(path / states.CONFIG, made._recipe)
        except OSError as error:
            for folder in missing:  # created above, innermost first
                shutil.rmtree(folder, ignore_errors=True)
            raise _no_place(path, first_line(error)) from error
        return made

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Return an existing run directory.

        Raises
        ------
        RunDirectoryError
            If the path holds no run.
        ConfigError
            If its config.toml cannot be read.
        """
        path = path.expanduser().absolute()
        if not (path / "config.toml").is_file():
            raise RunDirectoryError(
                f"{path} is not a run directory: it has no config.toml. "
                "Give the folder that a run printed at its start."
            )
        found = cls(path)
        found._recipe = storage.read_bytes(path / states.CONFIG)
        return found

    def hold(self, patience_seconds: float = 0.0) -> None:
        """Lock the directory against other runs until `release`, or until this process ends.

        File systems without locks (some network shares) are used unlocked.

        Parameters
        ----------
        patience_seconds : float
            How long another run that holds the lock is waited for.

        Raises
        ------
        RunDirectoryError
            If another run holds the lock.
        """
        with _writing(self.path), suppress(NotImplementedError):
            try:
                self._lock.acquire(timeout=patience_seconds)
            except Timeout:
                raise RunDirectoryError(
                    f"{self.path} is in use by a run that has not ended. Wait for it to end, or "
                    "stop it, then resume."
                ) from None

    def release(self) -> None:
        """Release the lock."""
        if self._lock.is_locked:
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.release()

    def discard(self) -> None:
        """Remove the directory of a run that has produced nothing."""
        self.release()
        shutil.rmtree(self.path)

    def remove(self, name: str) -> None:
        """Remove a file of this directory, if it is there."""
        with _writing(self.path):
            (self.path / name).unlink(missing_ok=True)

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file atomically."""
        with _writing(self.path):
            storage.write_json(self.path / name, data)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this directory; None if it is not there.

        Raises
        ------
        RunDirectoryError
            If it cannot be read as JSON.
        """
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError, RecursionError) as error:
            raise RunDirectoryError(
                f"{file} cannot be read as JSON ({first_line(error)})."
            ) from error

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with _writing(self.path):
            storage.append_text(self.path / states.METRICS, _lines([record]).decode())
        self._recorded.append(dict(record))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the complete lines of metrics.jsonl, without one cut short by a kill.

        Raises
        ------
        RunDirectoryError
            If it cannot be read, or a line is not what a run writes.
        """
        file = self.path / states.METRICS
        try:
            return records_of(file.read_bytes()) if file.is_file() else []
        except (OSError, ValueError, RecursionError) as error:
            raise RunDirectoryError(
                f"{file} is not what a run writes ({first_line(error)})."
            ) from error

    def append_unfinished(self, line: Mapping[str, Any]) -> None:
        """Append one line to unfinished.jsonl."""
        with _writing(self.path):
            storage.append_text(self.path / UNFINISHED, text_of([line]).decode())

    def write_unfinished(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write unfinished.jsonl anew; without a line there is no file."""
        if not lines:
            self.remove(UNFINISHED)
            return
        with _writing(self.path):
            storage.write_bytes(self.path / UNFINISHED, text_of(lines))

    def save_checkpoint(
        self, round_number: int, adapter: Adapter, peft_config: Any, card: str
    ) -> Path:
        """Write `peft_<round>/`: weights, PEFT's configuration and a model card."""
        from safetensors.numpy import save_file

        described = copy.copy(peft_config)
        described.inference_mode = True  # as PEFT saves one
        for key, value in vars(peft_config).items():
            if isinstance(value, set):  # whose order differs from process to process
                setattr(described, key, sorted(value))
        target = self.path / f"peft_{round_number}"
        with _writing(self.path), whole_folder(target, replace=True) as folder:
            save_file(dict(adapter), folder / "adapter_model.safetensors", {"format": "pt"})
            described.save_pretrained(str(folder))
            (folder / "README.md").write_text(card)
        return target

    def save_state(
        self,
        adapter: Adapter,
        state: Mapping[str, Any],
        rule_state: Mapping[str, NDArray[Any]],
        sites: Sequence[Mapping[str, Any]],
        start: Adapter | None = None,
    ) -> None:
        """Write the state after a round, with all that a resume reads.

        Parameters
        ----------
        state
            The content of state.json, with `round` and the round's line of metrics as `record`.
        sites
            The content of sites.json.
        start
            Where DoRA's magnitudes started.
        """
        copies = {
            states.CONFIG: self._recipe,
            states.METRICS: _lines([*self._recorded, state["record"]]),
            states.SITES: storage.json_bytes(list(sites)),
        }
        with _writing(self.path):
            states.save(self.path, state, adapter, rule_state, copies, start or {})

    def restore(self, recipe: bytes, records: Sequence[states.Record]) -> None:
        """Set what a resumed run goes on from: its configuration, and its lines of metrics.

        metrics.jsonl is written anew.
        """
        self._recipe, self._recorded = recipe, list(records)
        with _writing(self.path):
            storage.write_bytes(self.path / states.METRICS, _lines(records))

    def write_recipe(self, recipe: bytes) -> None:
        """Write config.toml anew, for a run that has got another length."""
        with _writing(self.path):
            storage.write_bytes(self.path / states.CONFIG, recipe)

    def keep_summary(self, round_number: int) -> None:
        """Keep summary.json of a run that goes on after its end, as `summary-<round>.json`."""
        with _writing(self.path):
            (self.path / SUMMARY).replace(self.path / f"summary-{round_number}.json")

    def remove_after(self, round_number: int) -> None:
        """Remove what was written after a round: checkpoints and states."""
        with _writing(self.path):
            for folder in (*states.checkpoints(self.path), *states.folders(self.path)):
                if states.round_of(folder) > round_number:
                    storage.remove(folder)
            for file in self._parts_after(round_number):
                file.unlink()

    def _parts_after(self, round_number: int) -> list[Path]:
        """Return the files of what sites of a rehearsal kept of their own after later rounds."""
        found = (self.path / PARTS).glob("site-*/*.safetensors")
        return [f for f in found if f.stem.isdecimal() and int(f.stem) > round_number]

    def set_aside_after(self, round_number: int) -> Path:
        """Move what was written after a round into a new folder `aside-<n>`; return it.

        The round's own metrics and checkpoint stay; metrics.jsonl, unfinished.jsonl and
        summary.json are copied. The order of the moves leaves a run that can be resumed wherever it
        is cut short.
        """
        number = 1
        while (folder := self.path / f"aside-{number}").exists():
            number += 1
        with _writing(self.path):
            folder.mkdir()
            for name in (states.METRICS, UNFINISHED, SUMMARY):
                if (file := self.path / name).is_file():
                    shutil.copyfile(file, folder / name)
            if (file := self.path / JOURNAL).is_file():
                file.rename(folder / JOURNAL)  # of a round that is played anew
            written = (*states.checkpoints(self.path), *reversed(states.folders(self.path)))
            for beyond in written:
                if states.round_of(beyond) > round_number:
                    beyond.rename(folder / beyond.name)
            for file in self._parts_after(round_number):
                place = folder / file.relative_to(self.path)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.rename(place)
            storage.flush_folder(folder)
            storage.flush_folder(self.path)
        return folder


def records_of(content: bytes) -> list[dict[str, Any]]:
    """Return the records in the content of metrics.jsonl, without a line that was cut short.

    Raises
    ------
    ValueError
        If a line is not a record with a round.
    """
    lines = content.decode("utf-8").split("\n")[:-1]  # a text in a record may hold other breaks
    records = [json.loads(line) for line in lines]
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("round"), int):
            raise ValueError(f"line {i} has no round")
    return records


def _lines(records: Sequence[states.Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _writing(path: Path) -> AbstractContextManager[None]:
    """Report a full disk or missing permission as one clear error."""

    def advice() -> str:
        if not has_finished_round(path):
            return "Free some space, or choose another place with --run-dir."
        resume = command("grandrounds", "run", "--resume", path)
        return f"Free some space; finished rounds are kept, and {resume} continues from there."

    failures = (OSError, SafetensorError)
    return writing(f"The run directory {path}", advice, RunDirectoryError, failures)


def has_finished_round(path: Path) -> bool:
    """Whether a run directory holds the state after a round of training."""
    return any(states.round_of(folder) > 0 for folder in states.folders(path))


def _no_place(path: Path, reason: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"The run directory {path} cannot be written: {reason}. "
        "Free some space, or choose another place with --run-dir."
    )


def check_vacant(path: Path) -> None:
    """Raise `RunDirectoryError` if a new run directory cannot be made at a path.

    Nothing is written.
    """
    path = path.expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunDirectoryError(
            f"{path} exists and is not an empty folder. Choose another run-directory, or "
            f"continue that run: {command('grandrounds', 'run', '--resume', path)}"
        )
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    if not parent.is_dir():
        raise _no_place(path, f"{parent} is a file: {os.strerror(errno.ENOTDIR)}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _no_place(path, f"{parent}: {os.strerror(errno.EACCES)}")


def environment() -> dict[str, Any]:
    """Return versions and platform, for environment.json."""
    packages = ("flwr", "torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy")
    return {
        "grandrounds": grandrounds.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "omp-wait-policy": os.environ.get(waiting.POLICY),
        "packages": {p: installed_version(p) for p in packages},
    }


def cpu_name() -> str:
    """Return the processor's model name; where the system does not say, its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return next(iter(named), "") or platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    """Return a package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


WORDS = ("last", "best")
"""Words accepted in place of a round's number."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved adapter of a run."""

    run: RunDirectory
    """Its run."""
    config: Config
    """The run's configuration."""
    round: int
    """The round after which it was saved."""
    folder: Path
    """The adapter's folder, which PEFT loads."""
    record: Mapping[str, Any]
    """The round's line of metrics.jsonl."""
    is_last: bool
    """Whether it is the run's latest checkpoint."""


def find_checkpoint(run_directory: Path, which: str = "last") -> Checkpoint:
    """Return a checkpoint of a run, which may be still in progress or failed.

    Parameters
    ----------
    which : str
        `last`; `best`, the one with the lowest held-out loss; or a round's number.

    Raises
    ------
    RunDirectoryError
        If there is no run, or it has no checkpoint yet, or not the requested one, or its files are
        not as the run wrote them.
    ConfigError
        If `which` is none of these.
    """
    if which not in WORDS and not (which.isascii() and which.isdigit()):
        raise ConfigError(
            f"--checkpoint {which!r} is not allowed: give last, best or the number of a round."
            f"{nearest(which, WORDS)}"
        )
    run = RunDirectory.open(run_directory)
    config = resolve(load_recipe(run.path / "config.toml"))
    metrics = run.read_metrics()
    saved = {m["round"]: m for m in metrics if "checkpoint" in m}
    if not saved:
        done = metrics[-1]["round"] if metrics else 0
        first = min(config.train.save_every_round, config.federation.num_server_rounds)
        raise RunDirectoryError(
            f"{run.path} has no checkpoint yet: {counted(done, 'round')} finished, and the first "
            f"is saved after round {first}. Wait for it, or resume a run that has ended: "
            f"{command('grandrounds', 'run', '--resume', run.path)}"
        )
    number = _round(run, saved, which)
    folder = run.path / str(saved[number]["checkpoint"])
    if not folder.is_dir():
        raise RunDirectoryError(
            f"{folder} is missing, though metrics.jsonl names it. Restore it, or choose another "
            f"checkpoint with --checkpoint: rounds {_listed(saved)}."
        )
    states.check_checkpoint(run.path, number)
    return Checkpoint(run, config, number, folder, saved[number], number == max(saved))


def _round(run: RunDirectory, saved: Mapping[int, Mapping[str, Any]], which: str) -> int:
    if which == "last":
        return max(saved)
    if which == "best":
        told = {r: deciding_loss(m) for r, m in saved.items()}
        losses = {r: loss for r, loss in told.items() if loss is not None}
        if not losses:
            raise RunDirectoryError(
                f"{run.path} measured no held-out loss at its checkpoints, so none is the best. "
                f"Choose last, or a round: {_listed(saved)}."
            )
        return min(losses, key=lambda r: losses[r])
    if int(which) not in saved:
        raise RunDirectoryError(
            f"{run.path} has no checkpoint of round {int(which)}; it has checkpoints of rounds "
            f"{_listed(saved)}."
        )
    return int(which)


def _listed(saved: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(saved)))


def default_run_directory(config: Config) -> Path:
    """Return `runs/<date>-<time>-<model>` in the current folder."""
    model = config.model.name.rstrip("/").rpartition("/")[2]
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{model}"
