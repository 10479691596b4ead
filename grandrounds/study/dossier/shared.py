"""Whose approval a run had, and what left each site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from grandrounds.config.digest import recipe_sha256
from grandrounds.config.strategies import STRATEGIES
from grandrounds.config.words import counted
from grandrounds.server.unfinished import KINDS
from grandrounds.study.dossier.lines import Line, Section, line, open_line
from grandrounds.study.dossier.record import CONFIG, EACH, LEDGER, PLAN, Fact, Record, Source
from grandrounds.wire.told import POLICY, in_custody

ROSTER = "roster.json"
"""As wire/masks/roster.py names it, which loads cryptography."""

UP = "train.up"
"""Kind of message in the ledger: a site's update."""


def approval_section(record: Record) -> Section:
    """Return who took part under whose rules, as far as the run's own files know."""
    sites, recipe = record.sites, recipe_sha256(record.run.config)
    own = [record.name(s["partition-id"]) for s in record.run.sites if in_custody(s)]
    count = len(record.run.sites)
    custody = f"{len(own)} of {count}: {', '.join(own)}" if own else f"0 of {count}"
    lines = [
        line(
            "SHA-256 of the recipe that ran",
            recipe,
            record.whole(CONFIG),
            how="what an operator approves: grandrounds site approve",
        ),
        line(
            "sites in their own custody",
            custody,
            sites,
            how="those that tell base-content; the others ran in the server's process",
        ),
        *_roster(record),
        *_policies(record),
        open_line(
            "approvals of the recipe",
            "each site's audit log: the recipe's hash, when it was approved, and the fingerprint "
            "of the key that signed it (grandrounds site log)",
            sites,
        ),
    ]
    for number in record.metrics:
        for who, why in number["refused"].entries():
            when = f"round {number['round'].whole()}"
            named = record.run.names.in_place_of_number(who)
            lines.append(line(f"refused before {when}: {named}", why.text(), why))
    return Section("approval", "Approval", lines)


def _policies(record: Record) -> Iterator[Line]:
    """Yield the hash of each policy that was told, or what would record them."""
    told = [site for site in record.sites.facts() if POLICY in site.mapping()]
    for site in told:
        name = record.name(site["partition-id"].whole())
        how = "SHA-256 of the rules in its site.toml: grandrounds site status shows it at the site"
        yield line(f"policy of {name}", site[POLICY].text(), site[POLICY], how=how)
    if not told:
        would = "sites with tell.policy-hash = true in their site.toml"
        yield open_line("policy hashes", would, record.sites)


def _roster(record: Record) -> Iterator[Line]:
    """Yield the roster of a masked run on real sites."""
    found = record.json(ROSTER)
    if not found:
        would = "a run with secure-aggregation on sites with agents (grandrounds consortium roster)"
        yield open_line("roster of agent keys", would, found)
        return
    from grandrounds.engines.deployment.keys import fingerprint
    from grandrounds.engines.deployment.rosters import digest_text
    from grandrounds.wire.masks.roster import roster_of

    content = found["content"]
    roster = roster_of(content.value, ROSTER)
    yield line(
        "roster of agent keys: digest",
        digest_text(roster),
        content,
        how="what the sites compared before they accepted it",
    )
    consortium, serial = content["consortium"], content["serial"]
    yield line(
        "roster of agent keys: serial",
        f"{serial.whole()}, of {consortium.text()}",
        serial,
        consortium,
    )
    for entry in content["sites"].facts():
        member = roster.members[entry["partition-id"].whole()]
        yield line(f"agent key of {member.name}", fingerprint(member.key), entry)


def left_section(record: Record) -> Section:
    """Return what crossed the network by kind, and what left each site."""
    ledger, plan = record.json(LEDGER), record.json(PLAN)
    total, planned = ledger["communication_mib"], plan["total-mib"]
    lines = [
        line("all messages, both ways", f"{total.number():,.2f} MiB", total),
        line("planned", f"{planned.number():,.2f} MiB", planned),
    ]
    for kind, traffic in ledger["totals"].entries():
        what, _, way = kind.rpartition(".")
        direction = "from the sites" if way == "up" else "to the sites"
        messages, size = traffic["messages"].whole(), traffic["tensor_bytes"].whole()
        told = f"{counted(messages, 'message')}, {size:,} bytes of tensors"
        lines.append(line(f"{what}, {direction}", told, traffic))
    for lost in record.unfinished:
        after = lost["after-round"]
        when = f"after round {after.whole()}" if after else "before round 0"
        sent = lost["communication-mib"]
        item = f"in a round that did not finish, {lost.source.at}"
        lines.append(line(item, f"{sent.number():,.2f} MiB, {when}", sent, after))
    lines += _updates(record)
    lines += [*_introductions(record), *_by_round(record)]
    if personal := record.summary["personal"]["sites"]:
        told = _names(record, personal.mapping())
        lines.append(line("figures of a personal adapter", told, personal))
    return Section("left", "What left each site", lines)


