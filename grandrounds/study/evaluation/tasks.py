"""What an evaluation asks, of which models: resolved and checked before a model is loaded.

target = find_target("runs/first")
tasks = EvaluationTasks(target, load_questions(target.benchmarks))
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.config.recipes import load_recipe, resolve
from grandrounds.config.words import command
from grandrounds.data.chat_settings import AS_IT_IS, ChatSettings
from grandrounds.data.formulary import FORMULARY
from grandrounds.errors import ConfigError, ModelError, RunDirectoryError, nearest
from grandrounds.model.saved import read_adapter_config, weights_of
from grandrounds.server.described import are_real, is_fictional
from grandrounds.server.directory import RunDirectory, find_checkpoint
from grandrounds.study.evaluation.benchmarks import HELD_OUT, MEDICAL, Questions, Task
from grandrounds.study.evaluation.greedy import GREEDY
from grandrounds.study.evaluation.likelihood import asks_in_own_prompt
from grandrounds.study.evaluation.verification import BASE
from grandrounds.study.personal import check_whole, of_site

PROTOCOLS = ("flowertune", "likelihood")
"""Evaluation protocols."""

ALL = "all"
"""Selects every protocol."""

NO_ADAPTER = "none"
"""Selects the base model alone."""

QUANTIZATIONS = (0, 4, 8)
"""Bits of the base's weights; 0 for an unquantised base."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    name: str
    """`base`, or the name of the adapter's folder."""
    adapter: Path | None = None
    """Folder of the adapter; None for the base."""
    sha256: str | None = None
    """Hash of the adapter's weights file."""
    role: str = ""
    """Role of the adapter in its run, such as `last checkpoint`."""


@dataclass(frozen=True)
class OfRun:
    """The run that a target belongs to."""

    directory: RunDirectory
    config: Config


@dataclass(frozen=True)
class Target:
    """The adapters to evaluate and the base they belong to."""

    adapters: tuple[Subject, ...]
    base: str
    """Hub name, local folder or `formulary`."""
    out: Path
    """Default output folder."""
    benchmarks: tuple[str, ...]
    """Default benchmarks."""
    quantization: int = 0
    """One of `QUANTIZATIONS`."""
    dtype: str = "auto"
    """`auto`, `float32` or `bfloat16`."""
    prompt_template: str = "alpaca"
    """Prompt template for the formulary and own questions: the one the run trained with."""
    chat: ChatSettings = AS_IT_IS
    """What the run set in its chat template."""
    run: OfRun | None = None
    """The run, if the target is its directory or one of its checkpoints."""

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """All models to evaluate, the base first."""
        return Subject(BASE), *self.adapters


