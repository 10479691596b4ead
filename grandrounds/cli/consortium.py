"""`grandrounds consortium`: setting up the server and admitting sites."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from grandrounds import storage
from grandrounds.cli import consortium_demo, consortium_status
from grandrounds.cli.options import Assignments
from grandrounds.cli.screen import say
from grandrounds.config import recipes
from grandrounds.config.digest import recipe_sha256
from grandrounds.config.packaged import RECIPE_ENDING
from grandrounds.config.words import command
from grandrounds.errors import ConfigError, EngineError
from grandrounds.server import admitted
from grandrounds.study.chosen import chosen_recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Set up the server of a consortium and admit sites.",
)

Folder = Annotated[Path, typer.Option("--dir", help="Folder of the consortium.")]


@app.command()
def init(
    name: Annotated[str, typer.Option(help="Name of the consortium.")],
    host: Annotated[
        str, typer.Option(help="Host name or IP address at which sites reach the server.")
    ],
    port: Annotated[
        int,
        typer.Option(
            help="Port that sites connect to; the SuperLink listens on the next one.", min=1
        ),
    ] = 8000,
    directory: Folder = Path("consortium"),
) -> None:
    """Create authorities, server certificate, systemd unit, gate (nginx) and Flower connection."""
    from grandrounds.engines.deployment import keys, set_up
    from grandrounds.engines.deployment.superlink import flower_home

    folder = set_up.init_consortium(directory, name, host, port)
    authority = keys.read_public_text((folder / "authority.pub").read_text())
    say(
        f"consortium {name!r} in {folder}; keep ca.key and authority.key secret",
        f"authority for sites: {keys.fingerprint(authority)} ({folder / 'authority.pub'})",
        f"SuperLink: {command(*set_up.superlink_command(folder, port))}",
        f"gate for sites, port {port}: {folder / 'gate.conf'} (nginx)",
        f"unit: {folder / 'superlink.service'}",
        f"connection, to add to {flower_home() / 'config.toml'}:",
        *(folder / "flower-config.toml").read_text().splitlines(),
        "next: grandrounds consortium admit REQUEST --partition-id 0 --num-partitions N",
    )


@app.command()
def renew(directory: Folder = Path("consortium")) -> None:
    """Renew the server's certificate with ca.key; sites are not affected."""
    from grandrounds.engines.deployment import set_up

    directory = storage.expanded(directory).absolute()
    days = set_up.renew(directory)
    say(
        f"{directory / 'server.crt'} is valid for {days:.0f} days",
        "now restart the SuperLink and reload nginx",
    )


@app.command()
def tidy(
    connection: Annotated[str, typer.Option(help="Connection to the consortium's SuperLink.")],
    directory: Folder = Path("consortium"),
) -> None:
    """Remove what finished runs have left in the SuperLink's database; run does so at its end."""
    from grandrounds.engines.deployment import tidy as tidying
    from grandrounds.engines.deployment.superlink import linked

    with linked(connection) as link:
        done = tidying.tidy(storage.expanded(directory).absolute(), link)
    say(f"superlink.db: {done.before_bytes:,} → {done.after_bytes:,} bytes")


@app.command()
def admit(
    request: Annotated[Path, typer.Argument(help="A site's request.json.")],
    partition_id: Annotated[int, typer.Option(help="Partition id of the site, from 0.")],
    num_partitions: Annotated[int, typer.Option(help="Planned number of sites.")],
    connection: Annotated[
        str | None,
        typer.Option(help="Also register the key with the SuperLink of this connection."),
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="Node key fingerprint, as confirmed by the site; prompted for if omitted."
        ),
    ] = None,
    valid_days: Annotated[
        int, typer.Option(help="Days within which the site can join with it.", min=1)
    ] = 30,
    examples: Annotated[
        int,
        typer.Option(
            help="Training examples of the site, which its weight does not exceed; 0: as many as "
            "it gives at its first roll call.",
            min=0,
        ),
    ] = 0,
    directory: Folder = Path("consortium"),
) -> None:
    """Check a site's request, sign its admission and register its key."""
    from grandrounds.engines.deployment import admissions

    directory = storage.expanded(directory).absolute()
    check_fingerprint(request, fingerprint)
    file = admissions.admit(directory, request, partition_id, num_partitions, valid_days, examples)
    say(
        f"site {file.stem!r} is site {partition_id} of {num_partitions}",
        f"admission for the site, valid for {valid_days} days: {file}",
    )
    if connection:
        register_admitted(file, connection)
    if file in (nodes := admitted.nodes(directory)):
        say(f"registered as node {nodes[file]}; no other node can be site {partition_id}")
    else:
        say("its key is not registered yet: repeat the command with --connection NAME")
    if left := admissions.replaced_nodes(file):
        say(f"still registered under a replaced key: node {', '.join(map(str, left))}")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Name of the site.")],
    connection: Annotated[
        str | None,
        typer.Option(help="Also unregister its key from the SuperLink of this connection."),
    ] = None,
    directory: Folder = Path("consortium"),
) -> None:
    """Revoke a site's key: runs refuse it from now on, also one in progress."""
    from grandrounds.engines.deployment import admissions
    from grandrounds.engines.deployment.superlink import entry_of, unregister

    directory = storage.expanded(directory).absolute()
    if connection:
        entry_of(connection)  # fails now if there is no such connection
    moved = admissions.revoke(directory, name)
    say(
        f"{name!r} is revoked: {directory / admitted.REVOKED}; send the list to the sites",
        f"its admission is now {moved}",
    )
    file = admitted.node_file(moved)
    if not file.is_file():
        return
    node = file.read_text().strip()
    if connection:
        unregister(int(node), connection)
        say(f"node {node} is unregistered")
    else:
        unregister_it = command("flwr", "supernode", "unregister", node)
        say(f"node {node} is still registered: {unregister_it} CONNECTION")


