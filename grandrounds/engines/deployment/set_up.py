"""Writes the files of a new consortium or site.

consortium init   authorities, server certificate, systemd unit, gate, Flower connection
consortium renew  a new server certificate
site init         node key, agent key, request, site.toml, an unspent privacy budget
"""

from __future__ import annotations

import getpass
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import grandrounds
from grandrounds import storage
from grandrounds.config.words import command
from grandrounds.engines.deployment import keys, signed
from grandrounds.errors import ConfigError
from grandrounds.site.custody import sequence
from grandrounds.site.custody.agent_key import IDENTITY as IDENTITY
from grandrounds.site.custody.site_file import TEMPLATE, SiteFile

TEMPLATES = Path(__file__).with_name("templates")

DATABASE = "superlink.db"
"""File of a consortium: the SuperLink's database, through which all updates pass."""

AGENT_KEY = "agent-key"
"""Key of a request, an admission and a roster: the public half of it, in OpenSSH format."""

FLEET_CALLS = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
"""What the gate passes of /v1/fleet/: the calls of a SuperNode whose key is registered."""

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def new_folder(folder: Path, mode: int = 0o700) -> Path:
    """Create a folder; raise `ConfigError` if it exists and is not empty."""
    folder = storage.expanded(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder. Choose another with --dir.")
    with storage.writing(str(folder), "Choose another with --dir.", ConfigError):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(mode)
    return folder


def check_name(name: str) -> str:
    """Return a name; raise `ConfigError` if it is not a safe file name."""
    if not SITE_NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r} is not allowed: use 1 to 63 letters, digits, dots, dashes and "
            "underscores, starting with a letter or digit."
        )
    return name


# --- The consortium -------------------------------------------------------------------------------


def init_consortium(folder: Path, name: str, host: str, port: int) -> Path:
    """Write everything that the consortium's server needs; return its folder.

    Parameters
    ----------
    host : str
        Host name or address by which sites reach the server.
    port : int
        Port of the gate; the SuperLink itself listens on the next one, on loopback only.
    """
    name = check_name(name)
    folder = new_folder(folder)
    authority_key, server_key, nodes_key = (keys.new_key() for _ in range(3))
    authority = keys.new_authority(f"{name} certificate authority", authority_key)
    server = keys.new_certificate(
        name, _hosts(host), server_key.public_key(), authority, authority_key
    )
    keys.write_private_key(folder / "authority.key", nodes_key)
    for stem, key, made in (("ca", authority_key, authority), ("server", server_key, server)):
        keys.write_private_key(folder / f"{stem}.key", key)
        keys.write_new(folder / f"{stem}.crt", keys.certificate_text(made))
    public = keys.public_text(nodes_key.public_key(), f"authority of {name}")
    keys.write_new(folder / "authority.pub", f"{public}\n".encode())
    described = {"name": name, "superlink": f"{host}:{port}", "version": grandrounds.__version__}
    keys.write_new(folder / "consortium.json", f"{json.dumps(described, indent=2)}\n".encode())
    keys.write_new(folder / "flower-config.toml", connection_entry(folder, name, port).encode())
    keys.write_new(folder / DATABASE, b"", mode=0o600)  # SQLite keeps the mode, also beside it
    (folder / "admissions").mkdir()
    values = {
        "name": name,
        "host": host,
        "port": str(port),
        "inner": str(port + 1),
        "folder": str(folder),
        "zone": re.sub(r"\W", "_", name),
        "calls": "|".join(FLEET_CALLS),
        "user": getpass.getuser(),
        "bin": str(Path(sys.executable).parent),
        "command": command(*superlink_command(folder, port)),
    }
    for file in ("superlink.service", "gate.conf"):
        keys.write_new(folder / file, _filled(file, values).encode())
    return folder


def renew(folder: Path) -> float:
    """Write a new certificate for the server's key, signed by `ca.key`; return its days.

    Raises
    ------
    ConfigError
        If the folder does not belong to a consortium, or a key is missing.
    """
    described = storage.read_json(folder / "consortium.json")
    server_key = keys.read_private_key(folder / "server.key")
    authority_key = keys.read_private_key(folder / "ca.key")
    authority = keys.read_certificate(folder / "ca.crt")
    host = str(described["superlink"]).rpartition(":")[0]
    made = keys.new_certificate(
        str(described["name"]), _hosts(host), server_key.public_key(), authority, authority_key
    )
    (folder / "server.crt").write_bytes(keys.certificate_text(made))
    return keys.days_left(made)


def _hosts(host: str) -> list[str]:
    """Return the server's names: for sites, and on loopback for the gate and for runs."""
    return list(dict.fromkeys([host, "localhost", "127.0.0.1", "::1"]))


def superlink_command(folder: Path, port: int) -> list[str]:
    """Return the command that starts the consortium's SuperLink behind its gate."""
    return [
        str(Path(sys.executable).parent / "flower-superlink"),
        *("--ssl-ca-certfile", str(folder / "ca.crt")),
        *("--ssl-certfile", str(folder / "server.crt")),
        *("--ssl-keyfile", str(folder / "server.key")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(folder / DATABASE)),
        *("--host", "127.0.0.1"),
        *("--port", str(port + 1)),
    ]


def connection_entry(folder: Path, name: str, port: int) -> str:
    """Return the entry in Flower's config.toml for starting runs on the server."""
    return (
        f"[superlink.{name}]\n"
        f'address = "127.0.0.1:{port + 1}"\n'
        f"root-certificates = {json.dumps(str(folder / 'ca.crt'))}\n"
    )


# --- A site ---------------------------------------------------------------------------------------


