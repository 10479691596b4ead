"""`grandrounds consortium demo`: a whole consortium on one machine, and what each party sees of it.

Everything that is printed was asked of the running processes or read from their files.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from grandrounds.config.digest import recipe_sha256
from grandrounds.config.keys import Config
from grandrounds.config.values import Scalar
from grandrounds.config.words import command, counted, percent
from grandrounds.data.formulary import FORMULARY
from grandrounds.data.sources import load_rows
from grandrounds.engines.deployment import consortium_status, keys, local, set_up, site_status
from grandrounds.engines.deployment import recipes as between
from grandrounds.engines.deployment.server_checks import activation
from grandrounds.engines.deployment.superlink import deploy
from grandrounds.engines.folders import Folder
from grandrounds.errors import ConfigError, EngineError, PolicyError
from grandrounds.server.introductions import questions
from grandrounds.server.listeners import Facts, Listener
from grandrounds.server.listeners.plain import round_line
from grandrounds.site.custody import agent_client, audit
from grandrounds.site.custody.approvals import Approvals
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.study.report.written import write_report
from grandrounds.wire import messages
from grandrounds.wire.names import one_line

LEAST_ROWS = 120
"""Rows of a site: the default policy refuses runs below 100 training examples."""

INDENT = " " * 16
MOST_OF_A_LINE = 160
WIDTHS = (60, 110)
"""Columns between which lines are wrapped."""

SETTINGS: Mapping[str, Scalar] = {
    "model.name": FORMULARY,
    "static.dataset.name": FORMULARY,
    "data.held-out-fraction": 0.05,
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 1.0,
    "train.training-arguments.max-steps": 20,
    "train.num-threads": 1,
    "strategy.connect-timeout-seconds": 300,
}
"""The recipe, beside the packaged defaults."""

ORDERS: Mapping[str, tuple[str, Mapping[str, Scalar]]] = {
    "recipe": (
        "a recipe that it has not approved, with another learning rate",
        {"train.learning-rate-max": 0.002},
    ),
    "rank": ("an adapter of rank 64", {"model.lora.peft-lora-r": 64}),
    "base": ("a base that is not on its list", {"model.name": "example/another-base"}),
}
"""What a site is asked beyond its policy: in words, and as changes of the recipe."""


class Teller:
    """Prints plain lines, wrapped at the terminal's width, with the seconds since the start."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say, self._started = say, time.monotonic()
        columns = shutil.get_terminal_size((WIDTHS[1], 24)).columns
        self._width = min(max(columns, WIDTHS[0]), WIDTHS[1])

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def head(self, text: str) -> None:
        """Print the heading of a step."""
        self._say("", f"{text} [{self.seconds:.0f} s]")

    def line(self, text: str, name: str = "") -> None:
        """Print a line below a heading, beside a name or below the line that has one."""
        self.labelled(f"  {name:<14}{text}" if name else f"{INDENT}{text}")

    def labelled(self, text: str) -> None:
        """Print a line that begins with its own label."""
        lines = textwrap.wrap(
            text,
            self._width,
            subsequent_indent=INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        self._say(*lines)


class Progress(Listener):
    """Prints the rounds of the run, and notes when the first trained adapter was there."""

    def __init__(self, rounds: int, teller: Teller) -> None:
        self._rounds, self._teller = rounds, teller
        self.first_seconds = 0.0
        """From the start to the end of round 1."""

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        """Tell who introduced itself."""
        self._teller.line(", ".join(str(site["name"]) for site in sites), "roll call")

    def on_round(self, record: Facts) -> None:
        """Tell a finished round."""
        if record["round"] == 1:
            self.first_seconds = self._teller.seconds
        self._teller.labelled(f"  {round_line(record, self._rounds)}")


def check_rows(sites: int) -> None:
    """Raise `ConfigError` if the formulary has too few rows for so many sites."""
    rows = len(load_rows(FORMULARY, question_column="input", answer_column="output"))
    if rows < LEAST_ROWS * sites:
        raise ConfigError(
            f"--sites {sites} is not allowed: the packaged formulary has {rows:,} rows, and a site "
            f"needs {LEAST_ROWS}, so use 2 to {rows // LEAST_ROWS}."
        )


def demonstrate(
    folder: Folder, home: Path, sites: int, rounds: int, say: Callable[..., None]
) -> None:
    """Set up a consortium, show what it refuses, train, and show what each party has seen.

    Every process has ended when this returns, however it ends.

    Parameters
    ----------
    folder : Folder
        Of this command.
    home : Path
        Empty folder for server, sites and run.

    Raises
    ------
    EngineError
        If a process does not start, the run does not complete, or a site answers what its policy
        forbids.
    """
    names = [f"hospital-{number}" for number in range(sites)]
    local.check_place(home, names)
    teller = Teller(say)
    values = {"data.num-partitions": sites, "num-server-rounds": rounds}
    config = between.deployed(SETTINGS, values, {"run-directory": str(home / "run")})
    with local.processes(folder, home) as running:
        teller.head("1. The server: certificates, keys, SuperLink")
        consortium, superlink = local.start_superlink(running, home)
        _tell_server(teller, consortium, superlink.port + 1)
        teller.head(f"2. {counted(sites, 'hospital')}: keys, rows, policy, admission")
        joined = [
            _new_site(teller, consortium, home / name, (number, sites), config)
            for number, name in enumerate(names)
        ]
        _approve(teller, consortium, home, config, joined)
        teller.head("3. Agents and SuperNodes")
        agents = local.start_agents(running, joined)
        local.connect(running, joined, consortium)
        local.wait_for_agents(running, agents)
        for site in joined:
            teller.line(f"agent at {set_up.place_of(site)}, SuperNode connected", site.name)
        teller.head("4. What is refused")
        _tell_refusals(teller, joined[0], config, home)
        teller.head(f"5. The run: {counted(rounds, 'round')} on the embedded base")
        progress = Progress(rounds, teller)
        deploy(config, progress, local.NAME)
        report = write_report([home / "run"]).file
        teller.head("6. What each party has seen")
        _tell_parties(teller, home / "run", joined)
        teller.head("7. Status, while all is running")
        for text in (
            *site_status.words(site_status.look(joined[0])),
            *consortium_status.words(consortium_status.look(consortium, None)),
        ):
            teller.labelled(f"  {text}")
        teller.head("8. The result")
        _tell_result(teller, home / "run", report, progress)


# --- Setting up -----------------------------------------------------------------------------------


def _tell_server(teller: Teller, consortium: Path, port: int) -> None:
    authority = keys.read_public_text((consortium / "authority.pub").read_text(encoding="utf-8"))
    teller.line(f"{keys.fingerprint(authority)}, signs admissions and recipes", "authority")
    teller.line(
        f"TLS on {local.HOST}:{port}, a free port. On loopback the gate (nginx) of a real server "
        "is left out",
        "SuperLink",
    )


def _new_site(
    teller: Teller,
    consortium: Path,
    folder: Path,
    number: tuple[int, int],
    config: Config,
) -> SiteFile:
    """Set up a site with rows of the formulary and the default policy, and join it."""
    name = folder.name
    set_up.init_site(folder, name)
    rows = local.write_partition(folder / "cards.jsonl", config, number[0])
    (folder / "cards.jsonl").chmod(0o600)
    own = {
        "data.source": "cards.jsonl",
        "policy.require-approval": True,
        "tell.policy-hash": True,
    }
    local.fill_in(folder / "site.toml", own, {FORMULARY: ""})
    site = local.joined_site(consortium, folder, number)
    key = keys.read_private_key(site.place(site.node.private_key)).public_key()
    teller.line(f"{rows:,} rows; node key {keys.fingerprint(key)}", name)
    return site


def _approve(
    teller: Teller, consortium: Path, home: Path, config: Config, sites: Sequence[SiteFile]
) -> None:
    """Sign the run's recipe, and approve it at every site."""
    file = home / "recipe.signed.json"
    between.sign_recipe(consortium, config, file)
    for site in sites:
        recipe, signer = between.chosen(site, str(file), {}, site.path.parent / "authority.pub")
        Approvals(site.place(site.agent.state)).approve(recipe, signer)
    teller.line(
        f"{recipe_sha256(config)}, signed by the authority, approved at every hospital", "recipe"
    )


# --- Refusals -------------------------------------------------------------------------------------


def _tell_refusals(teller: Teller, site: SiteFile, config: Config, home: Path) -> None:
    """Ask a site's agent, and the server, what they must refuse."""
    for what, changes in ORDERS.values():
        teller.line(f"asked for {what}:", site.name)
        teller.line(refusal(site, {**config.flat(), **changes}), "  refuses")
    stranger = home / "stranger.key"
    keys.write_private_key(stranger, keys.new_key(), openssh=True)
    posing = dataclasses.replace(
        site, node=dataclasses.replace(site.node, private_key=str(stranger))
    )
    status = activation(posing, site.place(site.node.root_certificates))
    stranger.unlink()
    if status == 200:
        raise EngineError("The server has accepted a node key that nobody admitted.")
    teller.line("asked to connect with a node key that nobody admitted:", "the server")
    teller.line(f"status {status}", "  refuses")


def refusal(site: SiteFile, flat: Mapping[str, Scalar]) -> str:
    """Return why a site's agent refuses a roll call of a run with this configuration.

    Raises
    ------
    EngineError
        If it answers, or cannot be asked.
    GrandRoundsError
        If it fails for another reason.
    """
    # Flower's runtimes set these before an app starts; Message() reads them.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    node: dict[str, Any] = {"agent": set_up.place_of(site)}
    context = Context(1, 1, node, RecordDict(), dict(flat))
    message = questions([1], secrets.token_hex(8))[1]
    reply = agent_client.forward(message, context)
    try:
        messages.raise_failure(reply)
    except PolicyError as error:
        return str(error)
    raise EngineError(f"{site.name} has answered what its policy forbids.")


# --- What each party has seen ---------------------------------------------------------------------


def _tell_parties(teller: Teller, run: Path, sites: Sequence[SiteFile]) -> None:
    plan, summary, told = (_json(run / f"{name}.json") for name in ("plan", "summary", "sites"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = lines[-1]
    examples = ", ".join(f"{one['name']} about {one['train-examples']}" for one in told)
    teller.line(
        f"changes of the adapter: {plan['adapter-parameters']:,} numbers of each hospital a round",
        "the server",
    )
    teller.line(f"counts, rounded: examples of {examples}")
    losses = [f"{loss:.2f}" for loss in last.get("held-out-losses", {}).values()]
    held_out = ", ".join(losses) or "not told (tell.min-held-out-examples)"
    teller.line(
        f"losses, rounded: training {last['train-loss']:.2f}, held-out {held_out}; no row, no "
        "count of tokens, no seconds of a visit"
    )
    site = sites[0]
    row = json.loads(site.place(site.data.source).open(encoding="utf-8").readline())
    teller.line(f"its own rows, such as: {row['input']} {row['output']}", site.name)
    state = site.place(site.agent.state)
    entries = audit.read(state)
    teller.line(f"its audit log, {counted(len(entries), 'line')}:")
    for entry in entries:
        teller.line(f"- {one_line(site_status.visit_text(entry), MOST_OF_A_LINE)}")
    verdict = audit.verified(state)
    whole = "broken" if verdict.broken else "whole: every line continues the one before it"
    teller.line(f"the log is {whole}")
    kinds = plan["totals"].values()
    teller.line(
        f"{summary['communication_mib']:.2f} MiB of tensors in "
        f"{sum(kind['messages'] for kind in kinds)} messages, planned {plan['total-mib']:.2f} MiB; "
        "TLS around them",
        "the network",
    )


def _tell_result(teller: Teller, run: Path, report: Path, progress: Progress) -> None:
    summary = _json(run / "summary.json")
    if exam := summary.get("formulary"):
        base, tuned = (exam["private"][who] for who in ("base", "tuned"))
        teller.line(
            f"{percent(base['correct'] / base['n'])} → {percent(tuned['correct'] / tuned['n'])} of "
            f"{base['n']} questions about the hospitals' facts",
            "learned",
        )
    teller.line(str(run / str(summary["adapter"])), "adapter")
    teller.line(str(report), "report")
    teller.line(
        f"first trained adapter after {progress.first_seconds:.0f} s, all of it after "
        f"{teller.seconds:.0f} s",
        "time",
    )


def next_commands(home: Path) -> list[str]:
    """Return what can be looked at in a kept folder."""
    site = home / "hospital-0"
    return [
        command("grandrounds", "site", "log", "--config", site / "site.toml"),
        command("grandrounds", "site", "log", "--verify", "--config", site / "site.toml"),
        command("grandrounds", "site", "pending", "--config", site / "site.toml"),
        command("grandrounds", "site", "status", site),
        command("grandrounds", "report", home / "run", "--open"),
    ]


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