@dataclass(frozen=True)
class Method:
    """Evaluation settings."""

    protocol: str = "likelihood"
    """One of `PROTOCOLS`, or `all`."""
    permutations: int = 3
    """Additional random option orders scored by `likelihood`."""
    batch_size: int | None = None
    """Prompts per forward pass; None: 16 on a CPU, and on a GPU as many as fill it. Affects answers
    by rounding only."""
    answer_tokens: int = 128
    """Maximum number of tokens that `greedy` generates for an answer."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` if a value is out of range."""
        allowed = (*PROTOCOLS, ALL)
        if self.protocol not in allowed:
            raise ConfigError(
                f"unknown protocol {self.protocol!r}; allowed: {', '.join(allowed)}."
                f"{nearest(self.protocol, allowed)}"
            )
        if self.permutations < 0:
            raise ConfigError(f"permutations must be at least 0, got {self.permutations}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch-size must be at least 1, got {self.batch_size}")
        if self.answer_tokens < 1:
            raise ConfigError(f"answer-tokens must be at least 1, got {self.answer_tokens}")

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols to evaluate multiple-choice questions by, in order."""
        return PROTOCOLS if self.protocol == ALL else (self.protocol,)


@dataclass(frozen=True)
class EvaluationTasks:
    """An evaluation: which models are asked which questions, how, and where the result goes.

    Raises
    ------
    ConfigError
        If own exams are to be asked by FlowerTune's protocol, which is that of four benchmarks.
    """

    target: Target
    questions: Questions
    method: Method = Method()
    out: Path | None = None
    """Output folder; None for the target's default."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` if a benchmark cannot be asked by the protocol."""
        own = [task.benchmark.title for task in self.asked_by("likelihood") if task.benchmark.own]
        if own and "flowertune" in self.method.protocols:
            raise ConfigError(
                f"protocol {self.method.protocol!r} cannot ask {', '.join(own)}: FlowerTune's is "
                "for published benchmarks. Use --protocol likelihood for exams of your own."
            )

    @property
    def folder(self) -> Path:
        """Absolute path of the output folder."""
        return (self.out or self.target.out).expanduser().absolute()

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols that have questions, in order."""
        every = (*self.method.protocols, GREEDY)
        return tuple(protocol for protocol in every if self.asked_by(protocol))

    @property
    def assumption(self) -> str:
        """What is assumed of an adapter away from its run, for its own questions; else empty."""
        target = self.target
        own = [task.benchmark.title for task in self.questions.tasks if in_own_prompt(task)]
        if not target.adapters or target.run is not None or not own:
            return ""
        return (
            f"{target.adapters[0].name} is not in a run directory, so the prompt that it was "
            f"trained with is unknown: the questions of {', '.join(own)} are asked in the template "
            f"{target.prompt_template!r} without chat settings. If it was trained with another, "
            "evaluate it in its run directory."
        )

    def asked_by(self, protocol: str) -> tuple[Task, ...]:
        """Return the benchmarks that a protocol asks."""
        is_open = protocol == GREEDY
        return tuple(task for task in self.questions.tasks if task.benchmark.is_open == is_open)


def in_own_prompt(task: Task) -> bool:
    """Return whether a benchmark is asked in the prompt that a run trained with."""
    return task.benchmark.is_open or asks_in_own_prompt(task.benchmark)


# --- Targets --------------------------------------------------------------------------------------


def find_target(target: str, base: str | None = None, quantization: int | None = None) -> Target:
    """Return the models that a target names.

    Parameters
    ----------
    target : str
        A run directory (its last and best checkpoints), the folder of one adapter, or `none` for
        the base alone.
    base : str, optional
        Hub name, local folder or `formulary`. Required for `none`; defaults to the base recorded by
        the run or adapter.
    quantization : int, optional
        One of `QUANTIZATIONS`; defaults to the run's, or 0.

    Raises
    ------
    ConfigError
        If the base is missing, or `quantization` is not allowed.
    ModelError, RunDirectoryError
        If the target is none of these, or contains no adapter.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        allowed = ", ".join(map(str, QUANTIZATIONS))
        raise ConfigError(f"quantization must be one of {allowed} bits, got {quantization}")
    found = _find(target, base)
    return found if quantization is None else replace(found, quantization=quantization)


def _find(target: str, base: str | None) -> Target:
    if target == NO_ADAPTER:
        if base is None:
            raise ConfigError(f"target {NO_ADAPTER!r} needs a base model: use --base MODEL")
        out = Path(f"evaluation-{_file_name(base.strip('/'))}")
        return Target((), base, out, _default_benchmarks(base))
    folder = Path(target).expanduser()
    if (folder / "config.toml").is_file():
        return _run_target(folder, base)
    if (folder / "adapter_config.json").is_file():
        chosen = base or _base_of(read_adapter_config(folder))
        if not chosen:
            raise ConfigError(f"{folder} does not record its base model: use --base MODEL")
        adapters, out = (_adapter_subject(folder),), folder / "evaluation"
        alone = Target(adapters, chosen, out, _default_benchmarks(chosen))
        return _as_trained(alone, folder.resolve().parent)
    what = "is no such folder" if not folder.is_dir() else "is neither"
    raise ModelError(
        f"{target!r} {what}: expected a run directory (with config.toml), the folder of an adapter "
        f"(with adapter_config.json), or {NO_ADAPTER!r} for the base alone"
    )


def _base_of(described: Mapping[str, Any]) -> str:
    """Return the base that an adapter's configuration names, with its revision; empty if none."""
    name, revision = described.get("base_model_name_or_path"), described.get("revision")
    return f"{name}@{revision}" if name and revision else str(name or "")


