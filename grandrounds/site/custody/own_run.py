"""A run as its site sees it: the run's configuration with the site's own base, threads and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache

from grandrounds.config.keys import Config
from grandrounds.data.shown import marked
from grandrounds.errors import DataError, OwnDataError, PolicyError
from grandrounds.model.base import BaseSpec
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.model.machine import specs
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.site.custody import policy
from grandrounds.site.custody.disclosure import told_examples
from grandrounds.site.custody.own_base import base_location, base_sha256
from grandrounds.site.custody.own_data import own_site, own_split, private_site
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.local_data import Site
from grandrounds.waiting import usable_cpus
from grandrounds.wire.adapter import Ranks, Shapes
from grandrounds.wire.schedule import examples_of_a_visit


def localized(site: SiteFile, config: Config) -> Config:
    """Return a run's configuration with the site's own base and threads.

    Raises
    ------
    PolicyError
        If the site has no base of that name.
    """
    policy.check_known(site, config.model.name)
    threads = site.agent.num_threads or min(config.train.num_threads, usable_cpus())
    compiles = config.arguments.torch_compile and site.agent.torch_compile
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, name=base_location(site, config.model.name), revision=""
        ),
        train=dataclasses.replace(config.train, num_threads=threads),
        arguments=dataclasses.replace(config.arguments, torch_compile=compiles),
        static=dataclasses.replace(config.static, name=f"the data of {site.name}", revision=""),
    )


def site_in_custody(site: SiteFile, own: Config, run: str, *, keeps_held_out: bool = False) -> Site:
    """Return the site's examples for a run with this configuration; with units if it is private.

    Parameters
    ----------
    keeps_held_out : bool
        Whether there are held-out examples although their loss may not be told: a weight is chosen
        on them, which stays at the site.

    Raises
    ------
    OwnDataError
        If they cannot be read. The reason may quote a row or a query, so it is only in the
        error's cause, which stays at the site.
    """
    try:
        opened = private_site if own.is_private else own_site
        found = opened(site, own.model.name, own.data, own.train.seq_length, run)
    except DataError as error:
        raise unusable(site) from error
    if site.policy.report_held_out_loss or keeps_held_out:
        return found
    return dataclasses.replace(found, held_out=(), report={**found.report, "held-out-examples": 0})


def examples_shown(site: SiteFile, config: Config, count: int) -> Iterator[str]:
    """Yield the first training examples under a run's prompt, with what is learned marked.

    They are patients' text: for the site's own screen.
    """
    own = localized(site, config)
    found = site_in_custody(site, own, "")
    tokenizer = run_tokenizer(own)
    for example in found.train[:count]:
        yield marked(example, tokenizer)


def unusable(site: SiteFile) -> OwnDataError:
    """Return what the server learns if a site's data cannot be used, whatever the reason."""
    return OwnDataError(
        f"The data of site {site.name!r} cannot be used: grandrounds site check says why there."
    )


def admit(site: SiteFile, config: Config, own: Config, num_examples: int) -> policy.Asked:
    """Return what a run requests of a site with this many training examples.

    In a private run their declared number counts: the real one would be told by a refusal.

    Raises
    ------
    PolicyError
        If the site's policy forbids it.
    """
    if config.is_on_pairs:
        raise PolicyError(
            'The run trains on preferences (train.objective = "dpo"), and a site with a policy of '
            "its own trains on answers only: what it tells of pairs has no limits yet."
        )
    if config.is_private:
        num_examples = site.privacy.declared_units
    here = dataclasses.replace(config, arguments=own.arguments)
    asked = policy.asked_of(here, _layout(*specs(own))[1], num_examples)
    asked = dataclasses.replace(asked, by_epochs=config.arguments.max_steps < 1)
    policy.check_run(site, asked, num_examples)
    return asked


def in_whole_steps(site: SiteFile, own: Config, report: Mapping[str, int]) -> Config:
    """Return a site's configuration with the steps of a visit in the place of its epochs.

    An epoch has as many examples as the site tells: if it had those that there are, the epochs that
    the policy refuses would tell how many these are, to the last one. Steps are whole, since a
    shorter last one could be the gradient of a single example.

    Parameters
    ----------
    report
        Counts of the site's rows and examples, as in `Site.report`.
    """
    if own.arguments.max_steps > 0:
        return own
    steps = examples_of_a_visit(own, told_examples(site, report)) // own.examples_per_step
    arguments = dataclasses.replace(own.arguments, max_steps=max(1, steps))
    return dataclasses.replace(own, arguments=arguments)


def shapes_at_rank(own: Config) -> Shapes:
    """Return the shapes of the whole adapter at the run's configured rank."""
    return Ranks.of(own).configured(_layout(*specs(own))[0])


@lru_cache(maxsize=8)
def _layout(base: BaseSpec, lora: LoraSpec) -> tuple[Shapes, tuple[str, ...]]:
    """Return the shapes of the adapter on the base, and its target modules."""
    shapes, targets = adapter_layout(base.name, lora)
    return shapes, targets.modules


def inventory(site: SiteFile) -> Iterator[str]:
    """Yield a description of the site's examples and of each base with its hash.

    Raises
    ------
    GrandRoundsError
        If data or a base cannot be read, or a base differs from the hash in the site's file.
    """
    try:
        report = own_split(site, private=site.is_private).report
    except DataError as error:
        place = site.data.source or "the database"
        raise OwnDataError(  # printed into the journal: the reason may quote a row
            f"The data of site {site.name!r} ({place}) cannot be used: grandrounds site check says "
            "why."
        ) from error
    yield f"{report.train_examples:,} examples to train on, {report.held_out_examples:,} held out"
    for name in site.bases:
        digest = base_sha256(site, name)
        policy.check_base(site, name, digest)
        yield f"base {name}: sha256 {digest}"
