"""A dossier: its files' hashes, where its lines point, and every number of a line."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.check_figures.raw import MIB, flat, is_number
from scripts.check_figures.scores import wilson
from scripts.check_figures.sheet import Sheet
from scripts.check_figures.shown import numbers_in, of_duration

DOSSIER = "dossier.json"
MISSING, ABSENT = "not recorded", " (not in the file)"


def check_dossier(run: Path) -> Sheet:
    """Return a sheet of a run's dossier.json.

    Each number of a line must be in what its sources point to: as it is, as a percentage or in
    MiB, as a number of entries, or in a text there. What is computed otherwise has a rule below.
    What a version without a key did is not in the files, and not checked.
    """
    content = json.loads((run / DOSSIER).read_text(encoding="utf-8"))
    files = {
        name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in content["files"]
    }
    texts: dict[str, str] = {}
    sheet = Sheet(texts)
    for name, entry in content["files"].items():
        if entry["sha256"] != files[name]:
            sheet.findings.append(f"files/{name} says {entry['sha256']}: it is {files[name]}")
    for section in content["sections"]:
        for line in section["lines"]:
            if line["value"] == MISSING:
                continue
            place = f"{section['key']}/{line['item']}"
            found = []
            for source in line["sources"]:
                if source["sha256"] != files.get(source["file"]):
                    sheet.findings.append(f"{place}: {source['file']} has another SHA-256")
                try:
                    found += list(at(run, source["file"], source["at"]))
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    sheet.findings.append(f"{place}: {source['at']} leads nowhere ({error!r})")
            if not line["sources"]:
                sheet.findings.append(f"{place} has no source")
            strings = {s for one in found for s in leaves(one, str) if len(s) > 3}
            strings |= {*files.values(), line["item"], run.name, "SHA-256", "95 % interval"}
            sheet.names = [*strings, *_names(run)]
            texts[place] = line["value"]
            if not any(source["at"].endswith(ABSENT) for source in line["sources"]):
                sheet.among(place, [*known(found), *computed(run, place, found)])
    return sheet


def at(run: Path, file: str, pointer: str) -> Iterator[Any]:
    """Yield what a pointer leads to: one value, or one for each line or entry of a `*`."""
    if file.endswith(".safetensors"):
        yield (run / file).stat().st_size
        return
    text = (run / file).read_text(encoding="utf-8")
    if file.endswith(".toml"):
        config = flat(tomllib.loads(text))
        key = pointer.removesuffix(ABSENT)
        if key != pointer and key in config:
            raise KeyError(pointer)
        yield list(config.values()) if not key else config[key] if key == pointer else None
        return
    roots = [json.loads(text)] if file.endswith(".json") else []
    if not roots:
        lines = [json.loads(line) for line in text.splitlines()]
        number, _, pointer = pointer.removeprefix("line ").partition(" ")
        roots = [lines[int(number) - 1]] if number.isdigit() else lines
    keys = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    several = len(roots) > 1 or "*" in keys
    found = []
    for root in roots:
        values = [root]
        for key in keys:
            if key == "*":
                values = [entry for value in values for entry in value]
            elif several:
                values = [v[key] for v in values if isinstance(v, dict) and key in v]
            else:
                values = [v[int(key)] if isinstance(v, list) else v[key] for v in values]
        found += values
    if not found:
        raise KeyError(pointer)
    yield from found


def leaves(value: Any, kind: type) -> Iterator[Any]:
    """Yield every value of a type in lists and objects, keys of objects included."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(key, kind)
            yield from leaves(entry, kind)
    elif isinstance(value, list):
        for entry in value:
            yield from leaves(entry, kind)
    elif isinstance(value, kind):
        yield value


def known(found: list[Any]) -> Iterator[float]:
    """Yield the numbers that sources hold, and in which units a line may show them."""
    for one in found:
        for value in leaves(one, object):
            if is_number(value):
                yield from (value, 100 * value, value / MIB)
            elif isinstance(value, str):
                yield from (shown.value for shown in numbers_in(value))
        if isinstance(one, list | dict):
            yield len(one)
    yield len(found)


def computed(run: Path, place: str, found: list[Any]) -> Iterator[float]:
    """Yield what is computed for a line, by its section."""
    section, _, item = place.partition("/")
    if section == "run" and item == "wall-clock time":
        yield from of_duration(found[0])
    if section in ("evaluation", "forgetting"):
        yield 95
        for one in found:
            counts = [one, *(one.values() if isinstance(one, dict) else ())]
            pairs = [c for c in counts if isinstance(c, dict) and {"correct", "n"} <= c.keys()]
            shares = [pair["correct"] / pair["n"] for pair in pairs]
            yield from (100 * share for share in shares)
            yield from (100 * b for p in pairs for b in wilson(p["correct"], p["n"]))
            yield from (100 * (b - a) for a in shares for b in shares)
    if section == "left":
        yield from _left(run)
    if section in ("approval", "recipe", "data", "sites", "subgroups"):
        yield from range(1 + len(json.loads((run / "sites.json").read_text())))
    if section == "sites" or (section, item.split(",")[0]) == ("privacy", "audit"):
        yield from range(1 + len((run / "metrics.jsonl").read_text().splitlines()))
    if section == "recipe":
        yield from range(len(flat(tomllib.loads((run / "config.toml").read_text()))))


def _left(run: Path) -> Iterator[float]:
    """Yield rounds, counts of updates and losses, and the bytes of equal updates, by site."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    up = json.loads((run / "ledger.json").read_text())["totals"].get("train.up")
    sites = json.loads((run / "sites.json").read_text())
    yield from range(max(len(lines), len(sites) + 1))
    for site in sites:
        for key in ("good", "evaluated"):
            count = sum(site["partition-id"] in (line.get(key) or ()) for line in lines)
            yield count
            if key == "good" and up:
                yield count * up["tensor_bytes"] / up["messages"]


def _names(run: Path) -> list[str]:
    """Return how sites are called."""
    sites = json.loads((run / "sites.json").read_text())
    called = [str(site.get("name") or "") for site in sites]
    return [*called, *(f"site {site['partition-id']}" for site in sites)]
