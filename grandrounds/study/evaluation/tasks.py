"""What an evaluation asks, of which models, and where it writes: settled before a model is loaded.

A target is a run directory (its last and its best checkpoint), the folder of one adapter, or
`none`. The untouched base is always asked too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.config.recipes import load_recipe, resolve
from grandrounds.data.formulary import FORMULARY
from grandrounds.errors import ConfigError, ModelError, RunDirectoryError, nearest
from grandrounds.server.directory import RunDirectory
from grandrounds.study.evaluation.benchmarks import (
    Benchmark,
    Item,
    get_benchmark,
    load_items,
    source_of,
)
from grandrounds.study.evaluation.verification import BASE

PROTOCOLS = ("flowertune", "likelihood")
"""The ways to ask; `all` is every one of them."""

ALL = "all"
"""The name of all protocols together."""

NO_ADAPTER = "none"
"""The target that stands for the untouched base alone."""

MEDICAL = ("pubmedqa", "medqa", "medmcqa", "careqa")
"""The benchmarks of FlowerTune's medical table, asked where nothing else is said."""

WEIGHTS = "adapter_model.safetensors"
"""File of an adapter's tensors."""

QUANTIZATIONS = (0, 4, 8)
"""Bits of the base's weights; 0 stands for not quantised."""


@dataclass(frozen=True)
class Subject:
    """A model that is asked."""

    name: str
    """What its rows are called: `base`, or the name of the adapter's folder."""
    adapter: Path | None
    """The adapter's folder; None for the untouched base."""
    sha256: str | None
    """Hash of the adapter's weights file."""
    role: str
    """What the adapter is to its run, such as `last checkpoint`; empty where there is no run."""


@dataclass(frozen=True)
class Task:
    """A benchmark with what was read of it."""

    benchmark: Benchmark
    """Its description."""
    items: tuple[Item, ...]
    """What is asked, in the source's order."""
    source: dict[str, str]
    """Where the items came from, from `benchmarks.source_of`."""


@dataclass(frozen=True)
class Plan:
    """A whole evaluation."""

    subjects: tuple[Subject, ...]
    """The base first."""
    tasks: tuple[Task, ...]
    """In the order asked for."""
    protocols: tuple[str, ...]
    """Some of `PROTOCOLS`."""
    base: str
    """Hub name, local folder or `formulary`."""
    quantization: int
    """One of `QUANTIZATIONS`."""
    dtype: str
    """`auto`, `float32` or `bfloat16`."""
    prompt_template: str
    """In which the formulary is asked: the run's, `alpaca` where there is no run."""
    limit: int | None
    """Items asked of each benchmark, the first; None for all."""
    permutations: int
    """Orders of the options that protocol `likelihood` asks besides the published one."""
    out: Path
    """Folder that everything is written to."""


def make_plan(
    target: str,
    *,
    base: str | None = None,
    benchmarks: Sequence[str] | None = None,
    protocol: str = "likelihood",
    data: Path | None = None,
    quantization: int | None = None,
    limit: int | None = None,
    permutations: int = 3,
    out: Path | None = None,
) -> Plan:
    """Check what was asked for, and read the benchmarks; parameters are those of `evaluate`."""
    protocols = protocols_named(protocol)
    for name in benchmarks or ():
        get_benchmark(name)
    _check_numbers(quantization, limit, permutations)
    chosen = _target(target, base)
    names = tuple(dict.fromkeys(benchmarks or chosen.benchmarks))
    known = [get_benchmark(name) for name in names]
    tasks = tuple(Task(b, load_items(b, data, limit), source_of(b, data)) for b in known)
    return Plan(
        subjects=(Subject(BASE, None, None, ""), *chosen.adapters),
        tasks=tasks,
        protocols=protocols,
        base=chosen.base,
        quantization=chosen.quantization if quantization is None else quantization,
        dtype=chosen.dtype,
        prompt_template=chosen.prompt_template,
        limit=limit,
        permutations=permutations,
        out=(out or chosen.out).expanduser().absolute(),
    )


def protocols_named(name: str) -> tuple[str, ...]:
    """Return the protocols that a name stands for.

    Raises
    ------
    ConfigError
        If there is none of that name; the message suggests the nearest.
    """
    if name == ALL:
        return PROTOCOLS
    if name not in PROTOCOLS:
        allowed = (*PROTOCOLS, ALL)
        raise ConfigError(
            f"unknown protocol {name!r}; allowed: {', '.join(allowed)}.{nearest(name, allowed)}"
        )
    return (name,)


