"""What a run prints before its first round, in rows: recipe, plan, sites and machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.config import recipes, schedules
from grandrounds.config.codecs import CODECS
from grandrounds.config.keys import Config, rounded_up
from grandrounds.config.strategies import OUTER_KEYS, STRATEGIES
from grandrounds.config.words import NOT_TOLD, counted, with_own
from grandrounds.server.described import (
    Sites,
    cautions,
    data_text,
    leaderboard_text,
    objective_text,
    start_text,
)
from grandrounds.server.listeners import Facts
from grandrounds.server.listeners.next_steps import short_path
from grandrounds.server.masks.told import masks_text
from grandrounds.wire.names import names_of, one_line
from grandrounds.wire.told import COUNTS, in_custody, total_of_sites

Rows = list[tuple[str, str]]

MOST_NAMES = 20
"""Names of sites that are listed on the console."""


def recipe_rows(config: Config) -> Rows:
    """Return the resolved recipe as rows of (name, value); its data are told at the roll call."""
    model, lora, train, arguments = config.model, config.lora, config.train, config.arguments
    strategy, data = config.strategy, config.data
    bits = {0: "not quantised", 8: "8 bits (LLM.int8)", 4: "4 bits (NF4, double quantisation)"}
    length = (
        counted(arguments.max_steps, "step")
        if arguments.max_steps > 0
        else f"{arguments.num_train_epochs:g} epochs"
    )
    warmup = f", {arguments.warmup_steps} warm-up" if arguments.warmup_steps else ""
    mu = f", mu {strategy.proximal_mu:g}" if strategy.proximal_mu else ""
    replay = f", {train.replay_examples} replayed a batch" * (train.replay_examples > 0)
    fewest = ""
    if strategy.fewest_replies > 1:
        least = max(
            strategy.fewest_replies, rounded_up(strategy.min_reply_fraction, config.cohort_size)
        )
        fewest = f", at least {least} updates a round"
    again = {True: ", gradient checkpointing", "auto": ", gradient checkpointing if needed"}
    checkpointing = again.get(model.gradient_checkpointing, "")
    earlier = schedules.told(config.federation.earlier_schedules)
    rows = [
        ("base", f"{model.name}, {bits[model.quantization]}{checkpointing}"),
        (
            "adapter",
            f"{'DoRA, ' * lora.peft_use_dora}{'rs' * lora.use_rslora}LoRA "
            f"r {with_own(lora.peft_lora_r, lora.ranks_by_pattern)}, "
            f"alpha {with_own(lora.peft_lora_alpha, lora.alphas_by_pattern)}, "
            f"dropout {lora.dropout:g}, target modules: {lora.target_modules}",
        ),
        (
            "rounds",
            f"{counted(config.federation.num_server_rounds, 'round')}, {config.cohort_size} of "
            f"{counted(data.num_partitions, 'site')} a round, {strategy.name}{mu}{fewest}",
        ),
        (
            "visit",
            f"{length}{warmup}, effective batch {config.examples_per_step} "
            f"({arguments.per_device_train_batch_size} x "
            f"{arguments.gradient_accumulation_steps})"
            f"{f', in {train.devices} shares a batch' * (train.devices > 1)}, {train.optimizer}, "
            f"at most {train.seq_length} tokens{replay}",
        ),
        (
            "learning rate",
            f"{train.learning_rate_max:g} to {train.learning_rate_min:g}, cosine over rounds"
            f"{'; ' * bool(earlier)}{earlier}",
        ),
        ("seed", str(config.federation.seed)),
    ]
    if config.is_on_pairs:
        rows.insert(3, ("objective", objective_text(config)))
    if saved := start_text(config):
        rows.insert(2, ("continued from", saved))
    if encoded := encoding(config):
        rows.append(("encoding", encoded))
    if screens := defence(config):
        rows.append(("defence", screens))
    if idle := without_effect(config):
        rows.append(("no effect here", ", ".join(idle)))
    return rows


def encoding(config: Config) -> str:
    """Return how adapters are encoded, in words; empty for plain float32."""
    how = config.communication
    if config.codec_up == how.downlink_codec == "none":
        return ""
    down, used = f"{how.downlink_codec} down", [how.uplink_codec, how.downlink_codec]
    if how.downlink == "incremental":
        used.append(how.catch_up_codec)
        down += f" ({how.catch_up_codec} for a site's first message)"
    scaled = any(CODECS[name].scaled for name in used)
    block = f", one scale per {how.block_size} values" * scaled
    entropy = ", Zstandard" if how.entropy_coding else ""
    return f"{config.codec_up} up, {down}{block}{entropy}"


def defence(config: Config) -> str:
    """Return how individual updates are screened, in words; empty if they are not."""
    how = config.defence
    parts = []
    if how.largest_norm:
        parts.append(f"updates scaled down to {how.largest_norm:g} times the median norm")
    if how.update_norm_bound:
        parts.append(f"updates scaled down to a norm of {how.update_norm_bound:g}")
    if how.min_cosine > -1:
        parts.append(f"updates with a cosine below {how.min_cosine:g} to the others left out")
    if how.largest_spread:
        spread = f"{how.largest_spread:g} times the usual spread"
        parts.append(f"updates that stand out in one direction, beyond {spread}, left out")
    preset = f"preset {how.preset}: " if how.preset != "none" else ""
    return preset + ", ".join(parts)


def without_effect(config: Config) -> list[str]:
    """Return the keys that were set but have no effect in this run."""
    default = recipes.defaults()
    keys = ("logging-steps", "save-steps", "save-total-limit")
    names = [f"train.training-arguments.{key}" for key in keys]
    if config.arguments.max_steps > 0:
        names.append("train.training-arguments.num-train-epochs")
    everyones = {key for asks in STRATEGIES.values() for key in asks.keys}
    read = OUTER_KEYS if config.strategy.outer_nesterov else ()
    unread = everyones.difference(STRATEGIES[config.strategy.name].keys, read)
    names += [f"strategy.{key}" for key in sorted(unread)]
    how = config.communication
    codecs = {how.uplink_codec, how.downlink_codec}
    if how.downlink == "complete":
        names.append("communication.catch-up-codec")
    if "topk" not in codecs:
        names.append("communication.kept-share")
    if not any(CODECS[name].scaled for name in codecs):
        names.append("communication.block-size")
    if codecs == {"none"}:
        names.append("communication.entropy-coding")
    if config.data.partitioner not in ("natural", "dirichlet"):
        names.append("data.partition-by")
    if config.data.partitioner != "dirichlet":
        names.append("data.dirichlet-alpha")
    flat = config.flat()
    return [name for name in names if flat[name] != default[name]]


def plan_rows(plan: Mapping[str, Any]) -> Rows:
    """Return the planned traffic and the run directory."""
    count, total = sum(t["messages"] for t in plan["totals"].values()), plan["total-mib"]
    missing = plan.get("target-modules-without-match")
    passed_over = f"; no module matches {', '.join(missing)}" if missing else ""
    rows = [
        (
            "communication",
            f"{total:,.2f} MiB in all: {counted(count, 'message')} of "
            f"{total / max(1, count):.2f} MiB on average",
        ),
        (
            "adapter",
            f"{plan['adapter-parameters']:,} parameters, on {', '.join(plan['target-modules'])}"
            f"{passed_over}",
        ),
    ]
    if frozen := plan.get("frozen-modules"):
        rows.append(("frozen", f"{', '.join(frozen)}: all-linear leaves them out"))
    if bits := plan.get("stored-bits"):
        rows.append(("base", f"loaded as it was published, in {bits} bits"))
    if "directory" in plan:
        rows.append(("run directory", short_path(plan["directory"])))
    if plan.get("resumed-after") is not None:
        rows.append(("resumed", f"after round {plan['resumed-after']}"))
    return rows


def data_rows(config: Config, sites: Sites) -> Rows:
    """Return whose data are trained on, the sites' names, how their updates are summed, and what a
    reader must know of the data.
    """
    rows = [("data", data_text(config, sites))]
    names = names_of(sites)
    if names:
        shown = [int(site["partition-id"]) for site in sites]
        more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
        rows.append(("names", names.listed(shown[:MOST_NAMES]) + more))
    if summed := masks_text(config, sites):
        rows.append(("masks", summed))
    if differs := leaderboard_text(config, sites):
        rows.append(("leaderboard", differs))
    return [*rows, *(("note", caution) for caution in cautions(config, sites))]


def site_rows(sites: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the examples of the sites, the rows that are not used, and their machine.

    What real sites keep to themselves is named as not told.
    """
    examples = [int(s["train-examples"]) for s in sites]
    totals = {name: total_of_sites(sites, name) for name in COUNTS}

    def of_all(name: str, words: str) -> str:
        count = totals[name]
        return f"{NOT_TOLD if count is None else f'{count:,}'} {words}"

    least, most = min(examples), max(examples)
    spread = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    about = "about " if any(map(in_custody, sites)) else ""
    held_out = of_all("held-out-examples", "held out")
    trained = f"{about}{sum(examples):,} for training ({spread} per site), {held_out}"
    if totals["rows"] is not None:
        trained += f", of {totals['rows']:,} rows"
    rows = [("examples", trained)]
    left_out = {
        "duplicate-rows": "duplicate",
        "empty-rows": "empty",
        "unlearnable": "with no room for an answer",
    }
    if all(totals[name] is None for name in (*left_out, "truncated")):
        return [*rows, ("left out", f"{NOT_TOLD}: real sites keep it"), *machine_rows(sites)]
    rows.append(("left out", ", ".join(of_all(name, words) for name, words in left_out.items())))
    rows.append(("answers cut", of_all("truncated", "at the sequence length")))
    return [*rows, *machine_rows(sites)]


def machine_rows(sites: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the machines of the sites, and which computed differently before a resume.

    Updates computed with other threads, or by another library, differ in their last bits.
    """
    machines = Counter(
        one_line(f"{device_of(s)}, {counted(int(s['threads']), 'thread')}: {s['precision']}")
        for s in sites
    )
    alike = len(machines) == 1
    rows = [
        ("machine", text if alike else f"{text} ({counted(number, 'site')})")
        for text, number in machines.items()
    ]
    changed = Counter(one_line(s["computed-before"]) for s in sites if s.get("computed-before"))
    for before, number in changed.items():
        rows.append(
            (
                "note",
                f"{counted(number, 'site')} computed with {before} before the interruption; "
                "the rest differs in its last bits from a run without one",
            )
        )
    return rows


def device_of(site: Facts) -> str:
    """Return a site's device, if it tells it."""
    return str(site.get("device", f"device {NOT_TOLD}"))
