"""Checks of a run's requests against a site's policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from grandrounds.config.keys import Config
from grandrounds.config.values import words_of
from grandrounds.errors import PolicyError, nearest
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.wire.adapter import Ranks
from grandrounds.wire.schedule import examples_of_a_visit


@dataclass(frozen=True)
class Asked:
    """What a run requests of a site, as far as a policy limits it."""

    base: str
    """`model.name` of the run."""
    prompt_template: str
    """`data.prompt-template` of the run."""
    target_modules: tuple[str, ...]
    """The adapted modules."""
    rank: int
    """The highest rank of the adapter at the site."""
    steps: int
    """Optimizer steps of one visit."""
    examples: int
    """Examples of one visit, counting repeats."""
    batch: int
    """Examples per batch."""

    def as_dict(self) -> dict[str, object]:
        """Return the request for the audit log."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}


def asked_of(config: Config, targets: Sequence[str], num_examples: int) -> Asked:
    """Return what a run requests of a site with this many training examples."""
    rank = Ranks.of(config).resident
    examples = examples_of_a_visit(config, num_examples)
    steps = math.ceil(examples / config.examples_per_step)
    name, template = config.model.name, config.data.prompt_template
    batch = config.arguments.per_device_train_batch_size
    return Asked(name, template, tuple(targets), rank, steps, examples, batch)


def check_base(site: SiteFile, name: str, sha256: str) -> None:
    """Raise `PolicyError` if the site's copy of a base differs from the hash in its file."""
    expected = site.bases[name].sha256
    if expected and expected != sha256:
        raise PolicyError(
            f'{_forbids(site)}: bases."{name}".sha256 = {expected}, but the files in '
            f"{site.bases[name].path or 'the package'} have {sha256}. Restore them, or correct "
            f"{site.path.name}."
        )


def check_known(site: SiteFile, name: str) -> None:
    """Raise `PolicyError` if the site has no base of this name."""
    if name not in site.bases:
        raise PolicyError(
            f"{_forbids(site)}: it requests the base {name!r}, but the site's bases are "
            f"{', '.join(map(repr, site.bases))}.{nearest(name, site.bases)}"
        )


def check_run(site: SiteFile, asked: Asked, num_examples: int) -> None:
    """Raise `PolicyError`, with all reasons, if the site's policy forbids what a run requests."""
    policy = site.policy
    templates, targets = words_of(policy.prompt_templates), words_of(policy.target_modules)
    other = [name for name in asked.target_modules if name not in targets]
    reasons = []
    if asked.prompt_template not in templates:
        reasons.append(
            f"prompt-templates = {policy.prompt_templates!r}, requested {asked.prompt_template!r}"
        )
    if other:
        reasons.append(f"target-modules = {policy.target_modules!r}, requested {', '.join(other)}")
    reasons += [
        f"{key} = {most}, requested {value}"
        for key, most, value in (
            ("max-rank", policy.max_rank, asked.rank),
            ("max-steps-per-visit", policy.max_steps_per_visit, asked.steps),
            ("max-batch", policy.max_batch, asked.batch),
            ("max-examples-per-visit", policy.max_examples_per_visit, asked.examples),
        )
        if value > most
    ]
    least = policy.min_examples_per_visit
    if asked.examples < least:
        reasons.append(f"min-examples-per-visit = {least}, requested {asked.examples}")
    if num_examples < policy.min_examples:
        reasons.append(f"min-examples = {policy.min_examples}, the site has fewer for training")
    if reasons:
        raise PolicyError(f"{_forbids(site)}: {'; '.join(reasons)}.")


def _forbids(site: SiteFile) -> str:
    return f"The policy of site {site.name!r} forbids this run"
