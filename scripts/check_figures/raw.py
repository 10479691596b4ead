"""The raw files of a run directory, read without the package."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
FAILED = ("magnitudes-failed", "failed", "evaluate-failed", "formulary-failed")
"""Keys of failed replies in lines of metrics.jsonl and unfinished.jsonl."""

AFTER = ("formulary", "personal", "subgroups")
"""Kinds of messages after the last round."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Raw:
    """The content of a run directory."""

    path: Path
    config: Json
    """Flat, key → value."""
    lines: list[dict[str, Any]]
    lost: list[dict[str, Any]]
    """Of unfinished.jsonl."""
    summary: Json
    ledger: Json
    plan: Json
    sites: list[dict[str, Any]]
    environment: Json
    evaluations: list[dict[str, Any]]
    """Of the run and of its checkpoints, one for each protocol."""
    audit: Json

    @property
    def trained(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["round"] > 0]

    @property
    def rounds(self) -> int:
        return int(self.lines[-1]["round"]) if self.lines else 0

    @property
    def planned(self) -> int:
        return int(self.config["num-server-rounds"])

    @property
    def names(self) -> list[str]:
        """Texts whose digits are no figures."""
        said = [self.path.name, str(self.path), Path(str(self.config["model.name"])).name]
        said.append(Path(str(self.config["static.dataset.name"])).name)
        said += filter(None, (self.name_of(site["partition-id"]) for site in self.sites))
        said += [row["title"] for one in self.evaluations for row in one["rows"]]
        said.append(str((self.summary.get("privacy") or {}).get("accountant") or ""))
        for line in (*self.lines, *self.lost):
            for key in FAILED:
                said += (line.get(key) or {}).values()
        said += [line["reason"] for line in self.lost] + [str(self.summary.get("reason") or "")]
        said += self.summary.get("not_comparable_because") or []
        for last in (self.summary.get(name) or {} for name in ("personal", "subgroups")):
            said += [*(last.get("failed") or {}).values(), *(last.get("columns") or ())]
        return said

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return (round, value) of the lines with a number under a key."""
        return [(line["round"], line[key]) for line in self.lines if is_number(line.get(key))]

    def who(self, site: int) -> list[float]:
        """Return the numbers in how a site is called: none if it has a name."""
        return [] if self.name_of(site) else [site]

    def name_of(self, site: int) -> str:
        """Return a site's name; empty if that is its number."""
        names = {s["partition-id"]: str(s.get("name") or "") for s in self.sites}
        return names.get(site, "").removeprefix(f"site {site}")

    def sent(self, way: str = "") -> float:
        """Return the MiB of the ledger, all or those of one direction."""
        return mib(self.ledger, way)

    def failures(self, key: str) -> int:
        return sum(len(line.get(key) or ()) for line in (*self.lines, *self.lost))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mib(content: Json, way: str = "") -> float:
    totals = content.get("totals") or {}
    return sum(t["tensor_bytes"] for kind, t in totals.items() if kind.endswith(way)) / MIB


def read(path: Path) -> Raw:
    """Read a run directory."""

    def json_of(name: str, otherwise: Any) -> Any:
        file = path / name
        return json.loads(file.read_text()) if file.is_file() else otherwise

    def lines_of(name: str) -> list[dict[str, Any]]:
        file = path / name
        text = file.read_text() if file.is_file() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    evaluations: list[dict[str, Any]] = []
    for folder in (path, *sorted(path.glob("peft_*"), key=lambda one: int(one.name[5:]))):
        found = json_of(f"{folder.relative_to(path)}/evaluation/evaluation.json", None)
        evaluations += evaluations_in(found) if found else []
    return Raw(
        path=path,
        config=flat(tomllib.loads((path / "config.toml").read_text())),
        lines=lines_of("metrics.jsonl"),
        lost=lines_of("unfinished.jsonl"),
        summary=json_of("summary.json", {}),
        ledger=json_of("ledger.json", {}),
        plan=json_of("plan.json", {}),
        sites=json_of("sites.json", []),
        environment=json_of("environment.json", {}),
        evaluations=evaluations,
        audit=json_of("privacy-audit.json", {}),
    )


def evaluations_in(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluations of an evaluation.json, one for each protocol."""
    return content.get("evaluations") or [content]


def flat(table: Json, before: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def disagreements(raw: Raw) -> list[str]:
    """Return where the raw files of a run contradict each other."""
    found = []

    def same(what: str, one: float, other: float, slack: float = 1e-9) -> None:
        if abs(one - other) > slack * max(1.0, abs(one)):
            found.append(f"{what}: {one!r} and {other!r}")

    ledger, summary = raw.ledger, raw.summary
    same("ledger.json: communication_mib and its totals", ledger["communication_mib"], raw.sent())
    if summary:
        sent = summary["communication_mib"]
        same("communication_mib of summary.json and ledger.json", sent, raw.sent())
        exam = len(summary.get("formulary_failed") or ())
        failed = sum(raw.failures(key) for key in FAILED) + exam
        same(
            "failed_replies of summary.json and the replies listed",
            summary["failed_replies"],
            failed,
        )
        same("rounds of summary.json and metrics.jsonl", summary["rounds"], raw.rounds)
        seconds = sum(line["seconds"] for line in raw.lines)
        same("seconds of summary.json and metrics.jsonl", summary["seconds"], seconds, 1e-3)
        for name, key in (("train_loss", "train-loss"), ("held_out_loss", "held-out-loss")):
            values = [value for _, value in raw.series(key)]
            ends = {"first": values[0], "last": values[-1]} if values else None
            if summary.get(name) != ends:
                found.append(
                    f"{name} of summary.json is {summary.get(name)}, metrics.jsonl has {ends}"
                )
    went_on = any(
        raw.path.glob("summary-*.json")
    )  # after an exam, which then is no longer the last
    if raw.lines and not went_on:
        last = raw.lines[-1]
        since = sum(mib(line) for line in raw.lost if line["after-round"] == last["round"])
        after = [f"{kind}.{way}" for kind in AFTER for way in ("down", "up")]
        exam = sum(mib(raw.ledger, kind) for kind in after)
        exam -= sum(mib(line, kind) for line in raw.lost for kind in after)
        same(
            "ledger.json, and the last line of metrics.jsonl with what was sent since",
            *(raw.sent(), last["communication-mib"] + since + exam),
        )
    for line in raw.lost:
        same(
            "communication-mib of unfinished.jsonl and its totals",
            line["communication-mib"],
            mib(line),
        )
    return found
