"""The model card beside every checkpoint and every export, with Hugging Face's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grandrounds
from grandrounds.config import recipes, schedules
from grandrounds.config.bases import KNOWN_BASES, names_a_base
from grandrounds.config.keys import Config
from grandrounds.config.prompt import is_own, sha256_of
from grandrounds.config.words import percent, place_name, with_own
from grandrounds.data.formulary import FORMULARY
from grandrounds.model.lora import LoraSpec
from grandrounds.server import guarantees
from grandrounds.server.described import (
    are_real,
    data_text,
    examples_text,
    is_fictional,
    objective_text,
    start_text,
    with_own_data,
)
from grandrounds.server.listeners.start_rows import defence
from grandrounds.server.listeners.trackers import settings_of
from grandrounds.server.masks.told import masks_text, still_told
from grandrounds.wire.told import BASE_COMMIT, DATA_COMMIT, MARGIN, PREFERENCES, RANKING

FLOWERTUNE = "https://flower.ai/benchmarks/llm-leaderboard/medical/"
"""The leaderboard whose table columns `_submission` fills in."""

FLOWERTUNE_BENCHMARKS = {
    "pubmedqa": "PubMedQA",
    "medmcqa": "MedMCQA",
    "medqa": "MedQA",
    "careqa": "CareQA",
}
"""Benchmark → column of that table, in its order."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ONE_WORD = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Accuracy:
    """One model's accuracy on one benchmark, or on a part of one."""

    protocol: str
    """`flowertune`, `likelihood`, or `at the sites` for the exam held by the run itself."""
    benchmark: str
    """Its internal name, such as `medqa`."""
    title: str
    """Its display name."""
    is_base: bool
    """Whether this is the untrained base."""
    correct: int
    n: int
    interval: tuple[float, float]
    """95 % interval of the accuracy, as fractions."""
    complete: bool = True
    """Whether all items of the benchmark were used."""
    revision: str = ""
    """Commit or branch of the hub's data set that the items are from; empty for other sources."""
    f1: float | None = None
    """Mean token F1 of answers in the model's own words, a fraction; None: options were chosen."""
    f1_interval: tuple[float, float] | None = None
    """Its 95 % interval (Student's); None if all rows have the same F1."""
    part: str = ""
    """Part of the benchmark that was asked, such as `private`; empty for all of it."""


@dataclass(frozen=True)
class Findings:
    """What is known about a checkpoint beyond its configuration."""

    base_held_out_loss: float | None = None
    """Held-out loss before training, in `Config.loss_unit`: of the base, or of a saved adapter on
    it."""
    pairs: Mapping[str, float] = field(default_factory=dict)
    """Figures of held-out preferences, as in metrics.jsonl; empty without preferences."""
    data: Mapping[str, Any] | None = None
    """`data` of summary.json: the examples at the sites."""
    accuracies: Sequence[Accuracy] = ()
    """Including those of the base."""
    device: str | None = None
    """Device and precision at the sites."""
    sites: Sequence[Mapping[str, Any]] = ()
    """Their introductions, as in sites.json. Their names stay out of the card."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Content of plan.json: what is known of the base."""
    lora: LoraSpec | None = None
    """Rank and alpha in the files, which differ from the run's where adapters are stacked."""
    licence: Mapping[str, str] = field(default_factory=dict)
    """Licence of the base, as in the hub's metadata; empty if it is not known."""
    failed_replies: int | None = None
    """Number of replies up to this checkpoint that were not used."""
    merged: str | None = None
    """For a merged model, what was merged into what; None for an adapter."""
    repository: str | None = None
    """Where it is published, if known."""
    privacy: Mapping[str, Any] | None = None
    """`privacy` of summary.json: the guarantee; None without one."""
    audit: Mapping[str, Any] | None = None
    """Content of privacy-audit.json; None if the recipe was not audited."""
    subgroups: Mapping[str, Any] | None = None
    """`subgroups` of summary.json, if they are of this adapter; None without any."""
    personal: Mapping[str, Any] | None = None
    """How a site's personal adapter was made and what it scores; None for the run's adapter."""


NOTHING = Findings()
"""What is known during the run."""


