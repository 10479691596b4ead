"""`grandrounds site check`: what keeps a site from its first round, one finding per line."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from grandrounds.config.keys import Config
from grandrounds.config.words import counted
from grandrounds.data.chat_settings import ChatSettings
from grandrounds.data.examples import Examples
from grandrounds.data.tokenization import tokenize_examples
from grandrounds.engines.deployment import joining, keys, rosters
from grandrounds.engines.deployment.findings import Finding, validity
from grandrounds.engines.deployment.server_checks import check_server
from grandrounds.errors import ConfigError, GrandRoundsError
from grandrounds.model import headroom
from grandrounds.model.tokenizers import dated, tokenizer_of
from grandrounds.site.custody import agent_key, budget_report, policy, quota
from grandrounds.site.custody.identifiers import in_words
from grandrounds.site.custody.own_base import base_location, base_sha256
from grandrounds.site.custody.own_data import own_identifiers, own_split, units_alike
from grandrounds.site.custody.own_run import (
    admit,
    in_whole_steps,
    localized,
    site_in_custody,
)
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import opened
from grandrounds.site.private import accountant

MOST_TOKENISED = 10_000
"""Examples whose tokens are counted where a site holds more than fit in memory."""


def check(site: SiteFile, config: Config, *, is_asked: bool = False) -> Iterator[Finding]:
    """Check a site against a run configuration and yield the findings.

    Checks that depend on a failed one are skipped.

    Parameters
    ----------
    is_asked : bool
        Whether to check that the policy admits a run with exactly this configuration.
    """
    for subject, look in (
        ("state", _state),
        ("data", _data),
        ("privacy", _privacy),
        ("bases", lambda s: _bases(s, config)),
        ("recipe", lambda s: _recipe(s, config) if is_asked else ()),
        ("node key", _node_key),
        ("roster", _roster),
        ("authority", _authority),
        ("server", check_server),
    ):
        try:
            yield from look(site)
        except GrandRoundsError as error:
            yield Finding("error", subject, str(error))


def _state(site: SiteFile) -> Iterator[Finding]:
    with opened(site.place(site.agent.state)) as state:
        visits = quota.visits_today(state)
        yield Finding("ok", "state", f"{state.folder}, {visits} visits in 24 hours")
    if is_hidden(site.path.parent.resolve()):
        yield Finding(
            "warning",
            "state",
            f"{site.path.parent} is in a home directory, which the SuperNode's unit cannot access: "
            "move the site's folder, for example to /srv, and join again",
        )
    mode = site.path.stat().st_mode & 0o077
    if mode and ":" in site.data.database:
        yield Finding(
            "warning",
            "state",
            f"{site.path} names a database and is readable by others: chmod 600 {site.path}",
        )


def is_hidden(folder: Path) -> bool:
    """Whether the SuperNode's unit cannot access a folder (ProtectHome)."""
    return folder.parts[1:2] in (("home",), ("root",))


def _data(site: SiteFile) -> Iterator[Finding]:
    """Rows, duplicates, held-out examples, and whether the policy's minimum is reached."""
    report = own_split(site, private=site.is_private).report
    yield Finding(
        "ok",
        "data",
        f"{report.rows:,} rows: {report.train_examples:,} training examples, "
        f"{report.held_out_examples:,} held out, {report.duplicate_rows:,} duplicate, "
        f"{report.empty_rows:,} without question or answer",
    )
    yield from _identifiers(site)
    file = site.place(site.data.source)
    if site.data.source and file.is_file() and file.stat().st_mode & 0o007:
        yield Finding(
            "warning",
            "data",
            f"{file} is readable by every user, and so by the code of a run: chmod 600 {file}",
        )
    if report.train_examples < site.policy.min_examples:
        yield Finding(
            "error",
            "policy",
            f"policy.min-examples = {site.policy.min_examples}, but there are only "
            f"{report.train_examples} training examples: the site would take part in no run.",
        )