def init_site(folder: Path, name: str, *, tls_port: int = 0) -> Path:
    """Write a site's two keys, its request, its site.toml and a budget of which nothing is spent.

    Parameters
    ----------
    tls_port : int
        Loopback port of the agent, with certificates for both ends; 0: a Unix socket.

    Returns
    -------
    Path
        The site's folder.
    """
    name = check_name(name)
    folder = new_folder(folder, 0o711)  # the SuperNode's user must reach its files inside
    key = keys.new_key()
    keys.write_private_key(folder / "node.key", key, openssh=True)
    public = keys.public_text(key.public_key(), name)
    keys.write_new(folder / "node.pub", f"{public}\n".encode())
    content = {
        "name": name,
        "public-key": public,
        AGENT_KEY: keys.public_text(new_identity(folder / IDENTITY), name),
        "version": grandrounds.__version__,
    }
    signed.write_signed(folder / "request.json", content, key)
    text = TEMPLATE.read_text(encoding="utf-8")
    text = with_value(text, "", "name", name)
    if tls_port:
        _write_agent_certificates(folder)
        agent = {
            "socket": "",
            "address": f"127.0.0.1:{tls_port}",
            "certificate": "agent.crt",
            "key": "agent.key",
            "client-ca": "agent-ca.crt",
        }
        for field, value in agent.items():
            text = with_value(text, "agent", field, value)
    keys.write_new(folder / "site.toml", text.encode(), mode=0o600)
    sequence.start_new(folder / "state")
    return folder


def new_identity(file: Path) -> keys.PublicKey:
    """Write a new agent key; return its public half. Raise `ConfigError` if the file exists."""
    key = keys.new_key()
    keys.write_private_key(file, key)
    return key.public_key()


def _write_agent_certificates(folder: Path) -> None:
    """Write a local certificate authority, and certificates for agent and SuperNode."""
    authority_key = keys.new_key()
    authority = keys.new_authority("agent of this site", authority_key)
    keys.write_new(folder / "agent-ca.crt", keys.certificate_text(authority))
    for stem in ("agent", "agent-client"):
        key = keys.new_key()
        made = keys.new_certificate(
            stem, ["127.0.0.1", "::1", "localhost"], key.public_key(), authority, authority_key
        )
        keys.write_private_key(folder / f"{stem}.key", key)
        keys.write_new(folder / f"{stem}.crt", keys.certificate_text(made))


def units(site: SiteFile) -> dict[str, str]:
    """Return the systemd units of agent and SuperNode for a site.toml, by file name."""
    agent, folder = site.agent, site.path.parent
    written = [site.place(agent.state)]
    written += [site.place(agent.socket).parent] if agent.socket else []
    sequence = site.privacy.sequence_file
    written += [site.place(sequence).parent] if sequence else []
    outside = [str(place) for place in written if not place.is_relative_to(folder)]
    needs_network = bool(agent.address or site.data.database)
    values = {
        "group": f"SupplementaryGroups={agent.socket_group}\n" if agent.socket_group else "",
        "writes": " ".join([str(folder), *outside]),
        "memory": f"{agent.max_memory_mib}M" if agent.max_memory_mib else "90%",
        "network": "" if needs_network else "PrivateNetwork=yes\n",
        "name": site.name,
        "folder": str(folder),
        "user": folder.owner(),
        "node_user": "flower",
        "bin": str(Path(sys.executable).parent),
        "command": command(*supernode_command(site)),
    }
    return {file: _filled(file, values) for file in ("agent.service", "supernode.service")}


def supernode_command(site: SiteFile, port: int = 9094) -> list[str]:
    """Return the command that starts the site's SuperNode.

    Parameters
    ----------
    port : int
        Loopback port of the SuperNode's own interface.
    """
    return [
        str(Path(sys.executable).parent / "flower-supernode"),
        *("--superlink", site.node.superlink),
        *("--root-certificates", str(site.place(site.node.root_certificates))),
        *("--auth-supernode-private-key", str(site.place(site.node.private_key))),
        *("--node-config", node_config(site)),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
    ]


def node_config(site: SiteFile) -> str:
    """Return what the SuperNode passes to its ClientApps: partition id and agent."""
    words: dict[str, Any] = {
        "partition-id": site.node.partition_id,
        "num-partitions": site.node.num_partitions,
        "agent": place_of(site),
    }
    if site.agent.address:
        words["agent-ca"] = str(site.place(site.agent.client_ca))
        for key, ending in (("agent-certificate", "crt"), ("agent-key", "key")):
            words[key] = str(site.path.parent / f"agent-client.{ending}")
    return " ".join(
        f"{key}={json.dumps(value) if isinstance(value, str) else value}"
        for key, value in words.items()
    )


def place_of(site: SiteFile) -> str:
    """Return the address under which ClientApps find the site's agent."""
    agent = site.agent
    return f"tls:{agent.address}" if agent.address else f"unix:{site.place(agent.socket)}"


# --- Texts ----------------------------------------------------------------------------------------


def with_value(text: str, section: str, key: str, value: str | int | bool) -> str:
    """Return a site.toml with one value replaced; comments and order are kept."""
    lines = text.splitlines(keepends=True)
    current = ""
    for i, line in enumerate(lines):
        if header := re.match(r"\s*\[([^\]]+)\]", line):
            current = header.group(1)
        found = re.match(rf"({re.escape(key)}\s*=\s*)(\"[^\"]*\"|[^\s#]+)(.*)", line, re.DOTALL)
        if current == section and found:
            lines[i] = f"{found.group(1)}{json.dumps(value)}{found.group(3)}"
            return "".join(lines)
    raise ConfigError(f"site.toml has no line for {section}.{key}: add [{section}] {key} = …")


def _filled(file: str, values: Mapping[str, str]) -> str:
    return Template((TEMPLATES / file).read_text(encoding="utf-8")).substitute(values)
