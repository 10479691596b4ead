"""Progress of a run in plain lines; the Rich display shares their wording."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.config import recipes
from grandrounds.config.codecs import CODECS
from grandrounds.config.keys import Config
from grandrounds.config.strategies import STRATEGIES
from grandrounds.config.words import NOT_TOLD, counted, percent
from grandrounds.data.formulary import FORMULARY
from grandrounds.server.described import (
    Sites,
    are_real,
    cautions,
    data_text,
    is_of_the_formulary,
    leaderboard_text,
)
from grandrounds.server.listeners import Facts, Listener
from grandrounds.server.listeners.next_steps import next_steps, short_path
from grandrounds.statistics import wilson_interval
from grandrounds.wire.names import SiteNames, names_of, one_line
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
    again = {True: ", gradient checkpointing", "auto": ", gradient checkpointing if needed"}
    checkpointing = again.get(model.gradient_checkpointing, "")
    rows = [
        ("base", f"{model.name}, {bits[model.quantization]}{checkpointing}"),
        (
            "adapter",
            f"LoRA r {lora.peft_lora_r}, alpha {lora.peft_lora_alpha:g}, "
            f"dropout {lora.dropout:g}, target modules: {lora.target_modules}",
        ),
        (
            "rounds",
            f"{counted(config.federation.num_server_rounds, 'round')}, {config.cohort_size} of "
            f"{counted(data.num_partitions, 'site')} a round, {strategy.name}{mu}",
        ),
        (
            "visit",
            f"{length}{warmup}, effective batch {config.examples_per_step} "
            f"({arguments.per_device_train_batch_size} x "
            f"{arguments.gradient_accumulation_steps}), {train.optimizer}, "
            f"at most {train.seq_length} tokens",
        ),
        (
            "learning rate",
            f"{train.learning_rate_max:g} to {train.learning_rate_min:g}, cosine over rounds",
        ),
        ("seed", str(config.federation.seed)),
    ]
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
    if how.uplink_codec == how.downlink_codec == "none":
        return ""
    down = f"{how.downlink_codec} down"
    if how.downlink == "incremental":
        down += f" ({how.catch_up_codec} for a site's first message)"
    block = f", one scale per {how.block_size} values"
    entropy = ", Zstandard" if how.entropy_coding else ""
    return f"{how.uplink_codec} up, {down}{block}{entropy}"


def defence(config: Config) -> str:
    """Return how individual updates are screened, in words; empty if they are not."""
    how = config.defence
    parts = []
    if how.update_norm_bound:
        parts.append(f"updates scaled down to a norm of {how.update_norm_bound:g}")
    if how.min_cosine > -1:
        parts.append(f"updates with a cosine below {how.min_cosine:g} to the others left out")
    return ", ".join(parts)


def without_effect(config: Config) -> list[str]:
    """Return the keys that were set but have no effect in this run."""
    default = recipes.defaults()
    keys = ("logging-steps", "save-steps", "save-total-limit")
    names = [f"train.training-arguments.{key}" for key in keys]
    if config.arguments.max_steps > 0:
        names.append("train.training-arguments.num-train-epochs")
    everyones = {key for asks in STRATEGIES.values() for key in asks.keys}
    unread = everyones.difference(STRATEGIES[config.strategy.name].keys)
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
    rows = [
        (
            "communication",
            f"{total:,.2f} MiB in all: {counted(count, 'message')} of "
            f"{total / max(1, count):.2f} MiB on average",
        ),
        (
            "adapter",
            f"{plan['adapter-parameters']:,} parameters, on {', '.join(plan['target-modules'])}",
        ),
    ]
    if "directory" in plan:
        rows.append(("run directory", short_path(plan["directory"])))
    if plan.get("resumed-after") is not None:
        rows.append(("resumed", f"after round {plan['resumed-after']}"))
    return rows


def data_rows(config: Config, sites: Sites) -> Rows:
    """Return whose data are trained on, the sites' names, and what a reader must know of them."""
    rows = [("data", data_text(config, sites))]
    names = names_of(sites)
    if names:
        shown = [int(site["partition-id"]) for site in sites]
        more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
        rows.append(("names", names.listed(shown[:MOST_NAMES]) + more))
    if differs := leaderboard_text(config, sites):
        rows.append(("leaderboard", differs))
    return [*rows, *(("note", caution) for caution in cautions(config, sites))]


def joined_line(site: Facts, names: SiteNames) -> str:
    """Return the line of a site that came after the roll call."""
    about = "about " if in_custody(site) else ""
    examples = counted(int(site["train-examples"]), "example")
    return f"  {names[int(site['partition-id'])]} joined: {about}{examples} for training"


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


