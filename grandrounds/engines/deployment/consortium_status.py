"""`grandrounds consortium status`: the members, who is connected, and how far the last run came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.config import recipes
from grandrounds.engines.deployment.superlink import LAST_RUN, linked
from grandrounds.engines.flower import Link, ask, quiet
from grandrounds.engines.folders import own_folder
from grandrounds.errors import EngineError, GrandRoundsError
from grandrounds.server import admitted
from grandrounds.server.directory import RunDirectory

ONLINE = "online"
"""Flower's word for a node that is connected."""


def look(folder: Path, connection: str | None) -> dict[str, Any]:
    """Return a consortium's status as JSON values; `problems` names what is wrong.

    Parameters
    ----------
    folder : Path
        Folder of the consortium.
    connection : str, optional
        Connection to its SuperLink in Flower's config.toml; None: its own `flower-config.toml`, on
        the server's machine.

    Raises
    ------
    ConfigError
        If the folder is not a consortium's or a file in it is damaged, or there is no such
        connection.
    """
    consortium = admitted.consortium_of(folder)
    members = _members(folder)
    nodes, why = _nodes(folder, consortium["name"], connection)
    last = _last_run(folder)
    for member in members:
        known = nodes.get(member["node"] or "", {})
        member["status"] = known.get("status", "unknown" if why else "not registered")
        times = {ONLINE: "online-at", "offline": "offline-at"}
        member["since"] = known.get(times.get(member["status"], ""))
        member["last-round"] = (last or {}).get("rounds-of", {}).get(str(member["partition-id"]))
    return {
        "consortium": consortium["name"],
        "server": consortium["superlink"],
        "superlink": {"answers": not why, "why": why},
        "members": members,
        "last-run": last,
        "problems": list(_problems(members, why)),
    }


def _members(folder: Path) -> list[dict[str, Any]]:
    """Return the admitted sites by their number."""
    nodes = admitted.nodes(folder)
    found = []
    for file in (folder / "admissions").glob("*.json"):
        content = admitted.admission_of(file, "name")
        node = str(nodes[file]) if file in nodes else None
        found.append(
            {"name": content["name"], "partition-id": content["partition-id"], "node": node}
        )
    return sorted(found, key=lambda member: int(member["partition-id"]))


def _nodes(
    folder: Path, name: str, connection: str | None
) -> tuple[dict[str, Mapping[str, Any]], str]:
    """Return node → what the SuperLink says of it, and why it says nothing."""
    try:
        with linked(connection) if connection else _own_link(folder, name) as link:
            answer = ask(link, "supernode", "list", link.connection)
    except EngineError as error:
        return {}, str(error)
    return {str(node["node-id"]): node for node in answer["nodes"]}, ""


@contextmanager
def _own_link(folder: Path, name: str) -> Iterator[Link]:
    """Yield a link by the entry for Flower's configuration that `consortium init` has written."""
    entry = storage.read_text(folder / "flower-config.toml")
    with own_folder() as own:
        (own.path / "config.toml").write_text(entry, encoding="utf-8")
        yield Link(own.path, {**quiet(), "FLWR_HOME": str(own.path)}, name)


def _last_run(folder: Path) -> dict[str, Any] | None:
    """Return the run that was begun last from this machine; None if none was."""
    if not (folder / LAST_RUN).is_file():
        return None
    noted = storage.read_json(folder / LAST_RUN)
    path = Path(str(noted.get("directory", "")))
    found: dict[str, Any] = {**noted, "round": None, "rounds": None, "status": "not begun"}
    if not path.is_dir():
        return found
    directory = RunDirectory(path)
    try:
        lines = directory.read_metrics()
        summary = directory.read_json("summary.json") if (path / "summary.json").exists() else {}
        config = recipes.resolve(recipes.load_recipe(path / "config.toml"))
    except GrandRoundsError as error:
        return {**found, "status": f"unreadable: {error}"}
    rounds_of = {str(site): line["round"] for line in lines for site in line.get("good", ())}
    return {
        **found,
        "status": summary.get("status", "in progress"),
        "round": lines[-1]["round"] if lines else None,
        "rounds": config.federation.num_server_rounds,
        "rounds-of": rounds_of,
    }


def _problems(members: list[dict[str, Any]], why: str) -> Iterator[str]:
    if why:
        yield f"the SuperLink does not answer: {why}"
        return
    if not members:
        yield "no site is admitted (grandrounds consortium admit)"
    for member in members:
        if member["status"] != ONLINE:
            yield f"{member['name']} is not connected ({member['status']})"


def words(found: Mapping[str, Any]) -> list[str]:
    """Return a status in lines."""
    superlink, last, members = found["superlink"], found["last-run"], found["members"]
    online = sum(member["status"] == ONLINE for member in members)
    count = "unknown" if superlink["why"] else f"{online} of {len(members)}"
    run = "none begun from this machine"
    if last:
        place = last["status"]
        if last["round"] is not None:
            place = f"round {last['round']} of {last['rounds']}, {last['status']}"
        run = f"{place}; begun {last.get('started')}, {last.get('directory')}"
    lines = [
        ("consortium", f"{found['consortium']}, sites connect to {found['server']}"),
        ("SuperLink", "answers" if superlink["answers"] else "does not answer"),
        ("last run", run),
        ("connected", count),
    ]
    width = max([12, *(len(member["name"]) + 2 for member in members)])
    for member in members:
        since = f" since {member['since']}" if member["since"] else ""
        told = f"site {member['partition-id']}, {member['status']}{since}"
        if member["last-round"] is not None:
            told += f"; last update: round {member['last-round']} of the last run"
        lines.append((f"  {member['name']}", told))
    return [
        *(f"{name:<{width + 2}}{text}" for name, text in lines),
        *(f"{'problem':<{width + 2}}{text}" for text in found["problems"]),
    ]