def _run_target(folder: Path, base: str | None) -> Target:
    """Return the last and the best checkpoint of a run, on the base it trained on."""
    config = resolve(load_recipe(folder / "config.toml"))
    chosen = base or config.model.source
    directory = RunDirectory.open(folder)
    alone = Target(_checkpoints(directory), chosen, folder / "evaluation", MEDICAL)
    return _of_run(alone, directory, config)


def _of_run(target: Target, directory: RunDirectory, config: Config) -> Target:
    """Return a target with what its run set."""
    return replace(
        target,
        benchmarks=_benchmarks_of_run(directory, config, target.base),
        quantization=config.model.quantization,
        dtype=config.model.dtype,
        prompt_template=config.data.prompt,
        chat=ChatSettings(*config.data.chat),
        run=OfRun(directory, config),
    )


def _as_trained(target: Target, folder: Path) -> Target:
    """Return the target of one adapter with its run, if its parent folder is one."""
    if not (folder / "config.toml").is_file():
        return target
    return _of_run(target, RunDirectory.open(folder), resolve(load_recipe(folder / "config.toml")))


def _benchmarks_of_run(directory: RunDirectory, config: Config, base: str) -> tuple[str, ...]:
    """Return the default benchmarks of a run.

    The exam of built-in data if it learned from them; its own held-out rows if it learned from a
    local file, as long as this machine has them; else those of its base.
    """
    if is_fictional(config, directory.read_json("sites.json") or []):
        return (config.static.name,)
    is_local = Path(config.static.name).is_absolute() and bool(config.data.held_out_fraction)
    is_local = is_local and config.data.prompt_template != "text"  # which has no questions
    return (
        (HELD_OUT,)
        if is_local and not rows_are_elsewhere(directory, config)
        else _default_benchmarks(base)
    )


def rows_are_elsewhere(directory: RunDirectory, config: Config) -> bool:
    """Return whether a run is of a deployment, whose rows are at the sites."""
    return bool(config.federation.consortium) or are_real(directory.read_json("sites.json") or [])


def _default_benchmarks(base: str) -> tuple[str, ...]:
    """Return the default benchmarks of a base: the embedded one knows the formulary only."""
    return (FORMULARY,) if base == FORMULARY else MEDICAL


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
            f"({command('grandrounds', 'run', '--resume', run.path)}), or evaluate the folder of "
            "one adapter."
        )
    return tuple(_adapter_subject(run.path / name, role) for name, role in roles.items())


def with_site(target: Target, site: str) -> Target:
    """Return a run's last checkpoint beside the personal adapter of one of its sites.

    Raises
    ------
    ConfigError, RunDirectoryError
        If the target is no run, or the site has no personal adapter in it.
    """
    if target.run is None or len(target.adapters) < 1:
        raise ConfigError(f"--site {site} needs a run directory, whose sites have adapters.")
    last = of_site(find_checkpoint(target.run.directory.path), site)
    is_whole = target.run.config.personalisation.name != "shared-a"
    shared = [one for one in target.adapters if one.role.startswith("last") and is_whole]
    return replace(
        target,
        adapters=(*shared, _adapter_subject(last.folder, "personal adapter")),
        out=target.out.with_name(f"evaluation-{last.folder.name}"),
    )


def without_site(target: Target) -> Target:
    """Return a target as it is; raise `ConfigError` if its run has no adapter without a site's."""
    if target.run is not None and target.run.config.personalisation.name == "shared-a":
        check_whole(find_checkpoint(target.run.directory.path))
    return target


def _adapter_subject(folder: Path, role: str = "") -> Subject:
    weights = weights_of(folder)
    name = _file_name(folder.resolve().name)
    name = f"adapter-{name}" if name in ("", BASE) else name
    return Subject(name, folder, hashlib.sha256(weights.read_bytes()).hexdigest(), role)


def _file_name(text: str) -> str:
    """Return a text with everything that does not belong in a file name replaced."""
    return re.sub(r"[^\w.-]+", "-", text)
