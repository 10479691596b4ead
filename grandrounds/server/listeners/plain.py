"""Progress of a run in plain lines; the Rich display shares their wording."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.config import schedules
from grandrounds.config.keys import Config
from grandrounds.config.words import NOT_TOLD, beyond, counted, percent
from grandrounds.data.formulary import FORMULARY
from grandrounds.server.described import (
    Sites,
    are_real,
    cautions,
    is_of_the_formulary,
)
from grandrounds.server.listeners import Facts, Listener
from grandrounds.server.listeners.next_steps import next_steps, short_path
from grandrounds.server.listeners.start_rows import (
    Rows,
    data_rows,
    plan_rows,
    recipe_rows,
    site_rows,
)
from grandrounds.server.unfinished import EVALUATE, MAGNITUDES, TRAIN
from grandrounds.statistics import wilson_interval
from grandrounds.wire.guarantee import LOSS_DEVIATION, REHEARSAL
from grandrounds.wire.names import SiteNames, names_of, one_line
from grandrounds.wire.told import MARGIN, MEDIAN_LOSS, PREFERENCES, in_custody


def joined_line(site: Facts, names: SiteNames) -> str:
    """Return the line of a site that came after the roll call."""
    about = "about " if in_custody(site) else ""
    examples = counted(int(site["train-examples"]), "example")
    return f"  {names[int(site['partition-id'])]} joined: {about}{examples} for training"


def round_line(record: Mapping[str, Any], total: int) -> str:
    """Return a round in one line."""
    held_out = record.get("held-out-loss")
    parts = [f"round {record['round']}/{total}"]
    if "train-loss" in record:
        good, cohort = len(record["good"]), len(record["cohort"])
        loss = record["train-loss"]
        parts.append(f"loss {NOT_TOLD if loss is None else loss_text(loss, record)}")
        parts.append(f"{good}/{cohort} updates")
    if held_out is not None:
        parts.append(f"held-out loss {held_out:.4f}")
    if PREFERENCES in record:
        parts.append(f"preferred {percent(record[PREFERENCES])}, margin {record[MARGIN]:.3f}")
    if record.get("coverage") is not None:
        parts.append(f"coverage {percent(record['coverage'])}")
    parts.append(f"{record['communication-mib']:,.1f} MiB so far")
    parts.append(f"{record['seconds']:.1f} s")
    return "  ".join(parts)


def loss_text(loss: float, record: Mapping[str, Any]) -> str:
    """Return a training loss, with the standard deviation of its noise if it has one."""
    noise = record.get(LOSS_DEVIATION)
    return f"{loss:.4f}" if noise is None else f"{loss:.2f} (noise {noise:.2f})"


def reply_line(site: int, failure: str | None, names: SiteNames) -> str:
    """Return a client update in one line."""
    said = "update received" if failure is None else f"update not used: {one_line(failure)}"
    return f"  {names[site]}: {said}"


def checkpoint_line(folder: str) -> str:
    """Return a new checkpoint in one line."""
    return f"  checkpoint: {short_path(folder)}"


FAILED = {
    MAGNITUDES: " to tell where the magnitudes start",
    TRAIN: "",
    EVALUATE: " in evaluation",
}
"""Key of a round's failed replies → in what a site failed."""


def failure_lines(record: Mapping[str, Any], names: SiteNames) -> list[str]:
    """Return the failed replies and refused sites of a round, one line each."""
    lines = [
        f"  {names[int(site)]} failed{phase}: {one_line(why)}"
        for kind, phase in FAILED.items()
        for site, why in record.get(kind, {}).items()
    ]
    if why := record.get("skipped"):
        lines.insert(0, f"  skipped, the adapter stays: {why}")
    for who, why in record.get("refused", {}).items():
        lines.append(f"  {names.in_place_of_number(who)} cannot take part: {one_line(why)}")
    for site in record.get("budget-spent", ()):
        lines.append(f"  {names[site]} trains no more: its privacy budget is spent")
    for site, (before, now) in record.get("epsilon-fell", {}).items():
        lines.append(
            f"  {names[int(site)]} told epsilon {now:.3g} after {before:.3g}: was its budget "
            "restored from a backup? The larger one counts"
        )
    if late := record.get("late-replies"):
        lines.append(f"  {counted(late, 'late update')} arrived after the round, and not used")
    return lines


