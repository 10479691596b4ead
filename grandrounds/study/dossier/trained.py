"""What was trained on what: run, base, data and recipe."""

from __future__ import annotations

import grandrounds
from grandrounds.config.digest import recipe_sha256
from grandrounds.config.words import NOT_TOLD, counted, place_name
from grandrounds.server.described import data_text
from grandrounds.study.dossier.lines import Line, Section, line, open_line, present
from grandrounds.study.dossier.record import PLAN, Fact, Record
from grandrounds.study.report.provenance import differing, value_text
from grandrounds.study.tables import duration
from grandrounds.wire.names import SOURCE
from grandrounds.wire.told import BASE, BASE_COMMIT, COUNTS, DATA_COMMIT, DATA_TAG, in_custody

ROUNDED = (
    "as told: a site in its own custody rounds its counts, unless its policy tells them exactly"
)


def run_section(record: Record) -> Section:
    """Return how the run went."""
    summary, planned = record.summary, record.key("num-server-rounds")
    done, reason = summary["rounds"], summary["reason"]
    lines = present(
        line("status", summary["status"].text(), summary["status"]),
        line("reason", reason.text(), reason) if reason else None,
        line("rounds", f"{done.whole():,} of {planned.whole():,}", done, planned),
        line("seed", record.key("seed").whole(), record.key("seed")),
        _told("wall-clock time", summary["seconds"], seconds=True),
        _told("device of the first site", summary["device"]),
        _told("number formats", summary["precision"]),
    )
    would = "nothing in a run directory; a site's audit log has the time of its visits"
    lines.append(open_line("dates of training", would, *record.metrics[-1:]))
    return Section("run", "Run", lines)


def _told(item: str, fact: Fact, *, seconds: bool = False) -> Line | None:
    """Return a line of the summary; None in runs of versions that do not write it."""
    if not fact:
        return None
    return line(item, duration(fact.number()) if seconds else fact.text(), fact)


def base_section(record: Record) -> Section:
    """Return the frozen base, as the recipe names it and as the sites loaded it."""
    name, revision = record.key("model.name"), record.key("model.revision")
    bits, plan = record.key("model.quantization"), record.json(PLAN)
    sha256 = record.key("model.lora.from-adapter-sha256")
    told = {
        "fingerprint of configuration and tokenizer": "base",
        "SHA-256 of its files at the sites": BASE,
        "commit that was loaded": BASE_COMMIT,
        "prompt under the tokenizer (hash)": "prompt",
    }
    lines = [
        line("name", place_name(name.text()), name),
        line("bits a weight", bits.whole() or "as loaded, not quantised", bits),
    ]
    if revision.text():
        lines.append(line("revision", revision.text(), revision))
    if stored := plan["stored-bits"]:
        lines.append(line("bits as published", stored.whole(), stored))
    for item, key in told.items():
        each = record.sites.each(key)
        if each.listed():
            lines.append(line(item, ", ".join(each.listed()), each, how="each distinct value"))
        elif key == BASE:
            would = "sites with agents of their own tell it; a rehearsal hashes no base"
            lines.append(open_line(item, would, each))
    if record.run.config.lora.is_continued:
        lines.append(line("continued from the adapter with SHA-256", sha256.text(), sha256))
    return Section("base", "Base model", lines)


def data_section(record: Record) -> Section:
    """Return the data by site: the counts that each site chose to tell."""
    summary, source = record.summary["data"], record.key("static.dataset.name")
    partitioner = record.key("data.partitioner")
    told = data_text(record.run.config, record.run.sites)
    lines = [line("data and division", told, source, partitioner, record.sites)]
    commits = record.sites.each(DATA_COMMIT)
    if commits.listed():
        lines.append(line("commit that was loaded", ", ".join(commits.listed()), commits))
    rounded = ROUNDED if any(map(in_custody, record.run.sites)) else ""
    for name, fact in summary.entries():
        value = f"{fact.whole():,}" if fact else NOT_TOLD
        item, how = ("sites", "") if name == "sites" else (f"all sites: {name}", rounded)
        lines.append(line(item, value, fact, how=how * bool(fact)))
    for site in record.sites.facts():
        keys = [key for key in (*COUNTS, DATA_TAG, SOURCE) if key in site.mapping()]
        value = ", ".join(f"{key} {site[key].value}" for key in keys)
        number = site["partition-id"].whole()
        how = ROUNDED if in_custody(site.mapping()) else ""
        lines.append(line(record.name(number), value or NOT_TOLD, site, how=how))
    return Section("data", "Data", lines)


def recipe_section(record: Record) -> Section:
    """Return the recipe's hash, what it adapts, and every setting that is not a default."""
    config, plan = record.run.config, record.json(PLAN)
    modules, size = plan["target-modules"], plan["adapter-parameters"]
    strategy, cohort = record.key("strategy.name"), record.key("strategy.fraction-train")
    sites = record.key("data.num-partitions")
    a_round = f"{config.cohort_size} of {counted(sites.whole(), 'site')} a round"
    lines = present(
        line(
            "SHA-256 of the recipe",
            recipe_sha256(config),
            record.whole("config.toml"),
            how="of every key that counts at a site, as an approval has it",
        ),
        line("adapted modules", ", ".join(map(str, modules.listed())), modules)
        if modules
        else None,
        line("trained parameters", f"{size.whole():,}", size) if size else None,
        line("aggregation", f"{strategy.text()}, {a_round}", strategy, cohort, sites),
    )
    changed = differing(config)
    how = f"the packaged defaults of grandrounds {grandrounds.__version__}"
    lines.append(
        line(
            "settings that differ from the defaults",
            len(changed),
            record.whole("config.toml"),
            how=f"compared with {how}",
        )
    )
    for key, value in changed.items():
        shown = place_name(value) if isinstance(value, str) else value_text(value)
        lines.append(line(key, shown or '""', record.key(key)))
    return Section("recipe", "Recipe", lines)
