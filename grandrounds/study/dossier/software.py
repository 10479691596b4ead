"""With what a run was made: versions, installed packages, and the same as a bill of materials."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from grandrounds.server.packages import PACKAGES
from grandrounds.study.dossier.lines import Line, Section, line, open_line
from grandrounds.study.dossier.record import ENVIRONMENT, Fact, Record

OF_SITES = ("version", "torch", "python", "device", "precision", "means")
"""Facts of an introduction about a site's software and machine."""


def versions_section(record: Record) -> Section:
    """Return versions of the server, and what the sites told of theirs."""
    environment, lines = record.json(ENVIRONMENT), list[Line]()
    for key in ("grandrounds", "python", "platform", "cpu"):
        if environment[key]:
            lines.append(line(f"server: {key}", environment[key].text(), environment[key]))
    for name, fact in environment["packages"].entries():
        lines.append(line(f"server: {name}", fact.text() if fact else "not installed", fact))
    for key in OF_SITES:
        each = record.sites.each(key)
        if each.listed():
            told = ", ".join(each.listed())
            lines.append(line(f"sites: {key}", told, each, how="each distinct value"))
    return Section("versions", "Versions", lines)


def packages_section(record: Record) -> Section:
    """Return every package that was installed beside the server."""
    found = record.json(PACKAGES)
    if not found:
        would = f"a run of this version writes {PACKAGES}; grandrounds run --resume adds it"
        return Section("packages", "Packages", [open_line("installed packages", would, found)])
    lines = []
    for fact in found["packages"].facts():
        hashed = fact["record-sha256"]
        told = f", RECORD {hashed.text()}" if hashed else ", no RECORD"
        lines.append(line(fact["name"].text(), f"{fact['version'].text()}{told}", fact))
    return Section("packages", f"Packages of the server ({len(lines)})", lines)


def sbom(record: Record, title: str) -> dict[str, Any]:
    """Return the packages as CycloneDX 1.6 (cyclonedx.org/docs/1.6/json).

    RECORD's hash is a property: `hashes` would be that of the file that was installed from, which
    nothing records.
    """
    found, components = record.json(PACKAGES), list[dict[str, Any]]()
    for fact in found["packages"].facts():
        properties = []
        if fact["record-sha256"]:
            value = fact["record-sha256"].text()
            properties.append({"name": "grandrounds:record-sha256", "value": value})
        components.append(_component(fact["name"].text(), fact["version"], properties))
    if not found:
        installed = record.json(ENVIRONMENT)["packages"]
        components = [_component(name, fact, []) for name, fact in installed.entries() if fact]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "machine-learning-model", "name": title}},
        "components": components,
    }


def _component(name: str, version: Fact, properties: list[dict[str, str]]) -> dict[str, Any]:
    told = version.text()
    normal = name.lower().replace("_", "-")
    purl = f"pkg:pypi/{normal}@{quote(told, safe='.-~')}"
    found = {"type": "library", "name": name, "version": told, "purl": purl}
    return {**found, "properties": properties} if properties else found
