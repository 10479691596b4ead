"""The states of a run: one folder for a round, with all that a resume reads, under checksums.

    state/round-000008/
        state.json           counters, traffic so far and the round's line of metrics
        adapter.safetensors  the global adapter
        rule.safetensors     the memory of the aggregation rule, if it has one
        start.safetensors    where DoRA's magnitudes started, if there are any
        config.toml          copies of the run directory's own files, as they are after this round
        metrics.jsonl
        sites.json
        SHA256SUMS           of these files and the round's checkpoint, as `sha256sum -c` reads it

The last two states are whole. Of older ones those with a checkpoint stay, without the adapter,
which is the checkpoint's. A state of an earlier version has neither copies nor checksums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from grandrounds import storage
from grandrounds.errors import RunDirectoryError, first_line
from grandrounds.storage import sha256_of, whole_folder
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.codecs.finite import all_finite

FOLDER = "state"
STATE, ADAPTER, RULE, SUMS = "state.json", "adapter.safetensors", "rule.safetensors", "SHA256SUMS"
START = "start.safetensors"
CONFIG, METRICS, SITES = "config.toml", "metrics.jsonl", "sites.json"
COPIES = (CONFIG, METRICS, SITES)

LAYOUT = 2
"""Of a state with copies and checksums; an earlier state.json names no layout."""

WHOLE = 2
"""States that keep their adapter."""

CHECKPOINT_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""Files of a checkpoint under the checksums of its round's state."""

_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")

