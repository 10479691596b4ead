"""Writes a dossier: a page, and the same as JSON beside it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from grandrounds import storage
from grandrounds.errors import ConfigError, DataError, RunDirectoryError
from grandrounds.study.dossier.build import dossier_of
from grandrounds.study.dossier.lines import FORMAT, Dossier

PAGE = "dossier.html"
OTHER_PLACE = "Choose another place with --out."


@dataclass(frozen=True)
class Written:
    """A dossier and where it was written."""

    dossier: Dossier
    file: Path
    """The page."""
    json_file: Path
    run: Path
    """The run directory."""
    digest: str


def run_in(target: Path) -> Path:
    """Return the run directory that a target is, or that a consortium ran last.

    Raises
    ------
    RunDirectoryError
        If a consortium's folder names no last run, and holds no run or several.
    """
    target = target.expanduser()
    if not (target / "consortium.json").is_file() or (target / "config.toml").is_file():
        return target
    from grandrounds.engines.deployment.superlink import LAST_RUN

    if (last := target / LAST_RUN).is_file():
        named = storage.read_json(last).get("directory")
        if isinstance(named, str) and (Path(named) / "config.toml").is_file():
            return Path(named)
    runs = sorted(file.parent for file in target.glob("*/config.toml"))
    if len(runs) == 1:
        return runs[0]
    found = ", ".join(str(run) for run in runs) or "none"
    raise RunDirectoryError(
        f"{target} is a consortium's folder, and a dossier is of one run. Run directories in it: "
        f"{found}. Give the folder that grandrounds run printed."
    )


def write_dossier(target: Path, out: Path | None = None) -> Written:
    """Write the dossier of a run; the JSON has the page's name with the ending .json.

    Raises
    ------
    ConfigError
        If the place is a folder or ends with .json, or jinja2 is not installed.
    DataError
        If a file cannot be written, or exists and is no dossier.
    RunDirectoryError
        If the target is no run, has not ended, or is damaged.
    """
    run = run_in(target)
    file = (out or run / PAGE).expanduser()
    if file.is_dir():
        raise ConfigError(f"--out {file} is a folder: give a file, such as {file / PAGE}.")
    if file.suffix == ".json":
        raise ConfigError(
            f"--out {file} is the page, and the JSON is written beside it: give a name such as "
            f"{file.with_suffix('.html')}."
        )
    check_jinja()
    from grandrounds.study.dossier.page import html

    dossier = dossier_of(run)
    content = dossier.as_dict()
    json_file = file.with_suffix(".json")
    with storage.writing(str(file), OTHER_PLACE, DataError):
        for there in (file, json_file):
            _check_own(there)
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(json_file, storage.json_bytes(content))
        storage.write_text(file, html(content))
    return Written(dossier, file, json_file, run, str(content["digest"]))


def check_jinja() -> None:
    """Raise `ConfigError` if jinja2 is not installed."""
    if find_spec("jinja2") is None:
        raise ConfigError(
            'a dossier needs jinja2, which is not installed: pip install "jinja2>=3.1.6"'
        )


def _check_own(file: Path) -> None:
    from grandrounds.study.dossier.page import GENERATED

    if not file.exists():
        return
    begins = file.read_bytes()[:2000]
    if GENERATED.encode() not in begins and FORMAT.encode() not in begins:
        raise DataError(
            f"{file} exists and is not a dossier of grandrounds, so it is not overwritten. "
            f"{OTHER_PLACE}"
        )
