"""What came out: evaluation, the sites one by one, forgetting, personal adapters, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from grandrounds.config.words import counted
from grandrounds.data.formulary import FORMULARY
from grandrounds.server.described import is_of_the_formulary
from grandrounds.server.unfinished import KINDS
from grandrounds.statistics import wilson_interval
from grandrounds.study.dossier.lines import Line, Section, line, open_line
from grandrounds.study.dossier.record import Fact, Record, Source
from grandrounds.study.report.read import EVALUATION, checkpoints
from grandrounds.study.tables import interval, p_text, percent, points
from grandrounds.wire.told import MARGIN, PREFERENCES, RANKING

WEIGHTS = "adapter_model.safetensors"
LOSSES = "held-out-losses"
GENERAL = "general"
WILSON = "95 % interval: Wilson's, from the counts"


def losses_section(record: Record) -> Section:
    """Return the held-out loss before training and after the last round."""
    return Section("losses", "Held-out loss", list(_losses(record)))


def evaluation_section(record: Record) -> Section:
    """Return the exam at the end, and every row of the evaluations with the base's."""
    holds_facts = is_of_the_formulary(record.run.config, record.run.sites)
    groups = ("private", "public") if holds_facts else ("public",)
    lines, found = list(_exam(record, groups)), False
    for evaluation in _evaluations(record):
        found = True
        lines += _settings(record, evaluation)
        for row in evaluation["rows"].facts():
            lines += _row(row, _place(evaluation))
    if not found:
        would, looked = "grandrounds evaluate RUN_DIR", record.json(EVALUATION)
        lines.append(open_line("answers to benchmarks", would, looked))
    return Section("evaluation", "Evaluation", lines)


def _losses(record: Record) -> Iterator[Line]:
    told = [m for m in record.metrics if m["held-out-loss"]]
    if not told:
        would = "a run with strategy.fraction-evaluate above 0, at sites that tell it"
        yield open_line("held-out loss", would, *record.metrics[-1:])
    for one in (told[0], told[-1]) if len(told) > 1 else told:
        fact = one["held-out-loss"]
        when = f"round {one['round'].whole()}"
        value = f"{fact.number():.4f} {record.run.config.loss_unit}"
        yield line(f"held-out loss, {when}", value, fact)
        for key in (PREFERENCES, RANKING):
            if share := one[key]:
                yield line(f"held-out pairs, {key}, {when}", percent(share.number()), share)
        if margin := one[MARGIN]:
            value = f"{margin.number():.4f}, mean"
            yield line(f"held-out pairs, margin against the base, {when}", value, margin)


def _exam(record: Record, groups: tuple[str, ...]) -> Iterator[Line]:
    """Yield the exam on the formulary at the end of a run, base and tuned."""
    for group in groups:
        asked = record.summary["formulary"][group]
        for model, fact in asked.entries():
            correct, n = fact["correct"].whole(), fact["n"].whole()
            if not 0 <= correct <= n or n < 1:
                raise fact.fault("correct answers out of questions")
            value = f"{correct:,} of {n:,}, {percent(correct / n)}"
            value += f" ({interval(wilson_interval(correct, n))} %)"
            yield line(f"exam, {group} facts, {model}", value, fact, how=WILSON)


def _evaluations(record: Record) -> Iterator[Fact]:
    """Yield every evaluation of the run and of its checkpoints."""
    folders = ["", *(f"{folder.name}/" for _, folder in checkpoints(record.run.path))]
    for folder in folders:
        whole = record.json(f"{folder}{EVALUATION}")
        if whole:
            several = whole["evaluations"]
            yield from several.facts() if several else [whole]


def _place(evaluation: Fact) -> str:
    """Return how an evaluation is told from others: its protocol, and the folder if not the run."""
    folder = evaluation.source.file.removesuffix(EVALUATION).rstrip("/")
    return f"{evaluation['protocol'].text()}{f' in {folder}' if folder else ''}"


