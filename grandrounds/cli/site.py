"""`grandrounds site`: one site of a consortium, on its own machine."""

from __future__ import annotations

import signal
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grandrounds import storage
from grandrounds.cli import site_export, site_log, site_status
from grandrounds.cli.options import Assignments, Model, Plain
from grandrounds.cli.screen import Screen, say
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.words import command
from grandrounds.engines.folders import ENDING
from grandrounds.errors import ConfigError, GrandRoundsError
from grandrounds.quiet import quiet_libraries
from grandrounds.site.custody.site_file import SiteFile, read_site_file

if TYPE_CHECKING:
    from grandrounds.site.custody.state import SiteState

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Set up and run a site of a consortium."
)

SiteToml = Annotated[
    Path, typer.Option("--config", "-c", help="The site's site.toml.", metavar="site.toml")
]

JOIN = "grandrounds site join ADMISSION --authority authority.pub"


@app.command()
def init(
    name: Annotated[str, typer.Option(help="Name of the site.")],
    directory: Annotated[Path, typer.Option("--dir", help="New folder for the site.")] = Path(
        "site"
    ),
    tls_port: Annotated[
        int,
        typer.Option(
            help="Loopback port on which the agent listens with TLS; 0: a Unix socket.", min=0
        ),
    ] = 0,
) -> None:
    """Create a site's node and agent keys, its request to join, and a site.toml to fill in."""
    from grandrounds.engines.deployment import keys, set_up

    folder = set_up.init_site(directory, name, tls_port=tls_port)
    key, agent = (
        keys.read_private_key(folder / file).public_key() for file in ("node.key", set_up.IDENTITY)
    )
    say(
        f"site {name!r} in {folder}",
        f"node key: {keys.fingerprint(key)}",
        f"agent key: {keys.fingerprint(agent)}",
        f"1. send {folder / 'request.json'} to the consortium, and tell it the fingerprints over "
        "another channel",
        f"2. fill in {folder / 'site.toml'}: data, bases, policy",
        f"3. with the admission: {JOIN} {command('--config', folder / 'site.toml')}",
        f"4. {command('grandrounds', 'site', 'check', '--config', folder / 'site.toml')}",
    )


@app.command()
def join(
    admission: Annotated[Path, typer.Argument(help="Admission of this site, from the consortium.")],
    authority: Annotated[Path, typer.Option(help="The consortium's authority.pub.")],
    config: SiteToml = Path("site.toml"),
) -> None:
    """Apply an admission: server address, certificate authority and partition id."""
    from grandrounds.engines.deployment import joining, keys

    consortium, site = joining.join(read_site_file(config), admission, authority)
    trusted = keys.read_public_text(storage.read_text(authority))
    say(
        f"admitted to {consortium!r} as site {site.node.partition_id} of "
        f"{site.node.num_partitions}",
        f"signed by {keys.fingerprint(trusted)}: compare it with the consortium's own statement",
        f"server {site.node.superlink}",
        "agent:     " + command("grandrounds", "site", "serve", "--config", config),
        "SuperNode: " + start_command(site),
        f"units: {config.absolute().parent / 'agent.service'}, supernode.service",
    )


@app.command()
def rotate_key(
    config: SiteToml = Path("site.toml"),
    agent_key: Annotated[
        bool,
        typer.Option(help="Replace the agent key too; every site must accept a new roster then."),
    ] = False,
) -> None:
    """Write a new node key and a request for it, signed by both keys; join puts it in place."""
    from grandrounds.engines.deployment import joining, keys

    site = read_site_file(config)
    request = joining.rotate_key(site, agent_key=agent_key)
    key = keys.read_private_key(request.with_name(joining.NEXT_KEY)).public_key()
    say(
        f"new node key: {keys.fingerprint(key)}; the present one stays in use until site join",
        f"1. send {request} to the consortium, and tell it the fingerprint over another channel",
        f"2. with the admission: {JOIN} {command('--config', config)}",
        "3. restart the SuperNode",
    )


