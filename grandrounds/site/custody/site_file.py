"""site.toml: the locations of a site's data, base models and state, and the site's policy.

The defaults and the meaning of each key are in `templates/site.toml`, the file that
`grandrounds site init` writes. Paths are relative to the folder of the site's file.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from grandrounds.config.prompt import BUILT_IN, is_listable, packaged
from grandrounds.config.recipes import table_at
from grandrounds.config.strategies import PERSONALISATIONS, STRATEGIES
from grandrounds.config.validation import check_value
from grandrounds.config.values import OneOf, Range, words_of
from grandrounds.config.words import has_controls
from grandrounds.errors import ConfigError, nearest
from grandrounds.site.custody.together import finish
from grandrounds.storage import expanded
from grandrounds.wire.guarantee import PATIENT, RECORD
from grandrounds.wire.masks.attempt import LEAST_COHORT, MOST_SITES

UNITS, MASKED = ("example", "example+masked"), ("masked", "example+masked")
"""Values of `privacy.require` with which visits must be private, and those with masks."""

REQUIRED = ("none", "example", "masked", "example+masked")
"""What a site may require of its visits."""

TEMPLATE = Path(__file__).with_name("templates") / "site.toml"

LISTS = {
    "strategies": tuple(STRATEGIES),
    "personal-adapters": PERSONALISATIONS,
    "optimizers": ("adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
    "dtypes": ("auto", "float32", "bfloat16"),
    "quantizations": ("0", "4", "8"),
}
"""Key of the policy that is a comma-separated list → its possible words."""


@dataclass(frozen=True)
class Node:
    """How the site's SuperNode reaches the consortium."""

    partition_id: Annotated[int, Range(0)]
    num_partitions: Annotated[int, Range(1)]
    superlink: str
    root_certificates: str
    private_key: str


@dataclass(frozen=True)
class OwnData:
    """The source of the site's questions and answers."""

    source: str
    database: str
    query: str
    question_column: str
    answer_column: str
    held_out_fraction: Annotated[float, Range(0, 0.9)]
    held_out_seed: Annotated[int, Range(0, 2**31 - 1)]
    identifiers: Annotated[str, OneOf(("off", "report", "refuse"))]


@dataclass(frozen=True)
class Policy:
    """What the site allows a run to do."""

    require_approval: bool
    prompt_templates: str
    target_modules: str
    strategies: str
    personal_adapters: str
    optimizers: str
    dtypes: str
    quantizations: str
    max_prompt_characters: Annotated[int, Range(0)]
    max_rank: Annotated[int, Range(1)]
    min_lora_scale: Annotated[float, Range(0, above=True)]
    max_lora_scale: Annotated[float, Range(0, above=True)]
    max_rounds: Annotated[int, Range(1)]
    min_learning_rate: Annotated[float, Range(0, 1, above=True)]
    max_learning_rate: Annotated[float, Range(0, 1, above=True)]
    max_server_learning_rate: Annotated[float, Range(0)]
    max_weight_decay: Annotated[float, Range(0, 1)]
    max_proximal_mu: Annotated[float, Range(0)]
    min_clipping_norm: Annotated[float, Range(0)]
    min_sequence_length: Annotated[int, Range(1)]
    max_sequence_length: Annotated[int, Range(8)]
    sequence_length_step: Annotated[int, Range(1)]
    min_logits_chunk_tokens: Annotated[int, Range(1)]
    max_batch: Annotated[int, Range(1)]
    max_tokens_per_batch: Annotated[int, Range(1)]
    min_examples_per_step: Annotated[int, Range(1)]
    max_steps_per_visit: Annotated[int, Range(1)]
    min_examples_per_visit: Annotated[int, Range(1)]
    max_examples_per_visit: Annotated[int, Range(1)]
    max_visits_per_day: Annotated[int, Range(1)]
    max_runs_per_day: Annotated[int, Range(1)]
    min_examples: Annotated[int, Range(1)]
    report_held_out_loss: bool


@dataclass(frozen=True)
class Tell:
    """What the site tells the server besides the change of the adapter."""

    figures: Annotated[str, OneOf(("rounded", "exact"))]
    min_held_out_examples: Annotated[int, Range(1)]
    subgroup_columns: str
    policy_hash: bool
    telemetry: bool


@dataclass(frozen=True)
class Privacy:
    """The guarantee that the site enforces for each of its units, and its budget."""

    require: str
    unit_column: str
    declared_units: Annotated[int, Range(0)]
    max_records_of_unit: Annotated[int, Range(1)]
    epsilon_total: Annotated[float, Range(0, 1000, above=True)]
    epsilon_of_run: Annotated[float, Range(0, 1000, above=True)]
    delta: Annotated[float, Range(0, 0.1, above=True)]
    min_clipping_norm: Annotated[float, Range(0, above=True)]
    max_clipping_norm: Annotated[float, Range(0, above=True)]
    max_sampling_rate: Annotated[float, Range(0, 1, above=True)]
    max_steps_of_run: Annotated[int, Range(1, 10**6)]
    report_train_loss: bool
    answer_every_seconds: Annotated[int, Range(0, 86400)]
    sequence_file: str

    @property
    def requires_units(self) -> bool:
        """Whether every visit must be private: differential privacy of each unit."""
        return self.require in UNITS

    @property
    def requires_masks(self) -> bool:
        """Whether every update must travel masked."""
        return self.require in MASKED

    @property
    def unit(self) -> str:
        """What a unit is: `patient` or `record`."""
        return PATIENT if self.unit_column else RECORD

    @property
    def all_delta(self) -> float:
        """What the deltas of all runs together must stay below."""
        return 1 / (10 * max(1, self.declared_units))


