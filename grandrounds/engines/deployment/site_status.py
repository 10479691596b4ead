"""`grandrounds site status`: whether the site takes part, its last visit, budgets and disk.

Nothing is loaded, trained or written, and the data are not read; `site check` looks at those.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx

from grandrounds.engines.deployment.listening import loopback_address
from grandrounds.engines.deployment.server_checks import (
    ACTIVE,
    REJECTED,
    activation,
    connection_of,
    supernode_process,
)
from grandrounds.engines.deployment.set_up import place_of
from grandrounds.errors import ConfigError, GrandRoundsError, first_line
from grandrounds.site.custody import audit, budget_report, quota
from grandrounds.site.custody.request import is_visit
from grandrounds.site.custody.rules_hash import policy_sha256
from grandrounds.site.custody.sequence import START
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import FILE, SiteState, opened

MIB = 2**20
CONNECT_SECONDS = 5.0

LEAST_MESSAGES = 3
"""Messages of the largest size for which the disk should have room."""


def look(site: SiteFile) -> dict[str, Any]:
    """Return a site's status as JSON values; `problems` names what keeps it from its next visit.

    Raises
    ------
    ConfigError
        If the site's state or log cannot be read by this user.
    """
    folder = site.place(site.agent.state)
    try:
        is_known = (folder / FILE).exists()
    except OSError as error:
        raise ConfigError(
            f"agent.state = {folder} cannot be read ({first_line(error)}): run this as the agent's "
            "user."
        ) from error
    found: dict[str, Any] = {
        "site": site.name,
        "site-file": str(site.path),
        "policy-sha256": policy_sha256(site),
        "agent": _agent(site),
        "supernode": _supernode(site),
        "last-visit": _line(audit.latest(folder, _is_visit) if is_known else None),
        "last-refusal": _line(audit.latest(folder, _is_refusal) if is_known else None),
        "disk": _disk(site, folder),
    }
    with opened(folder) if is_known else nullcontext() as state:  # looking makes no folder
        found |= {"visits": _visits(site, state), "runs": _runs(site, state)}
        found["privacy"] = _privacy(site, state)
    found["problems"] = list(_problems(found))
    return found


# --- Connections ----------------------------------------------------------------------------------


def _agent(site: SiteFile) -> dict[str, Any]:
    """Whether the agent listens. Nothing is asked of it."""
    agent = site.agent
    address: Any = loopback_address(site) if agent.address else str(site.place(agent.socket))
    family = socket.AF_UNIX
    if agent.address:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    why = ""
    with socket.socket(family) as probe:
        probe.settimeout(CONNECT_SECONDS)
        try:
            probe.connect(address)
        except OSError as error:
            why = first_line(error)
    return {"listens": not why, "place": place_of(site), "why": why}


def _supernode(site: SiteFile) -> dict[str, Any]:
    """Whether the site's SuperNode runs here and is connected; None where nobody can say."""
    process = supernode_process(site)
    started = time.gmtime(process.create_time()) if process else None
    found: dict[str, Any] = {
        "server": site.node.superlink,
        "process": process.pid if process else None,
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", started) if started else None,
        "connected": False,
    }
    ca, key = site.place(site.node.root_certificates), site.place(site.node.private_key)
    if not ca.is_file():
        return {**found, "why": "the site has not joined a consortium (grandrounds site join)"}
    try:
        key.read_bytes()
    except PermissionError:
        if process:
            why = f"{key} is its user's: as root, the server would be asked too"
            return {**found, "connected": None, "why": why}
        return {**found, "why": "no SuperNode of this site runs"}
    except OSError as error:
        return {**found, "why": f"{key}: {error.strerror}"}
    try:
        status = activation(site, ca)
    except (httpx.HTTPError, OSError, ValueError) as error:
        return {**found, "why": f"{site.node.superlink} does not answer ({first_line(error)})"}
    if status == ACTIVE and process:
        level, why = connection_of(process)
        return {**found, "connected": level == "ok", "why": "" if level == "ok" else why}
    if status == ACTIVE:
        return {
            **found,
            "connected": None,
            "why": f"no SuperNode of this site runs here: {REJECTED}",
        }
    if status != httpx.codes.OK:
        return {**found, "why": f"the server refuses this site's key ({status})"}
    runs = "its SuperNode runs, but" if process else "no SuperNode of this site runs;"
    return {**found, "why": f"{runs} the server knows its key and has no connection of it"}


# --- Visits and budgets ---------------------------------------------------------------------------


def _is_visit(entry: Mapping[str, Any]) -> bool:
    kind = str(entry.get("asked", ""))
    return bool(kind) and is_visit(kind)


def _is_refusal(entry: Mapping[str, Any]) -> bool:
    return entry.get("outcome") in ("refused", "failed", "crashed")


