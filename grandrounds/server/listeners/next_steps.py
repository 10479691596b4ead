"""The commands to run after a run: on the same engine, and on the data that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grandrounds.config.bases import REAL_BASE
from grandrounds.config.keys import Config
from grandrounds.config.words import command
from grandrounds.data.formulary import FORMULARY
from grandrounds.server.described import Sites, are_real, engine_options, is_fictional
from grandrounds.server.listeners import Facts


def short_path(path: str) -> str:
    """Return a path relative to the current folder, if it is inside it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def next_steps(summary: Mapping[str, Any], config: Config, sites: Sites = ()) -> list[str]:
    """Return the paths of the adapters, and the next commands, on the same engine."""
    directory = short_path(summary["directory"])
    lines = [f"adapter: {directory}/{summary['adapter']}"] if summary["adapter"] else []
    best = summary["best_adapter"]
    if best and best["adapter"] != summary["adapter"]:
        lines.append(
            f"lowest held-out loss: {directory}/{best['adapter']} ({best['held_out_loss']:.4f})"
        )
    if summary["adapter"]:
        lines += [f"next: {step}" for step in _next(Path(directory), summary, config, sites)]
    return lines


def _next(directory: Path, summary: Facts, config: Config, sites: Sites) -> list[str]:
    again = command("grandrounds", "run", "--config", directory / "config.toml")
    engine = engine_options(sites, summary)
    more = f"--rounds {2 * summary['rounds']}{engine}"
    longer = f"train longer: {command('grandrounds', 'run', '--resume', directory)} {more}"
    if config.is_private:  # its noise is calibrated for its rounds
        longer = f"train longer, starting anew: {again} {more}"
    if config.personalisation.name == "shared-a":  # there is no whole adapter but the sites'
        if are_real(sites):
            return [longer]
        return [command("grandrounds", "evaluate", directory, "--site", "0"), longer]
    if is_fictional(config, sites):
        return [command("grandrounds", "evaluate", directory), longer]
    look = command("grandrounds", "report", directory, "--open")
    if config.model.name != FORMULARY:
        has_rows = Path(config.static.name).is_absolute() and config.data.held_out_fraction
        is_asked = has_rows and not are_real(sites)
        asked = [command("grandrounds", "evaluate", directory)] if is_asked else []
        ask = f'{command("grandrounds", "ask", directory)} "a question of yours"'
        return [*asked, ask, look, longer]
    if are_real(sites) or config.lora.is_continued:  # sites name bases; an adapter fits only one
        return [look, longer]
    real = f"{again} --model {REAL_BASE}{engine}"
    return [look, f"train a real base, starting anew: {real}"]
