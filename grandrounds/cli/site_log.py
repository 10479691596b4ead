"""`grandrounds site log`: a site's audit log as a table, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from grandrounds.cli.screen import say
from grandrounds.config.words import counted, shown
from grandrounds.errors import ConfigError
from grandrounds.site.custody import audit
from grandrounds.site.custody.site_file import read_site_file

COLUMNS = ("time", "run", "round", "message", "outcome", "requested", "tensors", "what")


def log(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The site's site.toml.", metavar="site.toml")
    ] = Path("site.toml"),
    run: Annotated[str, typer.Option(help="Only this run: its key or the beginning of it.")] = "",
    kind: Annotated[
        str, typer.Option(help="Only this kind of message: query, train, train.masked, evaluate.")
    ] = "",
    outcome: Annotated[
        str, typer.Option(help="Only this outcome: answered, refused, failed, crashed.")
    ] = "",
    since: Annotated[str, typer.Option(help="Only from this time on, such as 2026-05-31.")] = "",
    last: Annotated[int, typer.Option(help="Only the last lines; 0: all.", min=0)] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain of hashes; exit code 1 if broken.")
    ] = False,
    noted: Annotated[
        str, typer.Option(help="With --verify: a last hash noted earlier, which must be there.")
    ] = "",
) -> None:
    """Show the site's audit log, or verify that no line was changed or removed."""
    site = read_site_file(config)
    folder = site.place(site.agent.state)
    if noted and not verify:
        raise ConfigError("--noted needs --verify.")
    if verify:
        if not _is_whole(folder, noted):
            raise typer.Exit(1)
        return
    wanted = {"run": run, "asked": kind, "outcome": outcome}
    unreadable = 0
    found = []
    for line in audit.lines(folder):
        if line.entry is None:
            unreadable += 1
        elif _is_wanted(line.entry, wanted, since):
            found.append(line.entry)
    shown = found[-last:] if last else found
    if as_json:
        say(*(json.dumps(entry) for entry in shown))
        return
    say(*_table(shown))
    if len(shown) < len(found):
        say(f"{len(found) - len(shown):,} earlier lines: --last 0 shows all")
    if unreadable:
        say(f"{counted(unreadable, 'line')} cannot be read: see --verify")


def _is_wanted(entry: Mapping[str, Any], wanted: Mapping[str, str], since: str) -> bool:
    return str(entry.get("time", "")) >= since and all(
        str(entry.get(key, "")).startswith(value) for key, value in wanted.items()
    )


def _table(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    rows = [COLUMNS, *(tuple(map(shown, _cells(entry))) for entry in entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = []
    for row in rows:
        padded = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*padded, row[-1]]).rstrip())
    return lines


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one line of the log as a row."""
    return (
        str(entry.get("time", "-")),
        str(entry.get("run", ""))[:8] or "-",
        str(entry.get("round", "-")),
        str(entry.get("asked", "")) or "-",
        str(entry.get("outcome", "-")),
        _requested(entry),
        _tensors(entry),
        _what(entry),
    )


def _requested(entry: Mapping[str, Any]) -> str:
    """Return what bounds the leakage of a visit: `4 steps, 64 examples, r 16, rate 0.0003`."""
    parts = []
    for key in ("steps", "examples"):
        if isinstance(count := entry.get(key), int):
            parts.append(counted(count, key.removesuffix("s")))
    parts += [
        f"{word} {entry[key]:g}" if isinstance(entry[key], int | float) else f"{word} {entry[key]}"
        for key, word in (("rank", "r"), ("learning-rate", "rate"))
        if entry.get(key) is not None
    ]
    if isinstance(epsilon := entry.get("epsilon"), int | float):
        parts.append(f"epsilon {epsilon:.3g} so far")
    return ", ".join(parts) or "-"


def _tensors(entry: Mapping[str, Any]) -> str:
    """Return norms of what came and went."""
    norms = (entry.get("norm-in"), _part(entry, "left").get("norm"))
    came, went = (f"{norm:.3g}" if isinstance(norm, int | float) else "-" for norm in norms)
    return f"norm {came} in, {went} out" if (came, went) != ("-", "-") else "-"


def _what(entry: Mapping[str, Any]) -> str:
    """Return the reason of a refusal, the place of a crash, and what was found in the data."""
    parts = [str(entry[key]) for key in ("reason", "error") if entry.get(key)]
    if refused := entry.get("next-refused"):
        parts.append(f"for the next round: {refused}")
    for key, word in (("survivors", "in the sum"), ("cohort", "in the cohort")):
        if isinstance(sites := entry.get(key), list):
            parts.append(f"{counted(len(sites), 'site')} {word}")
            break
    if isinstance(where := entry.get("where"), list) and where:
        parts.append(f"at {where[0]}")
    if messages := entry.get("messages"):
        parts.append(f"{messages} messages without a line of their own")
    if isinstance(seconds := entry.get("seconds"), int | float):
        parts.append(f"{seconds:g} s")
    if identifiers := _part(entry, "identifiers"):
        listed = ", ".join(f"{kind} in {_figure(count)}" for kind, count in identifiers.items())
        parts.append(f"of {_figure(entry.get('searched'))} examples: {listed}")
    return "; ".join(parts)


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a part of a line; of a line that somebody changed, it may be anything."""
    return part if isinstance(part := entry.get(key), dict) else {}


def _figure(count: object) -> str:
    return f"{count:,}" if isinstance(count, int) else str(count)


def _is_whole(folder: Path, noted: str) -> bool:
    """Say what the chain of hashes shows; return whether it is whole."""
    found = audit.verified(folder, noted.lower())
    files = len(audit.rotated(folder)) + (folder / audit.FILE).exists()
    before = f", {found.before:,} of them from before the chain began" if found.before else ""
    say(f"{counted(found.count, 'line')} in {counted(files, 'file')}{before}")
    for place in found.torn:
        say(f"{place} cannot be read: a power cut tore it, or it was damaged before the next line")
    for problem in found.broken:
        say(problem)
    if not found.holds_noted:
        say(f"no line has the noted hash {noted}: lines were removed from the end, or changed")
    if is_whole := not found.broken and found.holds_noted:
        say("every line continues the one before it")
    say(f"last hash: {found.last}")
    return is_whole