Record = Mapping[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class SavedState:
    """A state as it was read, every file of it intact."""

    folder: Path
    """Where it lies."""
    data: Mapping[str, Any]
    """The content of state.json."""
    adapter: Adapter
    """The global adapter, its names sorted."""
    rule: Mapping[str, NDArray[Any]]
    """The memory of the aggregation rule; empty for one without."""
    start: Adapter
    """Where DoRA's magnitudes started, names sorted; empty without DoRA."""
    copies: Mapping[str, bytes]
    """File of the run directory → its content after the round; empty in an earlier version."""

    @property
    def round(self) -> int:
        """The round after which it was saved."""
        return round_of(self.folder)


def round_of(folder: Path) -> int:
    """Return the round of a state's or a checkpoint's folder, `round-000008` or `peft_8`."""
    return int(re.split("[-_]", folder.name)[-1])


def folders(run: Path) -> list[Path]:
    """Return the folders of a run's states by round, whether intact or not."""
    found = (run / FOLDER).glob("round-??????") if (run / FOLDER).is_dir() else iter(())
    return sorted(folder for folder in found if folder.name.removeprefix("round-").isdigit())


def rounds(run: Path) -> list[int]:
    """Return the rounds after which a state is kept, whether intact or not."""
    return [round_of(folder) for folder in folders(run)]


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints by round."""
    found = run.glob("peft_*")
    return sorted((f for f in found if f.name.removeprefix("peft_").isdigit()), key=round_of)


# --- Save -----------------------------------------------------------------------------------------


def save(
    run: Path,
    data: Mapping[str, Any],
    adapter: Adapter,
    rule: Mapping[str, NDArray[Any]],
    copies: Mapping[str, bytes],
    start: Adapter,
) -> None:
    """Write the state after a round, then remove what older states need not keep.

    Parameters
    ----------
    data
        The content of state.json, with `round`.
    copies
        Content of config.toml, metrics.jsonl and sites.json.
    start
        Where DoRA's magnitudes started; empty without DoRA.
    """
    target = run / FOLDER / f"round-{data['round']:06d}"
    with whole_folder(target, replace=True) as folder:
        save_file(dict(adapter), folder / ADAPTER)
        if rule:
            save_file(dict(rule), folder / RULE)
        if start:
            save_file(dict(start), folder / START)
        (folder / STATE).write_text(json.dumps({**data, "layout": LAYOUT}), encoding="utf-8")
        for name, content in copies.items():
            (folder / name).write_bytes(content)
        listed = {f"../../{file.relative_to(run)}": file for file in _of_checkpoint(run, target)}
        listed |= {file.name: file for file in sorted(folder.iterdir())}
        sums = "".join(f"{sha256_of(file)}  {name}\n" for name, file in listed.items())
        (folder / SUMS).write_text(sums, encoding="utf-8")
    _thin(run)


def _of_checkpoint(run: Path, state: Path) -> list[Path]:
    """Return the files of the checkpoint of a state's round, if one was saved."""
    folder = run / f"peft_{round_of(state)}"
    return [file for name in CHECKPOINT_FILES if (file := folder / name).is_file()]


def _thin(run: Path) -> None:
    """Remove the adapters of older states with a checkpoint, and all other older states."""
    for folder in folders(run)[:-WHOLE]:
        try:
            listed = _sums(folder)
        except (_DamageError, OSError):
            listed = None
        if listed and _checkpoint_files(folder, listed) and _of_checkpoint(run, folder):
            (folder / ADAPTER).unlink(missing_ok=True)
        else:
            storage.remove(folder)


# --- Read -----------------------------------------------------------------------------------------


class _DamageError(Exception):
    """A file of a state is not what a run writes."""


def read(folder: Path) -> SavedState:
    """Return a state, each file of it verified.

    Raises
    ------
    RunDirectoryError
        If a file is missing, or not as it was written. The message has no advice.
    """
    with _told(folder):
        sums = _sums(folder)
        data = _object(_content(folder, STATE))
        if sums is None and data.get("layout") is not None:
            raise _DamageError(f"{SUMS} is missing")
        if sums is not None:
            _verify(folder, sums)
        if data.get("round") != round_of(folder):
            raise _DamageError(f"{STATE} is of round {data.get('round')}")
        adapter = load_file(_adapter_file(folder, sums))
        rule = load_file(folder / RULE) if _there(folder, RULE) else {}
        start = load_file(folder / START) if _there(folder, START) else {}
        if not all(map(all_finite, (*adapter.values(), *rule.values(), *start.values()))):
            raise _DamageError(f"{ADAPTER}, {RULE} or {START} holds values that are not finite")
        copies = {name: _content(folder, name) for name in COPIES if sums is not None}
        return SavedState(folder, data, adapter, rule, start, copies)


def damaged_checkpoints(run: Path) -> list[str]:
    """Return what is wrong with the checkpoints of the states that are kept, one sentence each."""
    said = []
    for folder in folders(run):
        try:
            sums = _sums(folder) or {}
        except (_DamageError, OSError):
            continue  # told where that state is used
        for file, digest in _checkpoint_files(folder, sums).items():
            if fault := _fault(file, digest):
                said.append(f"{file} {fault}")
                break
    return said


def check_checkpoint(run: Path, round_number: int) -> None:
    """Raise `RunDirectoryError` if a checkpoint is not as it was written.

    Without a state of its round, nothing is known of it.
    """
    folder = run / FOLDER / f"round-{round_number:06d}"
    if not folder.is_dir():
        return
    try:
        sums = _sums(folder) or {}
    except (_DamageError, OSError):
        return
    for file, digest in _checkpoint_files(folder, sums).items():
        if file.exists() and (fault := _fault(file, digest)):
            raise RunDirectoryError(
                f"{file} {fault}. Restore it from a copy, or choose another --checkpoint."
            )


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Raise whatever reading a state may raise as one `RunDirectoryError`."""
    try:
        yield
    except _DamageError as damage:
        raise RunDirectoryError(f"{folder} is damaged: {damage}") from None
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise RunDirectoryError(f"{folder} is damaged: {first_line(error)}") from error


def _verify(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise `_DamageError` unless all files of a state are listed and as they were written."""
    for name in (STATE, ADAPTER, *COPIES):
        if name not in sums:
            raise _DamageError(f"{SUMS} does not list {name}")
    for file in folder.iterdir():
        if file.name not in sums and file.name != SUMS:
            raise _DamageError(f"{SUMS} does not list {file.name}")
    for name, digest in sums.items():
        is_own = "/" not in name
        if is_own and name != ADAPTER and (fault := _fault(folder / name, digest)):
            raise _DamageError(f"{name} {fault}")
    file = _adapter_file(folder, sums)
    own_or_not = {folder / ADAPTER: sums[ADAPTER], **_checkpoint_files(folder, sums)}
    if fault := _fault(file, own_or_not[file]):
        raise _DamageError(f"{file.name} {fault}")


def _adapter_file(folder: Path, sums: Mapping[str, str] | None) -> Path:
    """Return the file with a state's adapter: its own, or that of its checkpoint."""
    own = folder / ADAPTER
    if not own.exists() and not own.is_symlink():
        for file in _checkpoint_files(folder, sums or {}):
            if file.name == CHECKPOINT_FILES[0]:
                return file
    _check_own(own)
    return own


def _checkpoint_files(folder: Path, sums: Mapping[str, str]) -> dict[Path, str]:
    """Return the files of a state's checkpoint that its checksums list → SHA-256."""
    checkpoint = f"peft_{round_of(folder)}"
    named = {f"../../{checkpoint}/{name}": name for name in CHECKPOINT_FILES}
    run = folder.parent.parent
    return {run / checkpoint / named[n]: digest for n, digest in sums.items() if n in named}


def _sums(folder: Path) -> dict[str, str] | None:
    """Return file → SHA-256 as SHA256SUMS lists them; None if there is no such file."""
    if folder.is_symlink() or not folder.is_dir():
        raise _DamageError("it is not a folder of its own")
    if not _there(folder, SUMS):
        return None
    text = _content(folder, SUMS).decode("utf-8", errors="replace")
    lines = [_LINE.fullmatch(line) for line in text.splitlines()]
    if not lines or None in lines:
        raise _DamageError(f"{SUMS} is not a list of checksums")
    return {line[2]: line[1] for line in lines if line}


def _fault(file: Path, digest: str) -> str:
    """Return what is wrong with a file, as the end of a sentence; empty if nothing is."""
    try:
        _check_own(file)
    except _DamageError as damage:
        return str(damage).removeprefix(f"{file.name} ")
    return "" if sha256_of(file) == digest else "has another SHA-256 than when it was written"


def _check_own(file: Path) -> None:
    if file.is_symlink():
        raise _DamageError(f"{file.name} is a link, not a file of the run")
    if not file.is_file():
        raise _DamageError(f"{file.name} is {'not a file' if file.exists() else 'missing'}")


def _there(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / name).is_symlink()


def _content(folder: Path, name: str) -> bytes:
    _check_own(folder / name)
    return (folder / name).read_bytes()


def _object(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _DamageError(f"{STATE} is not valid JSON ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise _DamageError(f"{STATE} holds no object")
    return data