def _settings(record: Record, evaluation: Fact) -> Iterator[Line]:
    """Yield what was asked how, and whether the adapters are those of the run."""
    named = ("base_fingerprint", "prompt_template", "precision", "sample")
    counts = ("limit", "permutations", "answer_tokens")
    told = [f"{k} {evaluation[k].value}" for k in (*named, *counts) if evaluation[k]]
    place = _place(evaluation)
    yield line(f"how, {place}", ", ".join(told) or "no settings", evaluation)
    for model, fact in evaluation["models"].entries():
        sha256, file = fact["adapter_sha256"], f"{model}/{WEIGHTS}"
        if not sha256 or not (record.run.path / file).is_file():
            continue
        source = record.binary(file)
        same = sha256.text() == source.sha256
        value = "the run's checkpoint of that name" if same else "another adapter than the run's"
        yield line(
            f"{model} that was asked, {place}",
            value,
            sha256,
            source,
            how="by the SHA-256 of its weights",
        )


def _row(row: Fact, place: str) -> Iterator[Line]:
    model, title = row["model"].text(), row["title"].text()
    for part in row["groups"].facts() if row["groups"].listed() else [row]:
        group = f", {part['group'].text()}" if part["group"] else ""
        correct, n = part["correct"].whole(), part["n"].whole()
        value = f"{correct:,} of {n:,}, {percent(part['accuracy'].number())}"
        ends = [bound.number() for bound in part["interval"].facts()]
        value += f" ({interval(ends)} %)" if ends else ""
        if against := part["vs_base"]:
            value += f"; against the base {points(against['difference'].number())} points"
            ends = [100 * bound.number() for bound in against["interval"].facts()]
            value += f" ({' to '.join(f'{end:+.1f}' for end in ends)})" if ends else ""
            value += f", p {p_text(against['p_value'].value)}"
        yield line(f"{title}{group}, {place}, {model}", value, part)
    f1, loss = row["f1"]["mean"], row["loss"]["nats_per_token"]
    if f1:
        yield line(f"{title}, token F1, {place}, {model}", percent(f1.number()), f1)
    if loss:
        item = f"{title}, loss, nats per token, {place}, {model}"
        yield line(item, f"{loss.number():.4f}", loss)


def sites_section(record: Record) -> Section:
    """Return each site's held-out loss, the worst of them first."""
    told = [m for m in record.metrics if m[LOSSES].mapping()]
    if not told:
        would = "a run whose sites tell their losses (strategy.fraction-evaluate above 0)"
        lines = [open_line("worst site", would, *record.metrics[-1:])]
        return Section("sites", "Sites one by one", lines)
    first, last = told[0][LOSSES], told[-1][LOSSES]
    losses = {site: fact for site, fact in last.entries() if fact}
    worst = max(losses, key=lambda site: losses[site].number())
    number = told[-1]["round"].whole()
    unit = record.run.config.loss_unit
    value = f"{record.name(worst)}, {losses[worst].number():.4f} {unit}"
    how = f"the highest of the {counted(len(losses), 'site')} that told one"
    lines = [
        line(f"worst site, held-out loss of round {number}", value, losses[worst], last, how=how)
    ]
    begun = told[0]["round"].whole()
    for site, fact in losses.items():
        before = first[site]
        start = f"{before.number():.4f} in round {begun} → " if before and number > begun else ""
        end = f"{fact.number():.4f} in round {number}"
        sources = [before, fact] if start else [fact]
        lines.append(line(f"{record.name(site)}, held-out loss", f"{start}{end}", *sources))
    return Section("sites", "Sites one by one", lines)


