"""A site attacks an adapter that it received with its own examples, for its own eyes.

The attack is the likelihood ratio of tuned and untuned base (Carlini et al., Extracting training
data from large language models, 2021, section 5.2, with the base in the place of a second model):
members of the training are those whose answers the adapter made likelier. Nothing of it leaves the
site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grandrounds.config.keys import Config
from grandrounds.data.examples import Example
from grandrounds.data.tokenization import TokenizedExample, tokenize_examples
from grandrounds.errors import ConfigError, DataError
from grandrounds.model import machine
from grandrounds.model.resident import resident_model, set_adapter
from grandrounds.model.saved import check_fit, lora_spec, read_adapter, read_adapter_config
from grandrounds.model.scoring import option_log_likelihoods
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.site.custody.own_data import own_split
from grandrounds.site.custody.own_run import localized
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.study.audit.membership import Membership, membership
from grandrounds.study.audit.one_run import Scores
from grandrounds.study.tables import Table, interval, percent

FEWEST = 20
"""Held-out examples without which nothing is measured."""

MOST_EXPOSED = 10


@dataclass(frozen=True)
class SiteAudit:
    """What an attack on a received adapter found at one site."""

    tuned: Membership
    """By how much likelier the adapter made an answer."""
    untuned: Membership
    """By how likely the untuned base finds an answer: it has seen neither side."""
    exposed: tuple[tuple[int, float], ...]
    """(number of the training example, nats gained) of those that the attack is surest of."""

    @property
    def is_shifted(self) -> bool:
        """Whether the untuned base tells the sides apart: then the attack measures that too."""
        low, high = self.untuned.interval
        return not low <= 0.5 <= high


def base_of(site: SiteFile, folder: Path) -> str:
    """Return which of the site's bases an adapter belongs to.

    Raises
    ------
    ConfigError
        If that cannot be told.
    """
    named = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    if named in site.bases:
        return named
    if len(site.bases) == 1:
        return next(iter(site.bases))
    raise ConfigError(
        f"{folder} was trained on {named or 'a base that it does not name'}, which is none of this "
        f"site's bases: {', '.join(site.bases)}. Name one with --model."
    )


def audit_site(site: SiteFile, folder: Path, run: Config) -> SiteAudit:
    """Attack an adapter with a site's training examples against its held-out ones.

    Parameters
    ----------
    folder : Path
        The adapter, as PEFT saves it.
    run : Config
        Of the run that trained it: base, prompt, sequence length, precision, and whether its visits
        were private, so that examples were held out by unit.

    Raises
    ------
    DataError
        If the site holds out too few examples.
    ModelError
        If the adapter is none, or does not fit the base.
    PolicyError
        If the site does not have the base.
    """
    own = localized(site, run)
    base, _ = machine.specs(own)
    spec = lora_spec(folder)
    check_fit(folder, spec, base.name)
    is_private = run.is_private or site.is_private
    split = own_split(site, private=is_private, template=run.data.prompt_template)
    tokenizer = run_tokenizer(own)

    def ready(examples: Sequence[Example]) -> tuple[TokenizedExample, ...]:
        template, length = own.data.prompt, own.train.seq_length
        return tokenize_examples(examples, tokenizer, template, length).examples

    train, held_out = ready(split.train), ready(split.held_out)
    if len(held_out) < FEWEST or not train:
        raise DataError(
            f"The site holds out {len(held_out)} examples that can be scored; an audit needs at "
            f"least {FEWEST}, and 100 for one false alarm in a hundred. Raise "
            "data.held-out-fraction in site.toml before the next run: an adapter has seen what "
            "was not held out from it."
        )
    resident = resident_model(base, spec)
    set_adapter(resident, read_adapter(folder))
    examples = [*train, *held_out]
    after = log_likelihoods(resident.model, examples)
    with resident.model.disable_adapter():
        before = log_likelihoods(resident.model, examples)
    is_member = np.arange(len(examples)) < len(train)
    gained = after - before
    surest = np.argsort(-gained[: len(train)], kind="stable")[:MOST_EXPOSED]
    return SiteAudit(
        tuned=membership(gained, is_member),
        untuned=membership(before, is_member),
        exposed=tuple((int(i) + 1, float(gained[i])) for i in surest),
    )


def log_likelihoods(model: Any, examples: Sequence[TokenizedExample]) -> Scores:
    """Return the log-likelihood of each example's answer in nats."""
    prompts = [list(e.input_ids[: e.prompt_tokens]) for e in examples]
    answers = [[list(e.input_ids[e.prompt_tokens :])] for e in examples]
    return np.array([row[0] for row in option_log_likelihoods(model, prompts, answers)])


def tables(found: SiteAudit) -> list[Table]:
    """Return an audit as tables: the attack beside the untuned base, and the exposed examples."""
    columns = (found.tuned, found.untuned)
    rows = [
        (
            "AUC (0.5: by chance)",
            *(f"{one.auc:.3f} ({one.interval[0]:.3f} to {one.interval[1]:.3f})" for one in columns),
        )
    ]
    for hits in zip(*(one.hits for one in columns), strict=True):
        rate = hits[0].false_alarm_rate
        name = f"TPR at {percent(rate, 0 if rate >= 0.01 else 1)} FPR"
        rows.append((name, *(f"{percent(h.rate)} ({interval(h.interval)})" for h in hits)))
    sides = f"{found.tuned.members:,} trained, {found.tuned.others:,} held out"
    return [
        Table(("measure", "received adapter", "untuned base"), rows, f"membership, {sides}"),
        Table(
            ("training example", "nats gained"),
            [(f"{number:,}", f"{gain:.2f}") for number, gain in found.exposed],
            "most exposed, by number",
        ),
    ]


def notes(found: SiteAudit) -> list[str]:
    """Return how to read an audit: what a shift means, few examples, and what is not shown."""
    said = []
    if found.is_shifted:
        said.append(
            f"the untuned base already tells both sides apart (AUC {found.untuned.auc:.2f}): the "
            "split is not at random, and the adapter's column measures that shift too"
        )
    if found.tuned.others < 1000:
        said.append(
            f"with {found.tuned.others:,} held-out examples the lowest false alarm rate that can "
            "be measured is none at all: the rows at 1 % and 0.1 % may be the same"
        )
    said += [
        "intervals are at 95 %: by Clopper and Pearson for TPR, whose thresholds count as given",
        "a weak attack shows no protection: a better one may find more",
        "examples are numbered as they train, from 1; nothing of this leaves the site",
    ]
    return said
