"""The headline of a run's page: status, what went wrong, and the main results."""

from __future__ import annotations

import shlex

from grandrounds.server.described import engine_options
from grandrounds.study.report.figures import Tile
from grandrounds.study.report.learning import MEANING, scores_by_questions
from grandrounds.study.report.read import QUIET_SECONDS, RunFiles
from grandrounds.study.tables import duration, in_percent, interval, mib, percent

MOODS = {"completed": "good", "going": "going"}

MOST_FAILURES = 50


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


def story(run: RunFiles) -> list[str]:
    """Return what went wrong or is not finished, and what to do; empty if the run completed."""
    if run.status == "completed":
        return []
    resume = f"grandrounds run --resume {shlex.quote(str(run.path))}{engine_options(run.sites)}"
    if run.status == "going":
        ago = duration(run.quiet_seconds)
        said = f"There is no summary yet. The last round was written {ago} before this page."
        if run.quiet_seconds > QUIET_SECONDS:
            said += f" If the run is no longer active, it was killed. To continue it: {resume}"
        return [said, "This page covers the rounds finished so far."]
    reason = str(run.summary.get("reason") or "no reason was recorded")
    where = f"Round {run.rounds + 1}" if run.rounds < run.planned_rounds else "After the last round"
    if not reason.startswith(where):
        reason = f"{where}: {reason}"
    kept = "Finished rounds are kept" if run.rounds else "No round was finished"
    return [reason, f"{kept}. To continue from there: {resume}"]


def failures(run: RunFiles) -> list[str]:
    """Return every client reply that was not used, with the reason."""
    lines = []
    for record in run.metrics:
        for key, phase in (("failed", "training"), ("evaluate-failed", "evaluation")):
            for site, why in (record.get(key) or {}).items():
                lines.append(f"round {record['round']}, site {site}, {phase}: {why}")
    if len(lines) > MOST_FAILURES:
        lines[MOST_FAILURES:] = [f"and {len(lines) - MOST_FAILURES:,} more in metrics.jsonl"]
    return lines


def tiles(run: RunFiles) -> list[Tile]:
    """Return the tiles of the headline."""
    found = accuracy_tiles(run)
    losses = run.values("held-out-loss")
    if losses:
        first, last = (_loss_text(losses[end][1]) for end in (0, -1))
        note = f"nats per answer token, round {losses[0][0]} to {losses[-1][0]}"
        found.append(Tile("held-out loss", f"{first} → {last}", note))
    sent = mib(run.ledger.get("communication_mib"))
    planned = mib(run.plan.get("total-mib"))
    found.append(Tile("communication", sent, f"planned: {planned} for the whole run"))
    covered = run.values("coverage")
    if covered:
        note = "of the training examples seen at least once"
        found.append(Tile("coverage", percent(covered[-1][1]), note))
    asked = sum(len(m.get("cohort") or ()) for m in run.trained)
    used = sum(len(m.get("good") or ()) for m in run.trained)
    found.append(Tile("visits used", f"{used:,} of {asked:,}", f"{asked - used:,} failed"))
    device = run.summary.get("device") or (run.sites[0].get("device") if run.sites else None)
    found.append(Tile("wall-clock time", duration(run.seconds), f"on {device}" if device else ""))
    return found


def _loss_text(loss: float) -> str:
    return f"{loss:.3f}" if loss < 10 else f"{loss:.2f}"


def accuracy_tiles(run: RunFiles) -> list[Tile]:
    """Return base and last checkpoint on every benchmark, at most four tiles."""
    found = []
    for (_, benchmark, group), asked in scores_by_questions(run).items():
        base = next((s for s in asked if s.model == "base"), None)
        tuned = max(
            (s for s in asked if s.round is not None), key=lambda s: s.round or 0, default=None
        )
        if tuned is None:
            continue
        before = f"{in_percent(base.accuracy)} → " if base else ""
        note = f"{tuned.counts}, 95 % interval {interval(tuned.interval)}"
        name = f"{group} facts" if group in MEANING else ", ".join(filter(None, (benchmark, group)))
        found.append(Tile(name, f"{before}{percent(tuned.accuracy)}", note))
    return found[:4]