FAR = 5.0
"""A site's held-out loss is named where it is so many times the median, or the median so many times
it; the sites of the default run differ by up to 2.5."""


def outlying_losses(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the held-out losses of a round, by site, that are far from their median.

    Of two sites neither is.
    """
    losses, median = record.get("held-out-losses", {}), record.get(MEDIAN_LOSS)
    if len(losses) < 3 or not median:
        return {}
    return {p: loss for p, loss in losses.items() if not median / FAR <= loss <= median * FAR}


def limit_lines(record: Mapping[str, Any], names: SiteNames) -> list[str]:
    """Return which sites a round limited, in weight or norm: one line for each limit that acted."""
    lines, weights = [], record.get("weights", {})
    limited = [
        f"{names[int(site)]} at {weights[site]:,} of {examples:,} examples"
        for site, examples in record.get("weights-limited", {}).items()
    ]
    if limited:
        lines.append(f"  weight limited (strategy.largest-weight): {', '.join(limited)}")
    bound = record.get("norm-bound", math.inf)
    longer = [
        f"{names[int(site)]}, {beyond(norm, bound)} long"
        for site, norm in record.get("update-norms", {}).items()
        if norm > bound
    ]
    if longer:
        lines.append(f"  scaled down to a norm of {bound:.3g}: {', '.join(longer)}")
    if outlying := outlying_losses(record):
        told = ", ".join(f"{loss:.3g} at {names[int(site)]}" for site, loss in outlying.items())
        lines.append(f"  held-out losses far from their median, {record[MEDIAN_LOSS]:.4g}: {told}")
    if record.get("failed") and "hostile-tolerated" in record:
        hostile = counted(int(record["hostile-tolerated"]), "hostile update")
        lines.append(f"  the rule tolerates {hostile} among these {len(record['good'])}")
    return lines


def preference_rows(found: Mapping[str, Mapping[str, float]]) -> Rows:
    """Return what became of the held-out preferences."""
    rows: Rows = []
    for name, label, shown in (
        ("preference_accuracy", "preference accuracy", percent),
        ("ranking_accuracy", "ranking accuracy", percent),
        ("margin", "margin", "{:.4f}".format),
    ):
        if name in found:
            first, last = (shown(found[name][end]) for end in ("first", "last"))
            rows.append((label, f"{first} → {last} {PAIR_NOTES[name]}"))
    return rows


PAIR_NOTES = {
    "preference_accuracy": "of held-out pairs with a margin above 0",
    "ranking_accuracy": "of held-out pairs whose chosen answer is the likelier one",
    "margin": "(mean, against the base)",
}
"""Figure of held-out pairs → what it is."""


def summary_rows(summary: Mapping[str, Any], sites: Sites = ()) -> Rows:
    """Return the outcome, without the formulary and next steps."""
    rows: Rows = [("status", f"{summary['status']} after {counted(summary['rounds'], 'round')}")]
    if earlier := schedules.told(summary.get("earlier_schedules", "")):
        rows.append(("learning rate", earlier))
    for name, label in (("train_loss", "train loss"), ("held_out_loss", "held-out loss")):
        if summary.get(name):
            first, last = summary[name]["first"], summary[name]["last"]
            rows.append((label, f"{first:.4f} → {last:.4f}"))
    rows += preference_rows(summary.get("preferences") or {})
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
    if personal := summary.get("personal"):
        rows.append(("personal adapters", personal_text(personal, names_of(sites))))
    if found := summary.get("subgroups"):
        rows.append(("subgroups", subgroups_text(found)))
    if private := summary.get("privacy"):
        rows.append(("privacy", privacy_text(private)))
    if not summary["comparable_with_leaderboard"] and not are_real(sites):
        rows.append(("leaderboard", "not comparable with the leaderboard"))
    return rows


def personal_text(personal: Mapping[str, Any], names: SiteNames) -> str:
    """Return how many sites have an adapter of their own, and what it does there, in one line."""
    made, failed = len(personal["sites"]), personal["failed"]
    parts = [f"{made} of {counted(made + len(failed), 'site')} ({personal['name']})"]
    if mean := personal.get("mean"):
        worst = personal["worst"]
        parts.append(
            f"own held-out loss {mean['federated']:.4g} → {mean['personal']:.4g} (mean of sites), "
            f"lower at {personal['better']} and higher at {personal['worse']}; worst "
            f"{worst['federated']:.4g} → {worst['personal']:.4g} at {names[worst['site']]}"
        )
    parts += [f"none at {names[int(site)]}: {why}" for site, why in failed.items()]
    return "; ".join(parts)


def subgroups_text(found: Mapping[str, Any]) -> str:
    """Return the held-out losses by subgroup in one line, the highest first."""
    groups = found["groups"]
    losses = sorted(((of["held-out-loss"], name) for name, of in groups.items()), reverse=True)
    shown = ", ".join(f"{name}: {loss:.4f}" for loss, name in losses[:MOST_SUBGROUPS])
    more = f", {len(losses) - MOST_SUBGROUPS} more" if len(losses) > MOST_SUBGROUPS else ""
    silent = len(found["silent"])
    parts = [f"held-out loss, highest first: {shown}{more}" if losses else ""]
    parts.append(f"none told by {counted(silent, 'site')}" if silent else "")
    parts.append(f"{counted(len(found['failed']), 'site')} failed" if found["failed"] else "")
    return "; ".join(part for part in parts if part)


MOST_SUBGROUPS = 6
"""Subgroups whose losses are listed at a run's end."""


def privacy_text(private: Mapping[str, Any]) -> str:
    """Return the guarantee of a run in one line."""
    if private["epsilon"] is None:
        return "no site told what it guarantees"
    delta = f", delta {private['delta']:g}" if private["delta"] else ""
    spent = len(private["budget_spent"])
    parts = [
        f"epsilon {private['epsilon']:.3g} at most for one {private['unit'] or 'unit'}{delta}",
        "enforced by the sites" if private["mode"] == "enforced" else REHEARSAL,
        f"the budget of {counted(spent, 'site')} is spent" if spent else "",
    ]
    return "; ".join(part for part in parts if part)


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
    if left := measured.get("correction_error"):
        rows.append(
            (
                "aggregation error",
                f"left by the correction of B: {100 * left['first']:.2g} % of the update in round "
                f"1, {100 * left['last']:.2g} % in the last",
            )
        )
    if site := measured.get("site_rank"):
        first, last = site["first"], site["last"]
        rows.append(("mean rank of sites", f"{first:.1f} in round 1, {last:.1f} in the last"))
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


def disagreement_text(summary: Mapping[str, Any]) -> str:
    """Return what each site answered in the formulary's exam; empty if they agree."""
    told = [
        f"site {site}: {scores['private']['tuned']['correct']} private and "
        f"{scores['public']['tuned']['correct']} public facts"
        for site, scores in summary.get("formulary_by_site", {}).items()
    ]
    return f"sites disagree on the exam, and the median counts: {'; '.join(told)}" if told else ""


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
            self._say(*limit_lines(record, self._present.names))
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
            notes = [forgetting_text(scores, config), disagreement_text(summary)]
            self._say(*(f"  {said}" for said in notes if said))
        self._say(*(f"note: {caution}" for caution in cautions(config, sites)))
        self._say(*next_steps(summary, config, sites))

    def _say_rows(self, title: str, rows: Rows) -> None:
        width = max(len(name) for name, _ in rows)
        self._say(title, *(f"  {name:<{width}}  {value}" for name, value in rows))

    @staticmethod
    def _say(*lines: str) -> None:
        for line in lines:
            print(line, flush=True)