@dataclass(frozen=True)
class Secure:
    """With whom the site takes part in masked sums."""

    min_cohort: Annotated[int, Range(LEAST_COHORT, MOST_SITES)]
    roster: str


@dataclass(frozen=True)
class Agent:
    """The long-running process that holds data and base."""

    state: str
    socket: str
    socket_group: str
    address: str
    certificate: str
    key: str
    client_ca: str
    max_message_mib: Annotated[int, Range(1, 2047)]
    max_memory_mib: Annotated[int, Range(0)]
    num_threads: Annotated[int, Range(0, 1024)]
    torch_compile: bool
    log_errors_with_text: bool


@dataclass(frozen=True)
class OwnBase:
    """A base model of the site that runs may train on."""

    path: str
    sha256: str


@dataclass(frozen=True)
class SiteFile:
    """A whole site.toml, checked."""

    path: Path
    """The path of the file."""
    name: str
    """The site's name, in logs and at roll call."""
    node: Node
    data: OwnData
    policy: Policy
    tell: Tell
    privacy: Privacy
    secure: Secure
    agent: Agent
    bases: Mapping[str, OwnBase]
    """Name of a base, as in a run's `model.name` → the site's copy."""

    def place(self, name: str) -> Path:
        """Return a path from the file as an absolute path."""
        return (self.path.parent / expanded(name)).absolute()

    @property
    def is_private(self) -> bool:
        """Whether the site makes private visits only."""
        return self.privacy.requires_units

    @property
    def numbers(self) -> dict[str, int]:
        """The site's number and the number of sites, under the keys of a node's configuration."""
        node = self.node
        return {"partition-id": node.partition_id, "num-partitions": node.num_partitions}


SECTIONS: dict[str, Any] = {
    "node": Node,
    "data": OwnData,
    "policy": Policy,
    "tell": Tell,
    "privacy": Privacy,
    "secure": Secure,
    "agent": Agent,
}


def read_site_file(path: Path) -> SiteFile:
    """Read and check a site.toml.

    Raises
    ------
    ConfigError
        If it cannot be read, has an unknown key (the nearest one is suggested), has a value of
        the wrong type or out of range, or is inconsistent.
    """
    path = expanded(path).absolute()
    finish(path.parent)
    return parse_site_file(path, _text(path))


def parse_site_file(path: Path, text: str) -> SiteFile:
    """Return the site.toml with this text, as if it were at that path; raise `ConfigError`."""
    table = _toml(path, text)
    template = _toml(TEMPLATE, _text(TEMPLATE))
    known = [*SECTIONS, "name", "bases"]
    for key in table:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}.{nearest(key, known)}")
    name = table.get("name", template["name"])
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{path}: name = {name!r} must be a non-empty string.")
    for section in (*SECTIONS, "bases"):
        if not isinstance(table.get(section, {}), Mapping):
            raise ConfigError(
                f"{path}: {section} = {table[section]!r} must be a table: [{section}]."
            )
    sections = {
        section: _section(path, section, made, table_at(table, section), template[section])
        for section, made in SECTIONS.items()
    }
    found = SiteFile(path=path, name=name, bases=_bases(path, table), **sections)
    _check_together(found)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"Cannot read the site's file {path}: {error.strerror}. Create one with "
            "grandrounds site init."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def _section(
    path: Path, section: str, made: Any, given: Mapping[str, Any], template: Mapping[str, Any]
) -> Any:
    """Return one table as its dataclass, with missing values from the template."""
    names = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(made)}
    for key in given:
        if key not in names:
            raise ConfigError(
                f"{path}: unknown key {section}.{key}.{nearest(key, names)} "
                f"Known keys: {', '.join(names)}."
            )
    hints = typing.get_type_hints(made, include_extras=True)
    values = {}
    for key, field in names.items():
        try:
            value = given.get(key, template[key])
            values[field] = check_value(f"{section}.{key}", value, hints[field])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return made(**values)


def _bases(path: Path, table: Mapping[str, Any]) -> dict[str, OwnBase]:
    bases = {}
    for name, entry in table_at(table, "bases").items():
        if not isinstance(entry, Mapping) or not set(entry) <= {"path", "sha256"}:
            raise ConfigError(f'{path}: bases."{name}" must be a table of path and sha256 only.')
        texts = [str(entry.get(key, "")) for key in ("path", "sha256")]
        digest = texts[1].lower()
        if digest and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            raise ConfigError(
                f'{path}: bases."{name}".sha256 = {texts[1]!r} is not a SHA-256: 64 hex digits, '
                "as grandrounds site check prints them, or empty."
            )
        bases[name] = OwnBase(texts[0], digest)
    return bases