def _privacy(site: SiteFile) -> Iterator[Finding]:
    """The privacy budget, and the units that are really there; only the operator sees these."""
    privacy = site.privacy
    if not privacy.declared_units:
        told = "no private visits (privacy.declared-units = 0)"
        yield Finding("ok", "privacy", told)
        return
    accountant.check_installed()
    with opened(site.place(site.agent.state)) as state:
        budget = budget_report.report(site, state)
        split = own_split(site, private=True)
    required = "every run" if privacy.requires_units else "only runs that ask for it"
    yield Finding(
        "ok" if budget["started"] and budget["epsilon-left"] > 0 else "warning",
        "privacy",
        f"{required}; {budget_report.headline(budget)}",
    )
    units = len(set(split.units))
    declared = privacy.declared_units * (1 - site.data.held_out_fraction)
    is_far = not 0.5 * declared <= units <= 2 * declared
    yield Finding(
        "warning" if is_far else "ok",
        "units",
        f"{units:,} {privacy.unit}s to train on, {len(split.train):,} records of theirs; "
        f"{privacy.declared_units:,} units declared"
        + (": the steps are sized for the declared number" if is_far else ""),
    )
    if pairs := units_alike(site):
        one, other = pairs[0]
        yield Finding(
            "warning",
            "units",
            f"{counted(len(pairs), 'name')} in {privacy.unit_column!r} "
            f"{'differs' if len(pairs) == 1 else 'differ'} from another in case "
            f"or in how a number is written, such as {one!r} and {other!r} (for this screen only): "
            "a patient under two names is two units, each with the whole guarantee",
        )


def _identifiers(site: SiteFile) -> Iterator[Finding]:
    """What looks like identifiers of persons in the site's examples, counted by kind."""
    if site.data.identifiers == "off":
        return
    found = own_identifiers(site, private=site.is_private)
    level, told = "warning" if found.counts else "ok", in_words(found.counts, found.examples)
    if site.data.identifiers == "refuse" and found.certain:
        level = "error"
        told += '; with data.identifiers = "refuse" the site takes part in no run'
    yield Finding(level, "identifiers", told)


def _bases(site: SiteFile, config: Config) -> Iterator[Finding]:
    """Presence and hash of each base model, token counts under its tokenizer, memory."""
    split = None
    with suppress(GrandRoundsError):  # already reported under data
        template = config.data.prompt_template
        split = own_split(site, private=site.is_private, template=template)
    for name, base in site.bases.items():
        try:
            found = base_sha256(site, name)
            chosen = ChatSettings(*config.data.chat)
            tokenizer = tokenizer_of(base_location(site, name), chosen)
        except GrandRoundsError as error:
            yield Finding("error", f"base {name}", str(error))
            continue
        if base.sha256 and base.sha256 != found:
            yield Finding(
                "error",
                f"base {name}",
                f"sha256 = {base.sha256} in {site.path.name}, but that of its files is {found}",
            )
        else:
            known = "as in site.toml" if base.sha256 else "not compared: none in site.toml"
            yield Finding("ok", f"base {name}", f"sha256 {found}, {known}")
        if split is None:
            continue
        length = config.train.seq_length
        told = split.train[:MOST_TOKENISED] if isinstance(split.train, Examples) else split.train
        of_first = f" of the first {len(told):,}" if len(told) < len(split.train) else ""
        done = tokenize_examples(told, tokenizer, config.data.prompt, length)
        tokens = [len(e.input_ids) for e in done.examples] or [0]
        yield Finding(
            "ok" if done.examples else "error",
            f"tokens under {name}",
            f"median {statistics.median(tokens):.0f} per example{of_first}, maximum "
            f"{max(tokens)}; "
            f"{done.truncated:,} answers truncated at {length}, {done.unlearnable:,} questions "
            "leave no room for an answer",
        )
        yield from _memory(site, config, name)