@app.command()
def roster(directory: Folder = Path("consortium")) -> None:
    """Sign the roster of the admitted sites' agent keys, for `grandrounds site accept-roster`."""
    from grandrounds.engines.deployment import keys, rosters
    from grandrounds.wire.masks.roster import FILE

    directory = storage.expanded(directory).absolute()
    found = rosters.write_roster(directory)
    say(
        f"roster {found.serial} of {found.consortium!r}: {rosters.digest_text(found)}",
        *(
            f"site {number} {one.name!r}, agent key {keys.fingerprint(one.key)}"
            for number, one in sorted(found.members.items())
        ),
        f"send {directory / FILE} to every site, which accepts it with grandrounds site "
        "accept-roster and compares the digest with the others",
    )


@app.command()
def sign_recipe(
    recipe: Annotated[
        Path, typer.Argument(help="The recipe: a .toml file or a name in `recipes list`.")
    ],
    assignments: Assignments = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; default: `RECIPE.signed.json` beside the recipe, for one of the "
            "package in the current folder."
        ),
    ] = None,
    directory: Folder = Path("consortium"),
) -> None:
    """Sign a recipe with the authority's key, for `grandrounds site approve`."""
    from grandrounds.engines.deployment import recipes as between

    file = chosen_recipe(recipe, None)
    assert file is not None
    config = between.deployed(recipes.load_recipe(file), recipes.from_options(None, assignments))
    target = out or recipe.with_name(recipe.name.removesuffix(RECIPE_ENDING) + between.ENDING)
    signer = between.sign_recipe(storage.expanded(directory).absolute(), config, target)
    say(
        f"recipe {recipe_sha256(config)}, signed by {signer}: {target}",
        f"sites: {command('grandrounds', 'site', 'approve', Path(target.name))} "
        "--authority authority.pub",
    )


def check_fingerprint(request: Path, fingerprint: str | None) -> None:
    """Compare a request's key with the fingerprint that the site told, before signing anything.

    Raises
    ------
    ConfigError
        If they differ, or there is no terminal to ask on.
    """
    from grandrounds.engines.deployment import admissions, keys

    asked = admissions.read_request(request)
    name, found = asked.name, keys.fingerprint(asked.key)
    replaces = f", in the place of {asked.replaced}" if asked.replaced else ""
    told = f"{request} of {name!r} has node key {found}{replaces}"
    if asked.agent_key:
        agent = keys.fingerprint(keys.read_public_text(asked.agent_key))
        told += f" and agent key {agent}"
    if fingerprint is None:
        if not sys.stdin.isatty():
            raise ConfigError(f"{told}: compare it with what the site tells you (--fingerprint).")
        say(told)
        if not typer.confirm("Does the site tell you the same fingerprint?"):
            raise ConfigError(f"{name!r} is not admitted. Ask the site for its request again.")
    elif fingerprint.removeprefix("SHA256:") != found.removeprefix("SHA256:"):
        raise ConfigError(
            f"{told}, not {fingerprint}: the request was replaced in transit, or the fingerprint "
            "was misread. Nothing was signed."
        )


def register_admitted(admission: Path, connection: str) -> None:
    """Register an admitted site's key and record its node id.

    Raises
    ------
    EngineError
        If the SuperLink rejects the key, or already knows it under a node id that is not recorded.
    """
    from grandrounds.engines.deployment import admissions
    from grandrounds.engines.deployment.superlink import register, unregister

    file = admissions.replaced_node_file(admission)
    for replaced in admissions.replaced_nodes(admission):
        try:
            unregister(replaced, connection)
        except EngineError as error:
            raise EngineError(
                f"Node {replaced}, which {admission.stem!r} was before, is not unregistered: "
                f"{error} If it is gone already, remove {file}."
            ) from error
    file.unlink(missing_ok=True)
    try:
        node = register(admission.with_suffix(".pub"), admission.stem, connection)
    except EngineError as error:
        if "already in use" not in str(error):
            raise
        if not (file := admitted.node_file(admission)).is_file():
            raise EngineError(
                f"The SuperLink already knows the key of {admission.stem!r}, but the node id is "
                f"not recorded: write it ({command('flwr', 'supernode', 'list', connection)}) to "
                f"{file}."
            ) from error
    else:
        admissions.note_node(admission, node)


app.command()(consortium_status.status)
app.command()(consortium_demo.demo)