def _privacy_problems(site: SiteFile) -> list[tuple[bool, str]]:
    """Return what may be wrong with `[privacy]`: whether it is, and the message."""
    privacy, data = site.privacy, site.data
    return [
        (
            privacy.require not in REQUIRED,
            f"privacy.require = {privacy.require!r} is none of "
            f"{', '.join(map(repr, REQUIRED))}.{nearest(privacy.require, REQUIRED)}",
        ),
        (
            privacy.requires_masks and site.tell.figures == "exact",
            f'privacy.require = {privacy.require!r} does not go with tell.figures = "exact": '
            "exact losses and counts of this site would leave beside the sum that hides it. Set "
            '"rounded".',
        ),
        (
            privacy.requires_units and not privacy.declared_units,
            f"privacy.require = {privacy.require!r} needs privacy.declared-units: the number of "
            f"units ({privacy.unit}s) of the site, as it may be told in public. Round it.",
        ),
        (
            bool(privacy.declared_units) and privacy.delta >= privacy.all_delta,
            f"privacy.delta = {privacy.delta:g} must be below 1 / (10 x declared-units) = "
            f"{privacy.all_delta:.3g}: with more, publishing one unit whole would be allowed.",
        ),
        (
            privacy.epsilon_of_run > privacy.epsilon_total,
            f"privacy.epsilon-of-run = {privacy.epsilon_of_run:g} exceeds privacy.epsilon-total = "
            f"{privacy.epsilon_total:g}, the budget of all runs.",
        ),
        (
            privacy.min_clipping_norm > privacy.max_clipping_norm,
            f"privacy.min-clipping-norm = {privacy.min_clipping_norm:g} exceeds "
            f"privacy.max-clipping-norm = {privacy.max_clipping_norm:g}: no run can satisfy both.",
        ),
        (
            bool(privacy.unit_column)
            and privacy.unit_column in (data.question_column, data.answer_column),
            f"privacy.unit-column = {privacy.unit_column!r} is the text that is trained on: name "
            "the column of the patient, or leave it empty for rows as units.",
        ),
    ]


def _check_together(site: SiteFile) -> None:
    """Raise `ConfigError` if values contradict each other."""
    data, agent, policy, node = site.data, site.agent, site.policy, site.node
    by_tls = (agent.certificate, agent.key, agent.client_ca)
    problems = [
        (
            not site.secure.roster.strip() or has_controls(site.secure.roster),
            f"secure.roster = {site.secure.roster!r} must be the path of a file.",
        ),
        (
            bool(data.source) == bool(data.database),
            "set exactly one of data.source (a file) and data.database.",
        ),
        (
            bool(data.database) != bool(data.query),
            "data.database and data.query belong together: set both or neither.",
        ),
        (
            data.question_column.strip() == data.answer_column.strip(),
            "data.question-column and data.answer-column must name two different columns.",
        ),
        *(
            (
                not set(words_of(value)) <= set(words),
                f"policy.{key} = {value!r} must be a comma-separated list of {', '.join(words)}.",
            )
            for key, words in LISTS.items()
            for value in [getattr(policy, key.replace("-", "_"))]
        ),
        (
            not all(map(is_listable, words_of(policy.prompt_templates))),
            f"policy.prompt-templates = {policy.prompt_templates!r} must be a comma-separated list "
            f"of {', '.join((*BUILT_IN, *packaged()))}, and SHA-256 of templates of one's own (64 "
            "digits).",
        ),
        *(
            (
                low > high,
                f"policy.min-{name} = {low:g} exceeds policy.max-{name} = {high:g}: no run could "
                "satisfy both.",
            )
            for name, low, high in (
                ("lora-scale", policy.min_lora_scale, policy.max_lora_scale),
                ("learning-rate", policy.min_learning_rate, policy.max_learning_rate),
                ("sequence-length", policy.min_sequence_length, policy.max_sequence_length),
                (
                    "examples-per-visit",
                    policy.min_examples_per_visit,
                    policy.max_examples_per_visit,
                ),
            )
        ),
        (
            node.partition_id >= node.num_partitions,
            f"node.partition-id = {node.partition_id} must be below node.num-partitions = "
            f"{node.num_partitions}: sites are numbered from 0.",
        ),
        (
            bool(agent.socket) == bool(agent.address),
            "set exactly one of agent.socket (a Unix socket) and agent.address (on loopback).",
        ),
        (
            bool(agent.address) and not all(by_tls),
            "agent.address needs agent.certificate, agent.key and agent.client-ca: on a network "
            "socket both ends must authenticate.",
        ),
        (
            not site.bases,
            'there is no [bases."NAME"]: list each base that runs may train on, with its path.',
        ),
        *_privacy_problems(site),
    ]
    for is_wrong, message in problems:
        if is_wrong:
            raise ConfigError(f"{site.path}: {message}")
