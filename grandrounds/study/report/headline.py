"""The headline of a run's page: status, what went wrong, and the main results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grandrounds.config.words import NOT_TOLD, command, counted
from grandrounds.data.common_and_rare import COMMON_AND_RARE
from grandrounds.data.formulary import FORMULARY, FORMULARY_PREFERENCES
from grandrounds.server.described import cautions, engine_options, with_own_data
from grandrounds.server.unfinished import EVALUATE, EXAM, MAGNITUDES, TRAIN
from grandrounds.study.report.figures import Tile
from grandrounds.study.report.learning import MEANING, Score, scores_by_questions
from grandrounds.study.report.read import QUIET_SECONDS, RunFiles
from grandrounds.study.tables import duration, in_percent, interval, mib, percent
from grandrounds.wire.names import one_line
from grandrounds.wire.told import MARGIN, PREFERENCES

MOODS = {"completed": "good", "going": "going"}

MOST_FAILURES = 50

KNOWN = "public facts"
"""Questions that the embedded base was trained to answer: to lose them is to forget."""

LEAST_LOSS = 0.05
"""Loss of accuracy, in percentage points, that is marked."""


def mood(run: RunFiles) -> str:
    """Return how the status of a run is marked."""
    return MOODS.get(run.status, "bad")


def status_text(run: RunFiles) -> str:
    """Return the status of a run in a few words."""
    rounds = f"{run.rounds} of {run.planned_rounds} rounds"
    if run.status == "completed":
        return f"Completed: {run.rounds} rounds"
    if run.status == "going":
        return f"In progress: {rounds}"
    return f"{run.status.capitalize()} after {rounds}"


SPOKEN = {
    FORMULARY: "the formulary",
    FORMULARY_PREFERENCES: "preferences of the formulary",
    COMMON_AND_RARE: "common and rare facts",
}
"""Built-in data → what a title calls them."""


def title(run: RunFiles) -> str:
    """Return what was trained on what: `SmolLM2-135M-Instruct tuned on cards.jsonl at 4 sites`."""
    base, data = run.config.model.name, run.config.static.name
    short = "Embedded base" if base == FORMULARY else _last_part(base)
    sites = counted(len(run.sites) or run.config.data.num_partitions, "site")
    if with_own_data(run.sites):
        return f"{short} tuned on the data of {sites}"
    source = SPOKEN.get(data) or _last_part(data)
    return f"{short} tuned on {source} at {sites}"


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def outcome(run: RunFiles) -> str:
    """Return what came out, in one sentence, and what was forgotten; empty before round 1."""
    said = []
    losses = run.values("held-out-loss")
    if len(losses) > 1:
        first, last = losses[0][1], losses[-1][1]
        start, end = _loss_text(first), _loss_text(last)
        way = "fell" if last < first else "rose"
        went = f"{way} from {start} to {end}" if start != end else f"stayed at {end}"
        said.append(f"the held-out loss {went} {run.config.loss_unit}")
    lost = ""
    for base, tuned, name in _pairs(run):
        if base is None:
            continue
        if name == KNOWN and run.config.model.name == FORMULARY:
            points = 100 * (base.accuracy - tuned.accuracy)
            lost = f" It forgot {points:.1f} points of the facts that the base knew." * (points > 0)
        else:
            ends = f"{in_percent(base.accuracy)} to {percent(tuned.accuracy)}"
            said.append(f"accuracy on {name} went from {ends}")
    if not said:
        return lost.strip()
    rounds = counted(run.rounds, "round")
    return f"After {rounds}, {' and '.join(said[:2])}.{lost}"


def story(run: RunFiles) -> list[str]:
    """Return what is damaged, went wrong or is not finished, what to do, and cautions."""
    return [*(f"Not readable: {file}." for file in run.unread), *_course(run)]


def _course(run: RunFiles) -> list[str]:
    """Return how a run that is not completed ended, and cautions."""
    warned = [f"{said[0].upper()}{said[1:]}." for said in cautions(run.config, run.sites)]
    if run.status == "completed":
        return warned
    resume = command("grandrounds", "run", "--resume", run.path) + engine_options(run.sites)
    if run.status == "going":
        ago = duration(run.quiet_seconds)
        said = f"There is no summary yet. The last round was written {ago} before this page."
        if run.quiet_seconds > QUIET_SECONDS:
            said += f" If the run is no longer active, it was killed. To continue it: {resume}"
        return [said, "This page covers the rounds finished so far.", *warned]
    reason = str(run.summary.get("reason") or "no reason was recorded")
    where = f"Round {run.rounds + 1}" if run.rounds < run.planned_rounds else "After the last round"
    if not reason.startswith(where):
        reason = f"{where}: {reason}"
    kept = "Finished rounds are kept" if run.rounds else "No round was finished"
    return [reason, f"{kept}. To continue from there: {resume}", *warned]


def failures(run: RunFiles) -> list[str]:
    """Return every client reply that was not used, with the reason."""
    lines = _failures_of(run, run.lost_after(None), "before round 0")
    for record in run.metrics:
        number = record["round"]
        lines += _failures_of(run, [record], f"round {number}")
        what = f"round {number + 1}" if number < run.planned_rounds else f"after round {number}"
        lines += _failures_of(run, run.lost_after(number), f"{what}, which did not finish")
    lines += _failures_of(run, [{EXAM: run.summary.get("formulary_failed")}], "at the end")
    if len(lines) > MOST_FAILURES:
        lines[MOST_FAILURES:] = [f"and {len(lines) - MOST_FAILURES:,} more in metrics.jsonl"]
    return lines


PHASES = {
    MAGNITUDES: "start of magnitudes",
    TRAIN: "training",
    EVALUATE: "evaluation",
    EXAM: "exam",
}
"""Key of failed replies → what failed."""


def _failures_of(run: RunFiles, records: Iterable[Mapping[str, Any]], when: str) -> list[str]:
    return [
        f"{when}, {run.names[int(site)]}, {phase}: {one_line(why)}"
        for record in records
        for key, phase in PHASES.items()
        for site, why in (record.get(key) or {}).items()
    ]


def visits(run: RunFiles) -> tuple[int, int, int]:
    """Return how many visits were asked for, used and failed; the rest was of unfinished rounds."""
    every = [*run.trained, *run.unfinished]
    asked = sum(len(m.get("cohort") or ()) for m in every)
    used = sum(len(m.get("good") or ()) for m in run.trained)
    return asked, used, sum(len(m.get(TRAIN) or ()) for m in every)


def tiles(run: RunFiles) -> list[Tile]:
    """Return the tiles of the headline."""
    found = accuracy_tiles(run)
    losses = run.values("held-out-loss")
    if losses:
        first, last = (_loss_text(losses[end][1]) for end in (0, -1))
        note = f"{run.config.loss_unit}, round {losses[0][0]} to {losses[-1][0]}"
        found.append(Tile("held-out loss", f"{first} → {last}", note))
    if preferred := run.values(PREFERENCES):
        margin = run.values(MARGIN)[-1][1]
        note = f"of held-out pairs with a margin above 0; mean margin {margin:.3f}"
        found.append(Tile("preference accuracy", percent(preferred[-1][1]), note))
    sent = mib(run.ledger.get("communication_mib"))
    planned = mib(run.plan.get("total-mib"))
    found.append(Tile("communication", sent, f"planned: {planned} for the whole run"))
    covered = run.values("coverage")
    if covered:
        note = "of the training examples seen at least once"
        found.append(Tile("coverage", percent(covered[-1][1]), note))
    elif run.trained:
        found.append(Tile("coverage", NOT_TOLD, "the sites keep it to themselves"))
    asked, used, failed = visits(run)
    note = f"{failed:,} failed"
    if dropped := asked - used - failed:
        note += f", {dropped:,} in rounds that did not finish"
    found.append(Tile("visits used", f"{used:,} of {asked:,}", note))
    device = run.summary.get("device") or (run.sites[0].get("device") if run.sites else None)
    notes = [f"on {device}"] * bool(device)
    if lost := sum(float(line["seconds"]) for line in run.unfinished):
        notes.append(f"and {duration(lost)} in rounds that did not finish")
    found.append(Tile("wall-clock time", duration(run.seconds), "; ".join(notes)))
    return found


def _loss_text(loss: float) -> str:
    return f"{loss:.3f}" if loss < 10 else f"{loss:.2f}"


def accuracy_tiles(run: RunFiles) -> list[Tile]:
    """Return base and last checkpoint on every benchmark, at most four tiles."""
    found = []
    for base, tuned, name in _pairs(run):
        note = tuned.counts
        note += f", 95 % interval {interval(tuned.interval)}" if tuned.interval else ""
        value = percent(tuned.accuracy)
        lost = 0.0
        if base is not None:
            value = f"{in_percent(base.accuracy)} → {value}"
            lost = 100 * (base.accuracy - tuned.accuracy)
        if lost > LEAST_LOSS:
            was_known = name == KNOWN and run.config.model.name == FORMULARY
            verb = "forgotten" if was_known else "below the base"
            note = f"{lost:.1f} points {verb}; {note}"
        found.append(Tile(name, value, note, "bad" if lost > LEAST_LOSS else ""))
    return found[:4]


def _pairs(run: RunFiles) -> list[tuple[Score | None, Score, str]]:
    """Return base, last checkpoint and name of every set of questions that both answered.

    What may be forgotten comes after what was to be learned.
    """
    found = []
    for (_, benchmark, group), asked in scores_by_questions(run).items():
        base = next((s for s in asked if s.model == "base"), None)
        rounds = [s for s in asked if s.round is not None]
        if rounds:
            tuned = max(rounds, key=lambda s: s.round or 0)
            is_facts = group in MEANING
            name = f"{group} facts" if is_facts else ", ".join(filter(None, (benchmark, group)))
            found.append((base, tuned, name))
    return sorted(found, key=lambda pair: pair[2] == KNOWN)