def round_line(record: Mapping[str, Any], total: int) -> str:
    """Return a round in one line."""
    held_out = record.get("held-out-loss")
    parts = [f"round {record['round']}/{total}"]
    if "train-loss" in record:
        good, cohort = len(record["good"]), len(record["cohort"])
        loss = record["train-loss"]
        parts.append(f"loss {NOT_TOLD if loss is None else f'{loss:.4f}'}")
        parts.append(f"{good}/{cohort} updates")
    if held_out is not None:
        parts.append(f"held-out loss {held_out:.4f}")
    if record.get("coverage") is not None:
        parts.append(f"coverage {percent(record['coverage'])}")
    parts.append(f"{record['communication-mib']:,.1f} MiB so far")
    parts.append(f"{record['seconds']:.1f} s")
    return "  ".join(parts)


def reply_line(site: int, failure: str | None, names: SiteNames) -> str:
    """Return a client update in one line."""
    said = "update received" if failure is None else f"update not used: {one_line(failure)}"
    return f"  {names[site]}: {said}"


def checkpoint_line(folder: str) -> str:
    """Return a new checkpoint in one line."""
    return f"  checkpoint: {short_path(folder)}"


def failure_lines(record: Mapping[str, Any], names: SiteNames) -> list[str]:
    """Return the failed replies and refused sites of a round, one line each."""
    failed = {**record.get("failed", {}), **record.get("evaluate-failed", {})}
    lines = [f"  {names[int(site)]} failed: {one_line(why)}" for site, why in failed.items()]
    for who, why in record.get("refused", {}).items():
        lines.append(f"  {names.in_place_of_number(who)} cannot take part: {one_line(why)}")
    if late := record.get("late-replies"):
        lines.append(f"  {counted(late, 'late update')} arrived after the round, and not used")
    return lines


def summary_rows(summary: Mapping[str, Any], sites: Sites = ()) -> Rows:
    """Return the outcome, without the formulary and next steps."""
    rows: Rows = [("status", f"{summary['status']} after {counted(summary['rounds'], 'round')}")]
    for name, label in (("train_loss", "train loss"), ("held_out_loss", "held-out loss")):
        if summary.get(name):
            first, last = summary[name]["first"], summary[name]["last"]
            rows.append((label, f"{first:.4f} → {last:.4f}"))
    covered = summary["coverage"]
    seen = NOT_TOLD if covered is None else f"{percent(covered)} of the training examples seen"
    rows.append(("coverage", seen))
    if summary.get("proximal_penalty"):
        rows.append(("proximal penalty", f"{summary['proximal_penalty']:.3g} in the last round"))
    if errors := summary.get("product_error_of_update"):
        first, largest = 100 * errors["first"], 100 * errors["largest"]
        rows.append(
            (
                "aggregation error",
                f"LoRA factors averaged separately: {first:.2g} % of the update in round 1, "
                f"at most {largest:.2g} %",
            )
        )
    rows += aggregation_rows(summary.get("aggregation") or {})
    planned = summary["planned_mib"]
    rows.append(
        ("communication", f"{summary['communication_mib']:,.2f} MiB (planned {planned:,.2f})")
    )
    rows.append(("failed replies", str(summary["failed_replies"])))
    loads = NOT_TOLD
    if summary["base_loads"] is not None:
        loads = f"{summary['base_loads']} in "
        loads += counted(summary["processes"], "process", "processes")
    rows.append(("base loads", loads))
    rows.append(("seconds", f"{summary['seconds']:.1f}"))
    if not summary["comparable_with_leaderboard"] and not are_real(sites):
        rows.append(("leaderboard", "not comparable with the leaderboard"))
    return rows


def aggregation_rows(measured: Mapping[str, Mapping[str, float]]) -> Rows:
    """Return the figures that the rule reports, in words."""
    rows = []
    if cut := measured.get("truncation_error"):
        rank = f", rank {measured['rank']['last']:.0f} at the end" if "rank" in measured else ""
        rows.append(
            (
                "aggregation error",
                f"truncation to the rank: {100 * cut['first']:.2g} % in round 1, "
                f"{100 * cut['last']:.2g} % in the last{rank}",
            )
        )
    if step := measured.get("server_learning_rate"):
        rows.append(
            ("server step", f"{step['first']:.2f} in round 1, {step['last']:.2f} at the end")
        )
    return rows


def score_text(score: Mapping[str, int]) -> str:
    """Return `87.0 % (261/300, 95 % interval 82.7-90.4)`."""
    correct, n = score["correct"], score["n"]
    low, high = wilson_interval(correct, n)
    return f"{percent(correct / n)} ({correct}/{n}, 95 % interval {100 * low:.1f}-{100 * high:.1f})"


