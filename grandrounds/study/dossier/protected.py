"""The guarantee of a run, its masks, and what an audit found."""

from __future__ import annotations

from collections.abc import Iterator

from grandrounds.config.words import NOT_TOLD
from grandrounds.server.guarantees import (
    AUDIT,
    by_site,
    is_rehearsed,
    matches_text,
    not_covered,
    unit_of,
    verdict,
)
from grandrounds.server.masks.told import masks_text, still_told
from grandrounds.study.dossier.lines import Line, Section, line, open_line
from grandrounds.study.dossier.record import Fact, Record
from grandrounds.study.tables import percent
from grandrounds.wire.guarantee import REHEARSAL


def privacy_section(record: Record) -> Section:
    """Return guarantee, masks and audit, each also where there is none."""
    return Section("privacy", "Privacy", [*_guarantee(record), *_masks(record), *_audit(record)])


def _number(fact: Fact, digits: int = 4) -> str:
    return f"{fact.number():.{digits}g}" if fact else NOT_TOLD


def _guarantee(record: Record) -> Iterator[Line]:
    asked, found = record.key("privacy.unit-guarantee"), record.summary["privacy"]
    if not found:
        yield line("differential privacy", asked.text(), asked, record.summary)
        return
    section = found.mapping()
    named = record.name
    mode = REHEARSAL if is_rehearsed(section) else "enforced by the sites"
    yield line("differential privacy", mode, found["mode"])
    yield line("unit", unit_of(section), found["unit"])
    if found["adjacency"]:
        yield line("neighbouring data sets", found["adjacency"].text(), found["adjacency"])
    yield line("epsilon spent, most of any site", _number(found["epsilon"]), found["epsilon"])
    by = found["epsilon_by_site"]
    yield line("epsilon spent, by site", by_site({"epsilon_by_site": by.mapping()}, named), by)
    reserved = found["reserved_epsilon"]
    yield line("epsilon if all visits are made", _number(reserved), reserved)
    delta = found["delta"]
    yield line("delta", _number(delta) if delta else "differs by site", delta)
    for item, key in (
        ("mechanism: DP-SGD, noise multiplier", "noise_multiplier"),
        ("mechanism: DP-SGD, clipping norm", "clipping_norm"),
        ("mechanism: DP-SGD, sampling rate", "sampling_rate"),
        ("noise on a told training loss, nats", "train_loss_deviation"),
    ):
        if found[key]:
            yield line(item, _number(found[key]), found[key])
    if found["accountant"]:
        yield line("accountant", found["accountant"].text(), found["accountant"])
    for item, key in (
        ("sites without a guarantee", "sites_without_guarantee"),
        ("sites whose budget is spent", "budget_spent"),
    ):
        listed = ", ".join(named(str(site)) for site in found[key].listed())
        yield line(item, listed or "none", found[key])
    for number, text in enumerate(not_covered(section, named), 1):
        yield line(
            f"not covered, {number}",
            text,
            found["mode"],
            found["unit"],
            found["sites_without_guarantee"],
        )


def _masks(record: Record) -> Iterator[Line]:
    asked, config = record.key("secure-aggregation"), record.run.config
    if not config.is_masked:
        yield line("masked sums", asked.text(), asked)
        return
    yield line("masked sums", masks_text(config, record.run.sites), asked, record.sites)
    yield line(
        "the server still got of each site",
        still_told(config),
        asked,
        record.key("strategy.fraction-evaluate"),
        record.key("privacy.report-train-loss"),
    )
    for one in record.metrics:
        if told := one["masked-sum"]:
            sites, attempts = told["sites"].whole(), told["attempts"]
            tries = f", attempt {attempts.whole()}" if attempts else ""
            lost = one["skipped"]
            value = lost.text() if lost else f"sum of {sites} sites{tries}"
            yield line(f"sum of round {one['round'].whole()}", value, *([lost] if lost else [told]))


def _audit(record: Record) -> Iterator[Line]:
    audit = record.json(AUDIT)
    if not audit:
        yield open_line("audit", "grandrounds privacy audit RUN_DIR", audit)
        return
    section, recipe = audit.mapping(), audit["recipe-sha256"]
    if recipe:
        how = "the recipe with invented records and canaries as its data"
        yield line("audit: SHA-256 of the audited recipe", recipe.text(), recipe, how=how)
    claimed, bound = audit["claimed-epsilon"], audit["at-least-epsilon"]
    yield line("audit: claimed epsilon", _number(claimed) if claimed else "none", claimed)
    yield line("audit: epsilon is at least (95 %)", _number(bound), bound)
    gradient = audit["mechanism"]["at-least-epsilon"]
    if gradient:
        yield line("audit: the same of clip and noise alone", _number(gradient), gradient)
    told = audit["membership"]
    auc, ends = told["auc"], [f"{bound.number():.2f}" for bound in told["auc-interval"].facts()]
    within = f" (95 % interval {' to '.join(ends)})" if ends else ""
    yield line("audit: AUC of membership", f"{_number(auc, 2)}{within}", auc, told["auc-interval"])
    for hits in told["tpr-at-fpr"].facts():
        rate, found = hits["fpr"].number(), hits["tpr"]
        yield line(
            f"audit: true positives at {percent(rate)} false ones", percent(found.number()), found
        )
    for side, item in (("in", "trained on"), ("out", "not trained on (chance)")):
        extracted = audit["extraction"][side]
        if extracted:
            yield line(
                f"audit: answers extracted of canaries {item}",
                matches_text(extracted.mapping()),
                extracted,
            )
    yield line("audit: what it shows", verdict(section), audit)