def model_card(
    config: Config,
    target_modules: Sequence[str],
    round_number: int,
    held_out_loss: float | None,
    mib: float,
    found: Findings = NOTHING,
) -> str:
    """Return the README.md of a checkpoint or an export.

    Parameters
    ----------
    target_modules
        The adapted modules, resolved.
    held_out_loss : float or None
        In `Config.loss_unit`; None if not measured.
    mib : float
        Traffic of the run up to this checkpoint.
    found : Findings
        Further findings.
    """
    base = _shown(config.model.name)
    kind = "Model merged from a LoRA adapter and" if found.merged else "LoRA adapter for"
    parts = [
        f"---\n{_metadata(config, round_number, found)}---",
        f"# {kind} {base}, after round {round_number} of {config.federation.num_server_rounds}",
        "Trained by federated instruction tuning with Grand Rounds: the examples stayed at their "
        "sites, and only adapters were exchanged.",
        _facts(config, target_modules, held_out_loss, mib, found),
    ]
    if found.personal:
        parts.append(_personal(found.personal))
    if found.merged:
        parts.append(found.merged)
    parts += [
        _accuracy_part(found.accuracies),
        _subgroups(found.subgroups),
        _use(config, merged=bool(found.merged)),
        _privacy(config, found),
        _limits(config, found),
        _recipe(config),
        _submission(config, round_number, mib, found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_IN_CODE = str.maketrans("`|", "'/")


def _subgroups(found: Mapping[str, Any] | None) -> str:
    """Return the held-out loss by subgroup; empty if none was told."""
    if not found or not found["groups"]:
        return ""
    rows = "\n".join(  # values of sites, as code: neither markup nor links
        f"| `{name.translate(_IN_CODE)}` | {of['held-out-loss']:.4f} | "
        f"{of['held-out-examples']:,} | {len(of['sites'])} |"
        for name, of in found["groups"].items()
    )
    return (
        "## Subgroups\n\nHeld-out loss in nats per answer token, as the sites tell it, of "
        "subgroups with at least 10 held-out examples at a site. A subgroup that is missing has "
        "not been measured.\n\n| subgroup | held-out loss | held-out examples | sites |\n"
        f"| --- | --- | --- | --- |\n{rows}"
    )


def _personal(facts: Mapping[str, Any]) -> str:
    """Return what a reader of a personal adapter must know: whose it is, and how it was made."""
    made = {
        "local-tail": "trained further at one site, on its own examples",
        "interpolate": "one site's own adapter and the federated one, in a convex combination of "
        "their products B A, at twice the rank",
        "shared-a": "A is shared by all sites, B is one site's own",
        "dual": "the shared adapter and one site's private one, side by side at twice the rank",
    }[facts["personalisation"]]
    text = (
        f"**A personal adapter**, for the site that made it: {made}; {facts['steps']} steps, "
        f"weight {facts['weight']:g}. It can reveal that site's examples more than the federated "
        "one."
    )
    if facts.get("tokens"):
        own, federated = (facts[n] / facts["tokens"] for n in ("nll-sum", "federated-nll-sum"))
        text += (
            f" Its loss on {facts['num-examples']} held-out examples of that site is {own:.4f} "
            f"nats per answer token; that of the federated adapter is {federated:.4f}. No weight "
            "was chosen on them."
        )
    return text


def _shown(name: str) -> str:
    """Return a name fit for publication: only the last part of a local path."""
    return _cell(place_name(name))


def _cell(text: str) -> str:
    """Return a text fit for one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


# --- Metadata -------------------------------------------------------------------------------------


def _metadata(config: Config, round_number: int, found: Findings) -> str:
    """Return the YAML that the hub reads: github.com/huggingface/hub-docs, modelcard.md."""
    licence = found.licence or {"license": "unknown"}
    lines = [f"{key}: {_yaml(value)}" for key, value in licence.items()]
    if base := _base_on_the_hub(config, found):
        lines.append(f"base_model: {_yaml(base)}")
        lines.append(f"base_model_relation: {'finetune' if found.merged else 'adapter'}")
    lines.append(f"library_name: {'transformers' if found.merged else 'peft'}")
    lines.append("pipeline_tag: text-generation")
    if _HUB_NAME.fullmatch(config.static.name) and not with_own_data(found.sites):
        lines += ["datasets:", f"- {_yaml(config.static.name)}"]
    lines += ["tags:", *(f"- {tag}" for tag in ("lora", "federated-learning", "flower", "medical"))]
    tuned = [a for a in found.accuracies if not a.is_base]
    if tuned:
        name = f"{_shown(config.model.name)}, round {round_number}"
        lines += ["model-index:", f"- name: {_yaml(name)}", "  results:"]
        for a in tuned:
            lines += [
                "  - task:",
                "      type: question-answering",
                "    dataset:",
                f"      type: {_yaml(a.benchmark)}",
                f"      name: {_yaml(a.title)}",
                *([f"      config: {_yaml(a.part)}"] if a.part else []),
                "    metrics:",
                "    - type: accuracy",
                f"      value: {a.correct / a.n:.4f}",
                f"      name: {_yaml(f'accuracy ({a.protocol}; {a.correct} of {a.n})')}",
            ]
            if a.f1 is not None:
                told = _yaml(f"token F1 ({a.protocol}; {a.n} answers)")
                lines += ["    - type: f1", f"      value: {a.f1:.4f}", f"      name: {told}"]
    return "".join(f"{line}\n" for line in lines)


def _base_on_the_hub(config: Config, found: Findings) -> str:
    """Return the base's name on the hub; empty if it is none of the hub's.

    A name of one word can also be that of a base of one's own; the hub's has a commit.
    """
    known = KNOWN_BASES.get(config.model.name)
    name = known.hub_name if known else config.model.name
    if _HUB_NAME.fullmatch(name):
        return name
    return name if _ONE_WORD.fullmatch(name) and _commit(found.sites, BASE_COMMIT) else ""


def _commit(sites: Sequence[Mapping[str, Any]], fact: str) -> str:
    """Return the commit that was read from the hub, as a site tells it; empty if none does."""
    return next((str(site[fact]) for site in sites if site.get(fact)), "")


def _yaml(text: str) -> str:
    """Return a string as a YAML scalar, quoted as in JSON unless it is a plain word."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", text)
    reserved = text.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    return text if plain and not reserved else json.dumps(text)


# --- Text -----------------------------------------------------------------------------------------


def _facts(
    config: Config,
    target_modules: Sequence[str],
    held_out_loss: float | None,
    mib: float,
    found: Findings,
) -> str:
    lora, train, strategy, data = config.lora, config.train, config.strategy, config.data
    bits = {0: "not quantised", 4: "4 bits (NF4)", 8: "8 bits (LLM.int8)"}[
        config.model.quantization
    ]
    if stored := found.plan.get("stored-bits"):
        bits = f"{stored} bits as published (bitsandbytes)"
    frozen = ", ".join(found.plan.get("frozen-modules", ()))
    mu = f" (mu {strategy.proximal_mu:g})" if strategy.proximal_mu else ""
    loss = "not measured" if held_out_loss is None else f"{held_out_loss:.4f} {config.loss_unit}"
    if held_out_loss is not None and found.base_held_out_loss is not None:
        before = "start" if lora.is_continued else "base"
        loss += f" ({before} {found.base_held_out_loss:.4f})"
    codecs = config.communication
    earlier = schedules.told(config.federation.earlier_schedules)
    commits = [_commit(found.sites, fact) for fact in (BASE_COMMIT, DATA_COMMIT)]
    of_run = LoraSpec.of(config)
    files = found.lora or of_run
    stacked = f" (stacked; trained at {_rank_and_alpha(of_run)})"
    stacked *= files.rank != of_run.rank
    rows = [
        ("base", f"{_shown(config.model.name)}{_at(config.model.revision, commits[0])}, {bits}"),
        ("data", _cell(data_text(config, found.sites)) + _at(config.static.revision, commits[1])),
        (
            "adapter",
            _cell(
                f"{'DoRA, ' * lora.peft_use_dora}{'rsLoRA, ' * lora.use_rslora}"
                f"{_rank_and_alpha(files)}{stacked},"
            )
            + f" on {', '.join(target_modules)}"
            + (f"; frozen: {frozen}" if frozen else ""),
        ),
        (
            "aggregation",
            f"{strategy.name}{mu}, {config.cohort_size} of {data.num_partitions} sites a round",
        ),
        (
            "learning rate",
            f"{train.learning_rate_max:g} to {train.learning_rate_min:g}, cosine over rounds"
            f"{'; ' * bool(earlier)}{earlier}",
        ),
        ("held-out loss", loss),
        ("communication so far", f"{mib:,.2f} MiB (FlowerTune's counting rule)"),
        ("codecs", f"{config.codec_up} up, {codecs.downlink_codec} down"),
        ("seed", str(config.federation.seed)),
        *_prompt_rows(config),
    ]
    if config.is_on_pairs:
        place = [name for name, _ in rows].index("held-out loss")
        rows[place + 1 : place + 1] = _pair_rows(found.pairs)
        rows.insert(3, ("objective", objective_text(config)))
    if saved := start_text(config):
        rows.insert(3, ("continued from", _cell(saved)))
    if found.data:
        about = "about " if are_real(found.sites) else ""
        told = examples_text(found.data["train-examples"], found.data["held-out-examples"])
        rows.insert(2, ("examples", f"{about}{told}"))
    if found.failed_replies is not None:
        rows.append(("failed replies so far", str(found.failed_replies)))
    return _table(("", ""), rows)


def _pair_rows(pairs: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield what became of held-out preferences, where it was measured."""
    if PREFERENCES in pairs:
        yield "preference accuracy", f"{percent(pairs[PREFERENCES])} of held-out pairs"
        yield "ranking accuracy", f"{percent(pairs[RANKING])} of held-out pairs"
        yield "mean margin", f"{pairs[MARGIN]:.4f}, against the base"


def _rank_and_alpha(spec: LoraSpec) -> str:
    rank, alpha = with_own(spec.rank, dict(spec.rank_pattern)), dict(spec.alpha_pattern)
    return f"r = {rank}, alpha = {with_own(spec.alpha, alpha)}"


def _at(revision: str, commit: str) -> str:
    """Return which state of the hub's files was read: revision as set, and commit if known."""
    told = [f"revision {_cell(revision)}"] if revision and revision != commit else []
    told += [f"commit {commit}"] if commit else []
    return f", {' = '.join(told)}" if told else ""


def _prompt_rows(config: Config) -> list[tuple[str, str]]:
    """Return the rows on what is set in the chat template; none if nothing is."""
    date, options, system = config.data.chat
    if is_own(template := config.data.prompt_template):
        said = [("system prompt", _cell(config.data.system_prompt))]
        return [
            ("prompt template", f"one's own, SHA-256 `{sha256_of(template)}`"),
            *(said if config.data.system_prompt else []),
        ]
    rows = [("date in the prompt", date)] if date else []
    rows += [("options of the chat template", _cell(options))] if options else []
    return rows + ([("system prompt", _cell(system))] if system else [])


def _coverage(accuracy: Accuracy) -> str:
    return "" if accuracy.complete else " (not all items)"


def _accuracy_part(accuracies: Sequence[Accuracy]) -> str:
    title = "## Accuracy\n\n"
    if not accuracies:
        return title + "Not evaluated. Run `grandrounds evaluate RUN_DIR`, then export again."
    with_f1 = any(a.f1 is not None for a in accuracies)
    rows = [
        (
            a.protocol,
            a.title + _coverage(a),
            "base" if a.is_base else "tuned",
            f"{a.correct:,}/{a.n:,}",
            f"{100 * a.correct / a.n:.1f}",
            _percent_interval(a.interval),
            *(_f1_cells(a) if with_f1 else ()),
        )
        for a in accuracies
    ]
    columns = ["protocol", "benchmark", "model", "correct", "%", "95 % interval"]
    columns += ["token F1, %", "95 % interval"] if with_f1 else []
    read = {a.benchmark: f"{a.benchmark} at {_cell(a.revision)}" for a in accuracies if a.revision}
    from_hub = f" Questions from the hub: {', '.join(read.values())}." if read else ""
    table = _table(columns, rows)
    students = " of accuracies, Student's of F1" if with_f1 else ""
    return f"{title}{table}\n\nWilson intervals{students}. `base` is the untrained base.{from_hub}"


def _percent_interval(interval: tuple[float, float] | None) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""


def _f1_cells(accuracy: Accuracy) -> tuple[str, str]:
    share = "" if accuracy.f1 is None else f"{100 * accuracy.f1:.1f}"
    return share, _percent_interval(accuracy.f1_interval)


def _use(config: Config, merged: bool) -> str:
    if merged:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")'
        )
    else:
        load = f"base = {json.dumps(config.model.name)}"
        at = config.model.revision
        revision = f", revision={json.dumps(at)}" if at else ""
        if config.model.name == FORMULARY:
            load = "from grandrounds.data.formulary import base_path\n\nbase = base_path()"
        elif names_a_base(config.model.name):
            load = (
                "from grandrounds.model.base import model_location\n\n"
                f"base = model_location({json.dumps(config.model.name)})"
            )
        elif Path(config.model.name).is_absolute():
            load = 'base = "path/to/the/base"'
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"{load}\nmodel = PeftModel.from_pretrained("
            f'AutoModelForCausalLM.from_pretrained(base{revision}), ".")'
        )
    template = config.data.prompt_template
    if is_own(template):
        return f"## Use\n\n```python\n{code}\n```\n\n{_own_use(template, merged)}"
    if template == "text":
        return (
            f"## Use\n\n```python\n{code}\n```\n\nTrained on plain text, without a prompt: the "
            "model continues a text, and ends it with the end-of-sequence token."
        )
    ends = "the template's end of turn" if template == "chat" else "the end-of-sequence token"
    return (
        f"## Use\n\n```python\n{code}\n```\n\nPrompt template: `{template}`, as in "
        f"training; answers end with {ends}.{_chat_use(config, merged)}"
    )