@app.command("accept-roster")
def accept_roster(
    roster: Annotated[Path, typer.Argument(help="The consortium's roster.json.")],
    config: SiteToml = Path("site.toml"),
    digest: Annotated[
        str | None,
        typer.Option(
            help="Digest of the roster, as the other sites have it; prompted for if omitted."
        ),
    ] = None,
) -> None:
    """Accept the agent keys of a consortium's sites, signed by its authority.

    Nothing but this command changes the roster of a site, and no run goes on after a change.
    """
    from grandrounds.engines.deployment import rosters

    site = read_site_file(config)
    found = rosters.offered(site, roster)
    told = (
        f"roster {found.roster.serial} of {found.roster.consortium!r}, "
        f"{len(found.roster.members)} sites: {rosters.digest_text(found.roster)}"
    )
    say(told, *found.changes)
    check_digest(rosters.digest_text(found.roster), digest)
    rosters.accept(site, found)
    say(f"accepted: {site.place(site.secure.roster)}")


def check_digest(found: str, told: str | None) -> None:
    """Raise `ConfigError` unless the other sites have the same roster."""
    if told is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"The roster is {found}: compare it with what another site has (--digest)."
            )
        if not typer.confirm("Do the other sites have the same digest?"):
            raise ConfigError("The roster is not accepted. Ask the consortium for it again.")
    elif told.removeprefix("SHA256:") != found.removeprefix("SHA256:"):
        raise ConfigError(
            f"The roster is {found}, not {told}: sites were given different ones, or the digest "
            "was misread. Nothing was changed."
        )


def start_command(site: SiteFile) -> str:
    """Return the shell command that starts a site's SuperNode."""
    from grandrounds.engines.deployment.set_up import supernode_command

    return command(*supernode_command(site))


@app.command()
def check(
    config: SiteToml = Path("site.toml"),
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe of a planned run: checks its base, policy, lengths and prompt."),
    ] = None,
    assignments: Assignments = None,
    examples: Annotated[
        int | None,
        typer.Option(
            help="Training examples to show with their prompt, what is learned between ⟦ and ⟧. "
            "Default: two on a terminal, else none.",
            min=0,
        ),
    ] = None,
) -> None:
    """Check everything that a site needs, one finding per line; exit code 1 on an error."""
    site = read_site_file(config)
    asked = recipes.from_options(recipe, assignments)
    run = recipes.resolve(asked)
    quiet_libraries()
    from grandrounds.engines.deployment.checks import all_findings
    from grandrounds.engines.deployment.findings import Finding

    def tell(finding: Finding) -> None:
        say(f"{finding.level:<8}{finding.subject}: {finding.text}")

    is_fine = all_findings(site, run, tell, is_asked=bool(asked))
    count = (2 if sys.stdout.isatty() else 0) if examples is None else examples
    with suppress(GrandRoundsError):  # what is wrong with data or base is among the findings
        _show_examples(site, run, count)
    if not is_fine:
        raise typer.Exit(1)


def _show_examples(site: SiteFile, run: Config, count: int) -> None:
    """Print the site's first examples as they would be trained on."""
    if not count:
        return
    from grandrounds.site.custody.own_run import examples_shown

    for number, text in enumerate(examples_shown(site, run, count), 1):
        say(f"example {number}, for this screen only:", text)


@app.command()
def approve(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe (.toml), signed recipe (.json), run directory, or what `site pending` "
            "lists: the first digits of a hash, or a run's key.",
            metavar="RUN|RECIPE",
        ),
    ],
    config: SiteToml = Path("site.toml"),
    assignments: Assignments = None,
    authority: Annotated[
        Path | None,
        typer.Option(
            help="The consortium's authority.pub, for a signed recipe; default: beside site.toml."
        ),
    ] = None,
    withdraw: Annotated[bool, typer.Option(help="Withdraw the approval instead.")] = False,
) -> None:
    """Approve a recipe, so that runs of it may visit this site (`policy.require-approval`)."""
    site = read_site_file(config)
    values = recipes.from_options(None, assignments)
    quiet_libraries()
    from grandrounds.engines.deployment.recipes import chosen
    from grandrounds.site.custody.approvals import Approvals
    from grandrounds.site.custody.summary import lines_of, objection

    trusted = authority or site.path.parent / "authority.pub"
    found, signer = chosen(site, recipe, values, trusted)
    approvals = Approvals(site.place(site.agent.state))
    if withdraw:
        approvals.withdraw(found)
        say(f"recipe {found.sha256} is no longer approved")
        return
    kept = approvals.approve(found, signer)
    say(f"approved: recipe {kept.sha256}", *lines_of(kept, approvals.all()))
    if reason := objection(site, kept):
        say(f"warning: {reason}")
    if not site.policy.require_approval:
        say("note: policy.require-approval = false, so that other recipes may visit too")


