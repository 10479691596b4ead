"""What a page says in words: the headline, the recipe, the surroundings, how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.config import recipes
from grandrounds.config.keys import FIELD_OF_KEY, PLACES, Config
from grandrounds.config.values import Scalar
from grandrounds.server.listeners.plain import recipe_rows
from grandrounds.server.model_card import have_own_data
from grandrounds.study.report.figures import NONE, Table, Tile, duration, mib, percent
from grandrounds.study.report.learning import scores
from grandrounds.study.report.read import QUIET_SECONDS, RunFiles

MOODS = {"completed": "good", "going": "going"}

MOST_FAILURES = 50


def status_text(run: RunFiles) -> str:
    """Return how a run stands, in a few words."""
    rounds = f"{run.rounds} of {run.planned_rounds} rounds"
    if run.status == "completed":
        return f"Completed: {run.rounds} rounds"
    if run.status == "going":
        return f"Not finished yet: {rounds}"
    return f"{run.status.capitalize()} after {rounds}"


def story(run: RunFiles) -> list[str]:
    """Return what happened, where it is not all well: what failed, where, and what to do."""
    if run.status == "completed":
        return []
    resume = f"grandrounds run --resume {shlex.quote(str(run.path))}{_engine(run)}"
    if run.status == "going":
        ago = duration(run.quiet_seconds)
        said = f"There is no summary yet. The last round was written {ago} before this page."
        if run.quiet_seconds > QUIET_SECONDS:
            said += f" If nothing runs any more, it was killed; {resume} goes on."
        return [said, "Everything below is as far as the run has come."]
    reason = str(run.summary.get("reason") or "no reason was written down")
    where = f"Round {run.rounds + 1}" if run.rounds < run.planned_rounds else "At its end"
    if not reason.startswith(where):
        reason = f"{where}: {reason}"
    return [reason, f"Finished rounds are kept; {resume} goes on from there."]


def failures(run: RunFiles) -> list[str]:
    """Return every reply that was not used, and why."""
    lines = []
    for record in run.metrics:
        for key, doing in (("failed", "training"), ("evaluate-failed", "judging")):
            for site, why in (record.get(key) or {}).items():
                lines.append(f"round {record['round']}, site {site}, {doing}: {why}")
    if len(lines) > MOST_FAILURES:
        lines[MOST_FAILURES:] = [f"and {len(lines) - MOST_FAILURES:,} more in metrics.jsonl"]
    return lines


# --- Headline -------------------------------------------------------------------------------------


def tiles(run: RunFiles) -> list[Tile]:
    """Return the figures of the headline."""
    found = accuracy_tiles(run)
    losses = run.values("held-out-loss")
    if losses:
        first, last = losses[0][1], losses[-1][1]
        note = f"nats per answer token, round {losses[0][0]} to {losses[-1][0]}"
        found.append(Tile("held-out loss", f"{loss_text(first)} → {loss_text(last)}", note))
    sent = run.ledger.get("communication_mib")
    meant = run.plan.get("total-mib")
    found.append(Tile("sent and received", mib(sent), f"planned {mib(meant)} for the whole run"))
    covered = run.values("coverage")
    if covered:
        found.append(Tile("coverage", percent(covered[-1][1]), "of the examples trained on"))
    asked = sum(len(m.get("cohort") or ()) for m in run.trained)
    used = sum(len(m.get("good") or ()) for m in run.trained)
    found.append(Tile("visits used", f"{used:,} of {asked:,}", f"{asked - used:,} failed"))
    seconds = sum(s for _, s in run.values("seconds"))
    device = run.summary.get("device") or (run.sites[0].get("device") if run.sites else None)
    found.append(Tile("time", duration(seconds), f"on {device}" if device else ""))
    return found


def loss_text(loss: float) -> str:
    """Return a loss as short as the headline needs."""
    return f"{loss:.3f}" if loss < 10 else f"{loss:.2f}"


def accuracy_tiles(run: RunFiles) -> list[Tile]:
    """Return base and last checkpoint on every benchmark, at most four tiles."""
    found = []
    all_scores = scores(run)
    keys = dict.fromkeys((s.protocol, s.benchmark, s.group) for s in all_scores)
    for key in keys:
        of_key = [s for s in all_scores if (s.protocol, s.benchmark, s.group) == key]
        base = next((s for s in of_key if s.model == "base"), None)
        tuned = max(
            (s for s in of_key if s.round is not None), key=lambda s: s.round or 0, default=None
        )
        if tuned is None:
            continue
        name = f"{key[2]} facts" if key[2] else key[1]
        low, high = (100 * end for end in tuned.interval)
        before = f"{100 * base.accuracy:.1f} → " if base else ""
        note = f"{tuned.correct:,}/{tuned.n:,}, 95 % interval {low:.1f} to {high:.1f}"
        found.append(Tile(name, f"{before}{percent(tuned.accuracy)}", note))
    return found[:4]


# --- Recipe ---------------------------------------------------------------------------------------


def differing(config: Config) -> dict[str, Scalar]:
    """Return the keys that are not as packaged, places apart."""
    default, flat = recipes.resolve().flat(), config.flat()
    return {
        key: flat[key] for key in FIELD_OF_KEY if key not in PLACES and flat[key] != default[key]
    }


def value_text(value: Scalar) -> str:
    """Return a value as TOML has it, but for texts."""
    if isinstance(value, bool):
        return str(value).lower()
    return (
        value or '""' if isinstance(value, str) else f"{value:g}" if _plain(value) else str(value)
    )


def _plain(value: Scalar) -> bool:
    return isinstance(value, float) and float(f"{value:g}") == value


def recipe_tables(config: Config) -> list[Table]:
    """Return the recipe in words, what differs from the defaults, then all of it."""
    default, flat = recipes.resolve().flat(), config.flat()
    changed = differing(config)
    rows = [(key, value_text(value), value_text(default[key])) for key, value in changed.items()]
    rest = [(key, value_text(flat[key])) for key in FIELD_OF_KEY if key not in (*changed, *PLACES)]
    found = [Table(("what", "how"), recipe_rows(config), "In words")]
    if rows:
        found.append(Table(("key", "value", "default"), rows, "Other than the defaults"))
    found.append(Table(("key", "value"), rest, f"As packaged: {len(rest)} keys"))
    return found


def commands(run: RunFiles) -> list[tuple[str, str]]:
    """Return the commands that repeat a run, with its directory and without."""
    again = shlex.join(["grandrounds", "run", "--config", str(run.path / "config.toml")])
    return [
        ("From this run directory", again + _engine(run)),
        ("From anywhere, with the same version", repeat_command(run.config) + _engine(run)),
    ]


def _engine(run: RunFiles) -> str:
    """Return the options that reach real sites, if it was they who trained; else nothing."""
    return " --engine deployment --connection NAME" * have_own_data(run.sites)


def repeat_command(config: Config) -> str:
    """Return `grandrounds run` with `--set` for every key that is not as packaged."""
    words = ["grandrounds", "run"]
    for key, value in differing(config).items():
        literal = recipes.to_toml({key: value}).partition(" = ")[2].strip()
        if isinstance(value, str) and recipes.parse_overrides([f"{key}={value}"])[key] == value:
            literal = value
        words += ["--set", f"{key}={literal}"]
    return shlex.join(words)


# --- Surroundings ---------------------------------------------------------------------------------


def environment_tables(run: RunFiles) -> list[Table]:
    """Return versions, machine and hashes."""
    surroundings = run.environment
    packages: Mapping[str, Any] = surroundings.get("packages") or {}
    versions = [
        (name, str(surroundings[name]))
        for name in ("grandrounds", "python", "platform")
        if surroundings.get(name)
    ]
    versions += [(name, str(found or "not installed")) for name, found in packages.items()]
    return [
        Table(("what", "version"), versions, "Versions at the server"),
        Table(("what", "how"), site_rows(run.sites), "At the sites"),
        Table(("file", "SHA-256"), list(run.hashes.items()), "Hashes"),
    ]


def site_rows(sites: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what all sites have said, each different answer once."""
    names = {
        "base": "base (fingerprint)",
        "prompt": "prompt (hash)",
        "device": "device",
        "precision": "precision",
        "version": "grandrounds",
        "torch": "torch",
        "python": "python",
        "threads": "threads",
    }
    rows = []
    for key, name in names.items():
        said = list(dict.fromkeys(str(s[key]) for s in sites if key in s))
        rows.append((name, ", ".join(said) or NONE))
    return rows