def _own_use(template: str, merged: bool) -> str:
    """Return how a prompt gets the text of one's own template."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", template)), default=0))
    text = (
        "The prompt of training, a Jinja template: what stands before `{{ answer }}` is the "
        "prompt, spaces directly before it belong to the answer, and what stands after it ends the "
        f"answer, else the end-of-sequence token.\n\n{fence}jinja\n{template.rstrip()}\n{fence}"
    )
    if not merged:
        return text
    return (
        f"{text}\n\nThis tokenizer's chat template renders the same text for a question, with a "
        "system prompt before it or without: use `tokenizer.apply_chat_template` with "
        "`add_generation_prompt=True`."
    )


def _chat_use(config: Config, merged: bool) -> str:
    """Return how a prompt gets what the run set in the chat template; empty if it set nothing."""
    date, options, system = config.data.chat
    if not (date or options or system):
        return ""
    if merged:
        return (
            " What the table says of the prompt is written into this tokenizer's chat template, "
            "so that `tokenizer.apply_chat_template` renders the text of training."
        )
    handed = "".join(f", {name}={value!r}" for name, value in json.loads(options or "{}").items())
    first = f'{{"role": "system", "content": {json.dumps(system, ensure_ascii=False)}}}, '
    return (
        " To render the text of training:\n\n```python\ntokenizer.apply_chat_template("
        f'[{first * bool(system)}{{"role": "user", "content": question}}], '
        f"add_generation_prompt=True{handed})\n```"
        + (f"\n\nThe template printed {date} as the date." if date else "")
    )


def _privacy(config: Config, found: Findings) -> str:
    screens = defence(config)
    screened = f" Individual updates were screened ({screens})." if screens else ""
    share = f"{screened} Share the weights only as the sites have agreed."
    if found.privacy:
        covered = guarantees.not_covered(found.privacy)
        kind = "Differential privacy"
        if guarantees.is_rehearsed(found.privacy):
            kind = "A rehearsal of differential privacy"
        parts = [
            f"## Privacy\n\n{kind} of one {guarantees.unit_of(found.privacy)}, for each site by "
            f"itself. {_seen(config, found, 'noised update')}{share}",
            _table(("", ""), [(k, _cell(v)) for k, v in guarantees.guarantee_rows(found.privacy)]),
            "Not covered:\n\n" + "\n".join(f"- {line}" for line in covered),
        ]
    else:
        parts = [
            f"## Privacy\n\nNo differential privacy. {_seen(config, found, 'update')} The weights "
            f"may reveal the content of individual examples.{share}"
        ]
    if found.audit:
        said = guarantees.verdict(found.audit)
        parts.append(
            f"Audit: {guarantees.audit_line(found.audit)}; {guarantees.SYNTHETIC}.\n\n"
            f"{said[0].upper()}{said[1:]}."
        )
    return "\n\n".join(parts)


def _seen(config: Config, found: Findings, what: str) -> str:
    """Return what the server saw of single sites."""
    if not config.is_masked:
        return f"Updates were not masked: the server saw every site's {what}."
    return (
        f"Updates were masked: {masks_text(config, found.sites)}. What the server got of each "
        f"site: {still_told(config)}."
    )


def _limits(config: Config, found: Findings) -> str:
    invented = (
        " The drugs are fictional; nothing learned of them is medical knowledge."
        if is_fictional(config, found.sites)
        else ""
    )
    return (
        "## Limits of use\n\nResearch software, **not a medical device**: do not use its answers "
        "for decisions about patients. It may state falsehoods with confidence, and was not tested "
        f"for safety, bias or languages other than those of its data.{invented}\n\n"
        f"{_licences(found)}"
    )


def _licences(found: Findings) -> str:
    """Return what is known of the licences under which this may be used."""
    told = found.licence
    if not told:
        return (
            "The licences of the base and the data apply. That of the base was not found beside it "
            "(hence `license: unknown`): look it up before publishing."
        )
    name = told.get("license_name", told["license"])
    return f"The licences of the base ({name}) and the data apply."


def _recipe(config: Config) -> str:
    """Return the differences from the defaults, as a recipe for `grandrounds run`."""
    default, values = recipes.defaults(), config.flat()
    shown = settings_of(config)
    changed = {key: shown[key] for key in shown if values[key] != default[key]}
    text = recipes.to_toml(changed) if changed else "# the defaults\n"
    return (
        f"## Recipe\n\nDifferences from the defaults of Grand Rounds {grandrounds.__version__} "
        f"(`grandrounds run --config recipe.toml`):\n\n```toml\n{text}```"
    )


def _submission(config: Config, round_number: int, mib: float, found: Findings) -> str:
    """Return the columns of FlowerTune's medical table; empty for data that sites brought."""
    if are_real(found.sites):
        return ""
    reasons = recipes.leaderboard_differences(config)
    comparable = (
        f"Not comparable with the FlowerTune leaderboard: {'; '.join(reasons)}."
        if reasons
        else "Dataset and number of sites are those of the FlowerTune medical leaderboard."
    )
    tuned = [a for a in found.accuracies if a.protocol == "flowertune" and not a.is_base]
    scores = {a.benchmark: f"{100 * a.correct / a.n:.2f}{_coverage(a)}" for a in tuned}
    listed = [a for a in tuned if a.complete and a.benchmark in FLOWERTUNE_BENCHMARKS]
    shares = [a.correct / a.n for a in listed]
    whole = len(shares) == len(FLOWERTUNE_BENCHMARKS)
    rows = [
        ("Code", f"Grand Rounds {grandrounds.__version__}, recipe above"),
        ("Base Model", _shown(config.model.name)),
        ("Comm. Costs", f"{mib:,.2f} MB, {mib / 1024:.1f} GB (in units of 2^20 and 2^30 bytes)"),
        ("Average", f"{100 * sum(shares) / len(shares):.2f}" if whole else "-"),
        *((name, scores.get(b, "-")) for b, name in FLOWERTUNE_BENCHMARKS.items()),
        ("Checkpoint", found.repository or "-"),
        ("Rounds", f"{round_number}, {config.cohort_size} sites each"),
        ("Computed on", found.device or "-"),
    ]
    ask = "grandrounds evaluate RUN_DIR --protocol flowertune"
    missing = "" if whole else f" For the missing figures, run `{ask}` and export again."
    return (
        f"## FlowerTune submission\n\n{comparable} Columns of [its table]({FLOWERTUNE}):\n\n"
        f"{_table(('', ''), rows)}\n\nAccuracies are by FlowerTune's protocol only.{missing}"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |  |", "| | |") for cells in lines)