Scores = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Kind of facts → base or tuned → correct answers and questions, as in summary.json."""

MEANING = {"private": "private facts of the sites", "public": "public facts, known to the base"}

HELD_BY_NOBODY = "public facts, held by no site"
"""What public facts are to any base but the embedded one."""


def formulary_rows(formulary: Scores, config: Config, sites: Sites) -> list[tuple[str, ...]]:
    """Return (facts, base, tuned) for the formulary; private facts only where sites hold them."""
    held = ("private", "public") if is_of_the_formulary(config, sites) else ("public",)
    of_another = config.model.name != FORMULARY
    meaning = MEANING | ({"public": HELD_BY_NOBODY} if of_another else {})
    return [
        (meaning[kind], *(score_text(formulary[kind][which]) for which in ("base", "tuned")))
        for kind in held
    ]


def forgetting_text(formulary: Scores, config: Config) -> str:
    """Return how much of what the embedded base knew is lost; empty if nothing is."""
    if config.model.name != FORMULARY:
        return ""
    shares = [s["correct"] / s["n"] for s in (formulary["public"][w] for w in ("base", "tuned"))]
    lost = 100 * (shares[0] - shares[1])
    return f"forgotten: {lost:.1f} points of the public facts" if lost > 0.05 else ""


class Present:
    """The sites of a run as far as they are known, and how they are called."""

    def __init__(self) -> None:
        self._by_number: dict[int, Facts] = {}
        self.names = SiteNames()

    @property
    def sites(self) -> list[Facts]:
        """Their introductions."""
        return list(self._by_number.values())

    def add(self, sites: Sequence[Facts]) -> list[Facts]:
        """Take note of sites; return those that are new."""
        new = [site for site in sites if int(site["partition-id"]) not in self._by_number]
        self._by_number |= {int(site["partition-id"]): site for site in sites}
        self.names = names_of(self.sites)
        return new


class PlainReporter(Listener):
    """Prints a run in plain lines, without colours or cursor movement.

    Only a verbose output has lines for single updates and checkpoints; a quiet one has failures and
    the result.
    """

    def __init__(self, config: Config, *, verbose: bool = False, quiet: bool = False) -> None:
        self._config, self._verbose, self._quiet = config, verbose, quiet
        self._total = config.federation.num_server_rounds
        self._present = Present()
        if not quiet:
            self._say_rows("recipe", recipe_rows(config))

    def on_plan(self, plan: Facts) -> None:
        """Print the planned traffic and the run directory."""
        if not self._quiet:
            self._say_rows("plan", plan_rows(plan))

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        """Print the data of the sites; later, only those that are new."""
        is_first = not self._present.sites
        new = self._present.add(sites)
        if self._quiet:
            return
        if is_first:
            self._say_rows("sites", [*data_rows(self._config, sites), *site_rows(sites)])
        else:
            self._say(*(joined_line(site, self._present.names) for site in new))

    def on_round(self, record: Facts) -> None:
        """Print the round's line and its failures."""
        if not self._quiet:
            self._say(round_line(record, self._total))
        self._say(*failure_lines(record, self._present.names))

    def on_reply(self, site: int, failure: str | None) -> None:
        """Print an update, if more output is wanted."""
        if self._verbose:
            self._say(reply_line(site, failure, self._present.names))

    def on_checkpoint(self, round_number: int, folder: str) -> None:
        """Print the folder of a checkpoint, if more output is wanted."""
        if self._verbose:
            self._say(checkpoint_line(folder))

    def on_finished(self, summary: Facts) -> None:
        """Print the outcome and the next commands."""
        self.summary = summary
        config, sites = self._config, self._present.sites
        self._say_rows("result", summary_rows(summary, sites))
        if scores := summary.get("formulary"):
            for facts, base, tuned in formulary_rows(scores, config, sites):
                self._say(f"  {facts}", f"    base   {base}", f"    tuned  {tuned}")
            self._say(*(f"  {said}" for said in [forgetting_text(scores, config)] if said))
        self._say(*(f"note: {caution}" for caution in cautions(config, sites)))
        self._say(*next_steps(summary, config, sites))

    def _say_rows(self, title: str, rows: Rows) -> None:
        width = max(len(name) for name, _ in rows)
        self._say(title, *(f"  {name:<{width}}  {value}" for name, value in rows))

    @staticmethod
    def _say(*lines: str) -> None:
        for line in lines:
            print(line, flush=True)