def _recipe(site: SiteFile, config: Config) -> Iterator[Finding]:
    """Whether the policy admits such a run."""
    policy.check_recipe(site, config)
    own = dated(localized(site, config))  # a run comes with the day on which it starts
    examples = site_in_custody(site, own, "")
    visiting = in_whole_steps(site, own, examples.report)
    asked = admit(site, config, visiting, len(examples.train))
    yield Finding(
        "ok",
        "recipe",
        f"within the policy: base {asked.base}, rank {asked.rank}, {asked.steps} steps and "
        f"{asked.examples} examples per visit",
    )


def _memory(site: SiteFile, config: Config, name: str) -> Iterator[Finding]:
    """Estimated peak memory against what is free."""
    here = replace(config, model=replace(config.model, name=base_location(site, name)))
    free, subject = headroom.free_bytes(), f"memory for {name}"
    plain, checkpointed = (headroom.site_needs(here, checkpointing=c) for c in (False, True))
    if plain is None or checkpointed is None:
        yield Finding("warning", subject, "unknown architecture; memory cannot be estimated")
        return
    told = (
        f"{headroom.size_text(plain.total)} estimated, "
        f"{headroom.size_text(checkpointed.total)} with gradient checkpointing; "
        f"{headroom.size_text(free)} available"
    )
    fits = checkpointed.total <= headroom.HEADROOM * free
    yield Finding("ok" if fits else "warning", subject, told)


def _node_key(site: SiteFile) -> Iterator[Finding]:
    """The key's fingerprint, whether it was revoked, and whether another waits for admission."""
    key = keys.read_private_key(site.place(site.node.private_key))
    own = keys.fingerprint(key.public_key())
    folder = site.path.parent
    if (folder / joining.NEXT_KEY).exists():
        yield Finding(
            "warning",
            "node key",
            f"{folder / joining.NEXT_KEY} waits for its admission: send "
            f"{folder / joining.NEXT_REQUEST} to the consortium, and join",
        )
    for entry in joining.revocations(folder):
        if entry["node"] == own:
            raise ConfigError(
                f"{own} was revoked by the consortium at {entry['revoked']}: no run accepts this "
                "site. To return, start with grandrounds site init in a new folder."
            )
    yield Finding("ok", "node key", own)


def _roster(site: SiteFile) -> Iterator[Finding]:
    """The agent keys that the site has accepted, and which of them were revoked since."""
    secure, masked = site.secure, site.privacy.requires_masks
    if (roster := agent_key.accepted(site)) is None:
        if masked:
            raise ConfigError(
                f"privacy.require = {site.privacy.require!r}, but there is no "
                f"{site.place(secure.roster)}: accept the consortium's roster (grandrounds site "
                "accept-roster); until then the site takes part in no run."
            )
        return
    if gone := rosters.revoked_members(site, roster):
        raise ConfigError(
            f"{site.place(secure.roster)} lists {', '.join(map(repr, gone))}, which the "
            "consortium has revoked: accept a new roster (grandrounds site accept-roster)."
        )
    text = f"serial {roster.serial}, {len(roster.members)} sites, {rosters.digest_text(roster)}"
    yield Finding("ok", "roster", text)
    required = "every update masked" if masked else "masked sums where a run asks for them"
    text = f"{required}, of {secure.min_cohort} sites or more (secure.min-cohort)"
    if len(roster.members) < secure.min_cohort:
        text += f", and the roster has {len(roster.members)}: no masked run is answered"
        yield Finding("warning", "masks", text)
    else:
        yield Finding("ok", "masks", text)


def _authority(site: SiteFile) -> Iterator[Finding]:
    file = site.place(site.node.root_certificates)
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing: the consortium's admission contains it (grandrounds site join)."
        )
    certificate = keys.read_certificate(file)
    yield validity("authority", "certificate authority", keys.days_left(certificate))


def all_findings(
    site: SiteFile, config: Config, tell: Callable[[Finding], None], *, is_asked: bool = False
) -> bool:
    """Report every finding as it comes; return whether none is an error."""
    good = True
    for finding in check(site, config, is_asked=is_asked):
        tell(finding)
        good = good and finding.level != "error"
    return good