def _updates(record: Record) -> Iterator[Line]:
    """Yield which updates and losses of each site were used, and the bytes of its updates."""
    size, up = _bytes_of_an_update(record), record.json(LEDGER)["totals"][UP]
    good, evaluated = _every_line(record, "good"), _every_line(record, "evaluated")
    silent = []
    for site in record.sites.facts():
        number = site["partition-id"].whole()
        used = [m for m in record.metrics if number in m["good"].listed()]
        judged = [m for m in record.metrics if number in m["evaluated"].listed()]
        values, sources, how = [], list[Fact | Source](), ""
        if used:
            sent = f", {len(used) * size:,} bytes" if size is not None else ""
            values.append(f"{counted(len(used), 'update')}{_numbers(used)}{sent}")
            sources += [good, up]
            how = "all updates are of one size" if sent else "the ledger has bytes by kind only"
        if judged:
            values.append(f"{counted(len(judged), 'loss', 'losses')}{_numbers(judged)}")
            sources.append(evaluated)
        if values:
            yield line(record.name(number), "; ".join(values), *sources, how=how)
        else:
            silent.append(number)
    if silent:
        yield line("no update used, no loss", _names(record, silent), good, evaluated)


def _introductions(record: Record) -> Iterator[Line]:
    """Yield which fields the sites told of themselves, the same ones on one line."""
    told: dict[str, list[Fact]] = {}
    for site in record.sites.facts():
        told.setdefault(", ".join(site.mapping()), []).append(site)
    for number, (fields, sites) in enumerate(told.items(), 1):
        names = _names(record, [site["partition-id"].whole() for site in sites])
        item = f"fields of introductions{f', {number}' if len(told) > 1 else ''}"
        yield line(item, f"{names}: {fields}", *(sites if len(told) > 1 else [record.sites]))


def _by_round(record: Record) -> Iterator[Line]:
    """Yield the figures of single sites in metrics.jsonl: told, or computed from their updates."""
    known = {str(site["partition-id"].whole()) for site in record.sites.facts()}
    found: dict[str, dict[str, None]] = {}
    for one in record.metrics:
        for key, value in one.mapping().items():
            if isinstance(value, dict) and value.keys() <= known and key not in KINDS:
                found.setdefault(key, {}).update(dict.fromkeys(value))
    for key, sites in found.items():
        if sites:
            names = _names(record, sorted(sites, key=int))
            how = "told by the site, or computed from its update"
            yield line(f"by round: {key}", names, _every_line(record, key), how=how)


def _names(record: Record, sites: Iterable[int | str]) -> str:
    """Return how sites are called; all of them in two words."""
    listed = list(sites)
    if len(listed) == len(record.run.sites):
        return f"all {len(listed):,}" if len(listed) > 1 else record.name(listed[0])
    return ", ".join(map(record.name, listed))


def _numbers(lines: list[Fact]) -> str:
    """Return the rounds of some lines of metrics.jsonl: ` (rounds 1, 3 to 5)`."""
    numbers = [one["round"].whole() for one in lines]
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    told = ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in spans)
    return f" ({'rounds' if len(numbers) > 1 else 'round'} {told})" if told else ""


def _every_line(record: Record, *keys: str) -> Source:
    """Return a key of every line of metrics.jsonl as a source."""
    whole = record.metrics[0].source if record.metrics else record.whole("metrics.jsonl")
    pointer = "".join(f"/{key}" for key in keys)
    return Source(whole.file, whole.sha256, f"line {EACH} {pointer}".strip())


def _bytes_of_an_update(record: Record) -> int | None:
    """Return the bytes of an update; None where not all had the same, or some were not used."""
    config, traffic = record.run.config, record.json(LEDGER)["totals"][UP]
    strategy = STRATEGIES[config.strategy.name]
    if not traffic or config.is_masked or config.strategy.site_ranks or config.strategy.prunes:
        return None
    if strategy.odd != strategy.even:  # A and B differ in size
        return None
    if config.communication.entropy_coding or record.unfinished:
        return None
    messages, size = traffic["messages"].whole(), traffic["tensor_bytes"].whole()
    used = sum(len(m["good"].listed()) for m in record.metrics)
    return size // messages if messages == used and size % messages == 0 else None