def subgroups_section(record: Record) -> Section:
    """Return the held-out loss by subgroup, where the run names columns of subgroups."""
    columns, found = record.key("data.subgroup-columns"), record.summary["subgroups"]
    if not found:
        would = "a run with data.subgroup-columns, at sites whose policy names them"
        return Section("subgroups", "Subgroups", [open_line("losses by subgroup", would, columns)])
    lines = [line("columns", ", ".join(map(str, found["columns"].listed())), found["columns"])]
    for name, fact in found["groups"].entries():
        loss, count = fact["held-out-loss"].number(), fact["held-out-examples"].whole()
        sites = counted(len(fact["sites"].listed()), "site")
        value = f"{loss:.4f} nats per answer token, {counted(count, 'example')} at {sites}"
        lines.append(line(name, value, fact))
    silent, failed = found["silent"], found["failed"]
    told = ", ".join(record.name(str(site)) for site in silent.listed())
    lines.append(line("sites that told none", told or "none", silent))
    lines += [
        line(f"{record.name(site)} failed", why.text(), why) for site, why in failed.entries()
    ]
    return Section("subgroups", "Subgroups", lines)


def forgetting_section(record: Record) -> Section:
    """Return what the base knew and the tuned model still knows."""
    lines = []
    asked = record.summary["formulary"]["public"]
    if asked and record.run.config.model.name == FORMULARY:
        base, tuned = (
            asked[model]["correct"].whole() / asked[model]["n"].whole()
            for model in ("base", "tuned")
        )
        value = f"{percent(base)} → {percent(tuned)}, {points(tuned - base)} points"
        lines.append(line("facts that the base knew", value, asked))
    for evaluation in _evaluations(record):
        for row in evaluation["rows"].facts():
            if row["benchmark"].value == GENERAL:
                lines += [
                    line(f"general knowledge: {one.item}", one.value, *one.sources)
                    for one in _row(row, _place(evaluation))
                ]
    if not lines:
        would = "grandrounds evaluate RUN_DIR --benchmarks general"
        lines.append(open_line("what the base knew", would, record.json(EVALUATION)))
    return Section("forgetting", "Forgetting", lines)


def personal_section(record: Record) -> Section:
    """Return what each site's personal adapter scores beside the federated one."""
    asked, found = record.key("personalisation.name"), record.summary["personal"]
    lines = [line("personal adapters", asked.text(), asked)]
    both = ("federated", "personal")
    if found["mean"]:
        mean, worst = found["mean"], found["worst"]
        ends = [f"{mean[name].number():.4f}" for name in both]
        lines.append(line("mean loss of the sites, federated → personal", " → ".join(ends), mean))
        ends = [f"{worst[name].number():.4f}" for name in both]
        value = f"{record.name(worst['site'].whole())}, {' → '.join(ends)}"
        lines.append(line("worst site, federated → personal", value, worst))
    for site, fact in found["sites"].entries():
        told = [f"{key} {fact[key].number():.4g}" for key in fact.mapping()]
        lines.append(line(record.name(site), ", ".join(told) or "tells no figure", fact))
    for site, why in found["failed"].entries():
        lines.append(line(f"{record.name(site)} has none", why.text(), why))
    return Section("personal", "Personal adapters", lines)


def checkpoints_section(record: Record) -> Section:
    """Return the adapters of the run with their hashes, and the replies that were not used."""
    last, best = record.summary["adapter"], record.summary["best_adapter"]["adapter"]
    lines = []
    for item, fact in (("last checkpoint", last), ("checkpoint of the lowest loss", best)):
        if fact:
            lines.append(line(item, fact.text(), fact))
    for _, folder in checkpoints(record.run.path):
        if (folder / WEIGHTS).is_file():
            source = record.binary(f"{folder.name}/{WEIGHTS}")
            size = record.files[source.file][1]
            lines.append(line(folder.name, f"{size:,} bytes, SHA-256 {source.sha256}", source))
    failed = record.summary["failed_replies"]
    if failed:
        lines.append(line("replies that were not used", f"{failed.whole():,}", failed))
    for one in [*record.metrics, *record.unfinished]:
        lines += _failures(record, one)
    return Section("checkpoints", "Checkpoints and failures", lines)


def _failures(record: Record, one: Fact) -> Iterator[Line]:
    for kind in KINDS:
        for site, why in one[kind].entries():
            place = f"{_file_word(one.source)}{one.source.at}"
            yield line(f"{kind}, {place}, {record.name(site)}", why.text(), why)


def _file_word(source: Source) -> str:
    return "" if source.file == "metrics.jsonl" else f"{source.file} "