def _line(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a line of the audit log says of a visit; None if there is none."""
    if entry is None:
        return None
    kept = ("time", "run", "round", "asked", "seconds", "outcome", "reason")
    return {key: entry[key] for key in kept if key in entry}


def _visits(site: SiteFile, state: SiteState | None) -> dict[str, int]:
    done, most = quota.visits_today(state) if state else 0, site.policy.max_visits_per_day
    return {"today": done, "limit": most, "left": max(0, most - done)}


def _runs(site: SiteFile, state: SiteState | None) -> dict[str, int]:
    done, granted = quota.runs_today(state) if state else (0, 0)
    most = site.policy.max_runs_per_day + granted
    return {"today": done, "limit": most, "left": max(0, most - done)}


def _privacy(site: SiteFile, state: SiteState | None) -> dict[str, Any] | None:
    """Return the privacy budget; None for a site that makes no private visits."""
    if not site.privacy.declared_units:
        return None
    try:
        told = budget_report.report(site, state)
    except GrandRoundsError as error:
        return {"why": str(error)}
    kept = ("require", "epsilon-total", "epsilon-charged", "epsilon-left", "started")
    return {**{key: told[key] for key in kept}, "why": ""}


def _disk(site: SiteFile, folder: Path) -> dict[str, int]:
    """Return the bytes of the agent's state, those that are free, and how many should be."""
    size = sum(map(_bytes_of, folder.rglob("*"))) if folder.exists() else 0
    place = folder if folder.exists() else site.path.parent
    return {
        "state-bytes": size,
        "free-bytes": shutil.disk_usage(place).free,
        "least-bytes": LEAST_MESSAGES * site.agent.max_message_mib * MIB,
    }


def _bytes_of(file: Path) -> int:
    """Return the size of a file; 0 for anything else, and for one that a visit has just removed."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0


def _problems(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what keeps a site from its next visit, one line each."""
    agent, node, disk = found["agent"], found["supernode"], found["disk"]
    visits, privacy = found["visits"], found["privacy"]
    if not agent["listens"]:
        yield (
            f"the agent does not listen at {agent['place']} ({agent['why']}): start it "
            "(grandrounds site serve)"
        )
    if not node["connected"] and not _seems_connected(node):
        yield f"not connected: {node['why']}"
    if not visits["left"]:
        yield f"policy.max-visits-per-day = {visits['limit']} is used up"
    if privacy and privacy["why"]:
        yield f"privacy: {privacy['why']}"
    elif privacy and not privacy["started"]:
        yield f"privacy: the budget has not been started ({START})"
    elif privacy and privacy["epsilon-left"] <= 0:
        yield "privacy: the budget is spent"
    if disk["free-bytes"] < disk["least-bytes"]:
        yield (
            f"disk: {disk['free-bytes'] / MIB:,.0f} MiB free, less than {LEAST_MESSAGES} of the "
            "largest messages (agent.max-message-mib)"
        )


def _seems_connected(node: Mapping[str, Any]) -> bool:
    """Whether a SuperNode runs of which this user cannot ask the server: a refused one ends."""
    return node["connected"] is None and node["process"] is not None


def words(found: Mapping[str, Any]) -> list[str]:
    """Return a status in lines."""
    agent, node, disk = found["agent"], found["supernode"], found["disk"]
    visits, runs = found["visits"], found["runs"]
    runs_since = f"process {node['process']}, since {node['since']}"
    connected = f"connected to {node['server']} ({runs_since})"
    if not node["connected"]:
        connected = node["why"]
        if _seems_connected(node):
            connected = f"runs ({runs_since}); {node['why']}"
    lines = [
        ("site", f"{found['site']} ({found['site-file']})"),
        ("policy", f"SHA-256 {found['policy-sha256']}"),
        ("agent", f"listens at {agent['place']}" if agent["listens"] else f"off: {agent['why']}"),
        ("SuperNode", connected),
        ("last visit", visit_text(found["last-visit"])),
    ]
    if found["last-refusal"]:
        lines.append(("last refusal", visit_text(found["last-refusal"])))
    lines += [
        ("visits", f"{visits['today']} in 24 hours, {visits['left']} of {visits['limit']} left"),
        ("runs", f"{runs['today']} in 24 hours, {runs['left']} of {runs['limit']} left"),
        ("privacy", _privacy_text(found["privacy"])),
        (
            "disk",
            f"state {disk['state-bytes'] / MIB:,.1f} MiB, {disk['free-bytes'] / MIB:,.0f} MiB free",
        ),
    ]
    return [
        *(f"{name:<14}{text}" for name, text in lines),
        *(f"{'problem':<14}{text}" for text in found["problems"]),
    ]


def visit_text(entry: Mapping[str, Any] | None) -> str:
    """Return a line of the audit log in words."""
    if entry is None:
        return "none"
    run = str(entry.get("run", ""))[:8]
    asked = f"{entry.get('asked') or 'a message'}, round {entry.get('round', '-')}"
    seconds = entry.get("seconds")
    after = f" in {seconds:.1f} s" if isinstance(seconds, int | float) else ""
    why = f": {entry['reason']}" if entry.get("reason") else ""
    of_run = f" of run {run}" if run else ""
    return f"{entry.get('time')} {asked}{of_run}: {entry.get('outcome')}{after}{why}"


def _privacy_text(privacy: Mapping[str, Any] | None) -> str:
    if privacy is None:
        return "no private visits (privacy.declared-units = 0)"
    if privacy["why"]:
        return str(privacy["why"])
    left = f"{privacy['epsilon-left']:.3f} left of {privacy['epsilon-total']:g} for ever"
    return f"epsilon {privacy['epsilon-charged']:.3f} charged, {left}"