@app.command()
def pending(config: SiteToml = Path("site.toml")) -> None:
    """List the recipes that wait for approval, with what each asks of the site."""
    site = read_site_file(config)
    from grandrounds.site.custody.approvals import Approvals
    from grandrounds.site.custody.summary import lines_of

    approvals = Approvals(site.place(site.agent.state))
    every = approvals.all()
    for recipe in approvals.pending():
        say(f"recipe {recipe.sha256}", *lines_of(recipe, every))
        approve = command("grandrounds", "site", "approve", recipe.sha256[:12])
        say(f"    approve: {approve} {command('--config', config)}")
    if not approvals.pending():
        say("no recipe waits for approval")


@app.command()
def serve(config: SiteToml = Path("site.toml")) -> None:
    """Run the site's agent, which holds data and base model and serves the SuperNode."""
    site = read_site_file(config)
    quiet_libraries()
    from grandrounds.engines.deployment.agent import Agent
    from grandrounds.site.custody.clock import utc_text
    from grandrounds.site.custody.faults import keep_texts_off_the_terminal
    from grandrounds.site.custody.own_run import inventory

    def tell(line: str) -> None:
        say(f"grandrounds: {utc_text()} {line}")

    keep_texts_off_the_terminal()
    agent = Agent(site, tell)
    for line in inventory(site):
        tell(line)
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: agent.stop())
    agent.serve()


@app.command("allow-run")
def allow_run(
    run: Annotated[
        str, typer.Argument(help="Key of the run, as its refusal names it; without it: any run.")
    ] = "",
    config: SiteToml = Path("site.toml"),
) -> None:
    """Allow one more run in the next 24 hours than `policy.max-runs-per-day`."""
    site = read_site_file(config)
    from grandrounds.site.custody import quota

    with opened(site) as state:
        quota.allow_run(state, run)
    say(f"{f'run {run}' if run else 'one more run'} is allowed for 24 hours")


@app.command()
def runs(config: SiteToml = Path("site.toml")) -> None:
    """List the runs that the site keeps something of: cursors, error memories, replies."""
    from grandrounds.site.custody import kept_runs

    with opened(read_site_file(config)) as state:
        for one in kept_runs.listed(state):
            say(
                f"{one.run}  first visit {one.first_seconds / 3600:.1f} h ago, last "
                f"{one.last_seconds / 3600:.1f} h ago, {one.bytes / 2**20:.1f} MiB"
            )


@app.command("forget-run")
def forget_run(
    run: Annotated[
        str, typer.Argument(help="Key of the run, as `grandrounds site runs` lists it.")
    ],
    config: SiteToml = Path("site.toml"),
) -> None:
    """Delete what the site keeps of a run; it cannot be resumed to the same bits."""
    from grandrounds.site.custody import kept_runs

    with opened(read_site_file(config)) as state:
        known = kept_runs.forget(state, run)
    say(f"run {run} is forgotten" if known else f"nothing is kept of run {run}")


def opened(site: SiteFile) -> AbstractContextManager[SiteState]:
    """Return the site's state, closed at the end of the context."""
    quiet_libraries()
    from grandrounds.site.custody import state

    return state.opened(site.place(site.agent.state))


@app.command()
def supernode(config: SiteToml = Path("site.toml")) -> None:
    """Print the command that starts the site's SuperNode."""
    say(start_command(read_site_file(config)))


@app.command("audit")
def audit_adapter(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter that the site received.", metavar="ADAPTER")
    ],
    config: SiteToml = Path("site.toml"),
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe of the run that trained it: prompt, lengths, precision."),
    ] = None,
    assignments: Assignments = None,
    model: Model = None,
    plain: Plain = False,
) -> None:
    """Attack a received adapter with the site's own examples; shown here and nowhere else.

    Tells the training examples from the held-out ones by how much likelier the adapter made their
    answers, beside what the untuned base tells. (The audit log is `grandrounds site log`.)
    """
    site = read_site_file(config)
    screen = Screen(plain)
    asked = recipes.from_options(recipe, assignments, model=model)
    quiet_libraries()
    screen.working("attacking the adapter")
    from grandrounds.study.audit.own_site import audit_site, base_of, notes, tables

    if "model.name" not in asked:
        asked["model.name"] = base_of(site, adapter)
    found = audit_site(site, adapter, recipes.resolve(asked))
    for table in tables(found):
        screen.table(table.title, table.columns, table.rows)
    screen.notes(notes(found))


app.command()(site_log.log)
app.command()(site_status.status)
app.command()(site_export.export)
