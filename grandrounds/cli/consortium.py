"""`grandrounds consortium`: what runs beside the SuperLink."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from grandrounds.cli.site import say
from grandrounds.errors import ConfigError, EngineError

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="The server of a consortium."
)

Folder = Annotated[Path, typer.Option("--dir", help="The consortium's folder.")]


@app.command()
def init(
    name: Annotated[str, typer.Option(help="What the consortium is called.")],
    host: Annotated[str, typer.Option(help="Name or address by which sites reach the server.")],
    port: Annotated[
        int, typer.Option(help="Port for the sites; the SuperLink takes the next.", min=1)
    ] = 8000,
    directory: Folder = Path("consortium"),
) -> None:
    """Make authorities, the server's certificate, units, and a connection for Flower."""
    from grandrounds.engines.deployment import keys, set_up
    from grandrounds.engines.deployment.superlink import flower_home

    folder = set_up.init_consortium(directory, name, host, port)
    authority = keys.read_public_text((folder / "authority.pub").read_text())
    say(
        f"consortium {name!r} in {folder}; ca.key and authority.key are its secrets",
        f"authority for sites: {keys.fingerprint(authority)} ({folder / 'authority.pub'})",
        f"SuperLink: {shlex.join(set_up.superlink_command(folder, port))}",
        f"gate for sites, port {port}: {folder / 'gate.conf'} (nginx)",
        f"unit: {folder / 'superlink.service'}",
        f"connection, to be added to {flower_home() / 'config.toml'}:",
        *(folder / "flower-config.toml").read_text().splitlines(),
        "next: grandrounds consortium admit REQUEST --partition-id 0 --num-partitions N",
    )


@app.command()
def renew(directory: Folder = Path("consortium")) -> None:
    """Renew the server's certificate with ca.key; the sites need do nothing."""
    from grandrounds.engines.deployment import set_up

    directory = directory.expanduser().absolute()
    days = set_up.renew(directory)
    say(
        f"{directory / 'server.crt'} is valid for {days:.0f} days",
        "now restart the SuperLink and reload nginx",
    )


@app.command()
def admit(
    request: Annotated[Path, typer.Argument(help="request.json of a site.")],
    partition_id: Annotated[int, typer.Option(help="The site's number, from 0.")],
    num_partitions: Annotated[int, typer.Option(help="How many sites there will be.")],
    connection: Annotated[
        str | None,
        typer.Option(help="Register the key with the SuperLink of this connection at once."),
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(help="Of the node key, as the site reads it to you; asked for if not given."),
    ] = None,
    directory: Folder = Path("consortium"),
) -> None:
    """Check a site's request, sign its admission, and register its key."""
    from grandrounds.engines.deployment import admissions
    from grandrounds.server import admitted

    directory = directory.expanduser().absolute()
    check_fingerprint(request, fingerprint)
    file = admissions.admit(directory, request, partition_id, num_partitions)
    say(
        f"site {file.stem!r} is site {partition_id} of {num_partitions}",
        f"admission for the site: {file}",
    )
    if connection:
        register_admitted(file, connection)
    if file in (nodes := admitted.nodes(directory)):
        say(f"registered as node {nodes[file]}; no other node can be site {partition_id}")
    else:
        say("its key is not registered yet: the same command with --connection NAME does that")


def check_fingerprint(request: Path, fingerprint: str | None) -> None:
    """Compare a request's key with what the site reads to whoever admits it, before it is signed.

    Raises
    ------
    ConfigError
        If it is another, or nobody can be asked.
    """
    from grandrounds.engines.deployment import admissions, keys

    name, key = admissions.read_request(request)
    found = keys.fingerprint(key)
    told = f"{request} of {name!r} has the node key {found}"
    if fingerprint is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"{told}: compare it with what the site reads to you (--fingerprint)."
            )
        say(told)
        if not typer.confirm("Does the site read the same to you?"):
            raise ConfigError(f"{name!r} is not admitted. Ask the site for its request once more.")
    elif fingerprint.removeprefix("SHA256:") != found.removeprefix("SHA256:"):
        raise ConfigError(
            f"{told}, not {fingerprint}: it was exchanged on its way, or was read wrongly. Nothing "
            "was signed."
        )


def register_admitted(admission: Path, connection: str) -> None:
    """Register an admitted site's key, and write down as which node.

    Raises
    ------
    EngineError
        If the SuperLink does not take it; it may know it already only if the node is written down.
    """
    from grandrounds.engines.deployment import admissions
    from grandrounds.engines.deployment.superlink import register
    from grandrounds.server import admitted

    try:
        node = register(admission.with_suffix(".pub"), admission.stem, connection)
    except EngineError as error:
        if "already in use" not in str(error):
            raise
        if not (file := admitted.node_file(admission)).is_file():
            raise EngineError(
                f"The SuperLink knows the key of {admission.stem!r} already, and as which node is "
                f"not written down: write its node-id (flwr supernode list {connection}) into "
                f"{file}."
            ) from error
    else:
        admissions.note_node(admission, node)