def _check_numbers(quantization: int | None, limit: int | None, permutations: int) -> None:
    if quantization is not None and quantization not in QUANTIZATIONS:
        allowed = ", ".join(map(str, QUANTIZATIONS))
        raise ConfigError(f"quantization must be one of {allowed} bits, got {quantization}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}; leave it out to ask every item")
    if permutations < 0:
        raise ConfigError(f"permutations must be at least 0, got {permutations}")


# --- Targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """What a target says by itself."""

    adapters: tuple[Subject, ...]
    base: str
    quantization: int
    dtype: str
    benchmarks: tuple[str, ...]
    out: Path
    prompt_template: str = "alpaca"


def _target(target: str, base: str | None) -> _Target:
    """Return what stands behind a target: `none`, a run directory, or an adapter's folder."""
    if target == NO_ADAPTER:
        if base is None:
            raise ConfigError(f"target {NO_ADAPTER!r} needs a base model: give --base MODEL")
        name = re.sub(r"[^\w.-]+", "-", base.strip("/"))
        return _Target((), base, 0, "auto", _default_benchmarks(base), Path(f"evaluation-{name}"))
    folder = Path(target).expanduser()
    if (folder / "config.toml").is_file():
        return _run_target(folder, base)
    if (folder / "adapter_config.json").is_file():
        recorded = read_adapter_config(folder).get("base_model_name_or_path")
        chosen = base or recorded
        if not chosen:
            raise ConfigError(f"{folder} does not say which base it belongs to: give --base MODEL")
        adapter = _adapter_subject(folder, "")
        out = folder / "evaluation"
        return _Target((adapter,), chosen, 0, "auto", _default_benchmarks(chosen), out)
    what = "is no such folder" if not folder.is_dir() else "is neither"
    raise ModelError(
        f"{target!r} {what}: give a run directory (with config.toml), the folder of an adapter "
        f"(with adapter_config.json), or {NO_ADAPTER!r} for the base alone"
    )


def _run_target(folder: Path, base: str | None) -> _Target:
    """Return the last and the best checkpoint of a run, with the base that it trained on."""
    config = resolve(load_recipe(folder / "config.toml"))
    chosen = base or config.model.name
    is_formulary = config.static.name == FORMULARY
    return _Target(
        _checkpoints(RunDirectory.open(folder)),
        chosen,
        config.model.quantization,
        config.model.dtype,
        ("formulary",) if is_formulary else _default_benchmarks(chosen),
        folder / "evaluation",
        config.data.prompt_template,
    )


def _default_benchmarks(base: str) -> tuple[str, ...]:
    """Return what is asked where nothing was said: the embedded base knows the formulary only."""
    return ("formulary",) if base == FORMULARY else MEDICAL


def _checkpoints(run: RunDirectory) -> tuple[Subject, ...]:
    """Return the last checkpoint, then the one of lowest held-out loss if it is another."""
    summary = run.read_json("summary.json") or {}
    best = (summary.get("best_adapter") or {}).get("adapter")
    last = summary.get("adapter")
    roles: dict[str, str] = {}
    if last:
        roles[last] = "last checkpoint"
    if best:
        roles[best] = f"{roles[best]} and lowest" if best in roles else "lowest"
        roles[best] += " held-out loss"
    if not roles:
        raise RunDirectoryError(
            f"{run.path} has no checkpoint in its summary.json. Let the run finish or resume it "
            f"(grandrounds run --resume {run.path}), or evaluate the folder of one adapter."
        )
    return tuple(_adapter_subject(run.path / name, role) for name, role in roles.items())


def _adapter_subject(folder: Path, role: str) -> Subject:
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ModelError(
            f"{folder} holds no adapter: there is no {WEIGHTS}. Save the adapter with "
            "save_pretrained, as safetensors."
        )
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name)
    name = f"adapter-{name}" if name in ("", BASE) else name
    return Subject(name, folder, hashlib.sha256(weights.read_bytes()).hexdigest(), role)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's adapter_config.json.

    Raises
    ------
    ModelError
        If it is not there or is no JSON object.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold one JSON object")
    return config
