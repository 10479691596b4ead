"""What a site's policy says to what a run asks."""

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
    """What a run asks of a site, as far as a policy has a say in it."""

    base: str
    """`model.name` of the run."""
    prompt_template: str
    """`data.prompt-template` of the run."""
    target_modules: tuple[str, ...]
    """The modules that the adapter is on."""
    rank: int
    """The highest rank that the site holds."""
    steps: int
    """Optimizer steps of one visit."""
    examples: int
    """Examples of one visit, repeats counted."""
    batch: int
    """Examples that go through the model at a time."""

    def as_dict(self) -> dict[str, object]:
        """Return it for the audit log."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}


def asked_of(config: Config, targets: Sequence[str], num_examples: int) -> Asked:
    """Return what a run asks of a site with so many examples to train on."""
    rank = Ranks.of(config).resident
    examples = examples_of_a_visit(config, num_examples)
    steps = math.ceil(examples / config.examples_per_step)
    name, template = config.model.name, config.data.prompt_template
    batch = config.arguments.per_device_train_batch_size
    return Asked(name, template, tuple(targets), rank, steps, examples, batch)


def check_base(site: SiteFile, name: str, sha256: str) -> None:
    """Raise `PolicyError` if the site's copy of a base is not what its file says."""
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
            f"{_forbids(site)}: it asks for the base {name!r}, and the site's bases are "
            f"{', '.join(map(repr, site.bases))}.{nearest(name, site.bases)}"
        )


def check_run(site: SiteFile, asked: Asked, num_examples: int) -> None:
    """Raise `PolicyError` if the site's policy forbids what a run asks; all reasons are told."""
    policy = site.policy
    templates, targets = words_of(policy.prompt_templates), words_of(policy.target_modules)
    other = [name for name in asked.target_modules if name not in targets]
    reasons = [
        reason
        for is_so, reason in (
            (
                asked.prompt_template not in templates,
                f"prompt-templates = {policy.prompt_templates!r}, it asks for "
                f"{asked.prompt_template!r}",
            ),
            (
                bool(other),
                f"target-modules = {policy.target_modules!r}, it asks for {', '.join(other)}",
            ),
            (
                asked.rank > policy.max_rank,
                f"max-rank = {policy.max_rank}, it asks for {asked.rank}",
            ),
            (
                asked.steps > policy.max_steps_per_visit,
                f"max-steps-per-visit = {policy.max_steps_per_visit}, it asks for {asked.steps}",
            ),
            (
                asked.examples < policy.min_examples_per_visit,
                f"min-examples-per-visit = {policy.min_examples_per_visit}, it asks for "
                f"{asked.examples}",
            ),
            (
                asked.batch > policy.max_batch,
                f"max-batch = {policy.max_batch}, it asks for {asked.batch}",
            ),
            (
                asked.examples > policy.max_examples_per_visit,
                f"max-examples-per-visit = {policy.max_examples_per_visit}, it asks for "
                f"{asked.examples}",
            ),
            (
                num_examples < policy.min_examples,
                f"min-examples = {policy.min_examples}, there are {num_examples} to train on",
            ),
        )
        if is_so
    ]
    if reasons:
        raise PolicyError(f"{_forbids(site)}: {'; '.join(reasons)}.")


def check_visits(site: SiteFile, visits_today: int) -> None:
    """Raise `PolicyError` if the site has been visited as often as it lets itself in 24 hours."""
    most = site.policy.max_visits_per_day
    if visits_today >= most:
        raise PolicyError(
            f"{_forbids(site)}: max-visits-per-day = {most}, and there were {visits_today} in the "
            "last 24 hours."
        )


MOST_QUESTIONS_PER_DAY = 2000
"""Roll calls that a site answers in 24 hours: one begins a run, and one each return to it."""


def check_questions(site: SiteFile, questions_today: int) -> None:
    """Raise `PolicyError` if the site was asked who it is more often than runs ever do."""
    if questions_today > MOST_QUESTIONS_PER_DAY:
        raise PolicyError(
            f"{_forbids(site)}: it answers {MOST_QUESTIONS_PER_DAY} roll calls in 24 hours."
        )


def _forbids(site: SiteFile) -> str:
    return f"The policy of site {site.name!r} forbids this run"
