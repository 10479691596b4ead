"""SIGKILL at the agents of sites, for `kills.py`; no script by itself.

A run in a process of its own asks two agents, each a process of its own. One of them, whichever
the coin says, is killed after a random time and started again, until there were enough kills. After
each, its audit log must verify and be no shorter; at the end every update that the server used must
stand there as an answer, and the run must equal one that nobody killed. An agent that ends three
times on one message is given up (`site/custody/agent_client.py`), so none is killed more than
twice in a round.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grandrounds import server_app
from grandrounds.config.recipes import resolve
from grandrounds.engines.deployment import node_app
from grandrounds.engines.deployment.agent import Agent
from grandrounds.engines.deployment.set_up import place_of
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners import Listener
from grandrounds.site.custody import audit, order
from grandrounds.site.custody.site_file import SiteFile, read_site_file

LONGEST_SECONDS = 3.0
KILLS_OF_A_ROUND = 2
TWO_SITES = {"data.num-partitions": 2, "strategy.fraction-train": 1.0}
"""So that an agent that is killed is likely to be at work."""


def started(work: Callable[[], None]) -> int:
    """Do work in a process of its own; return its id."""
    process = os.fork()
    if process:
        return process
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def serve(site: SiteFile) -> None:
    """Serve a site whose examples come in the order of the run, as without an agent."""
    order.choose = lambda *_: None  # type: ignore[assignment]
    Agent(site, lambda _: None).serve()


def play(values: Mapping[str, Any], sites: list[SiteFile], run: Path) -> None:
    """Play a run whose sites ask their agents."""
    config = resolve({**values, "run-directory": str(run)})
    grid = InProcessGrid(node_app.app, config.flat(), len(sites))
    for context, site in zip(grid._contexts.values(), sites, strict=True):
        context.node_config |= {"agent": place_of(site), "agent-wait-seconds": 120.0}
    server_app.federate(grid, config, Listener())


def make_sites(values: Mapping[str, Any], folder: Path) -> list[SiteFile]:
    """Make the sites of a run, each with its rows, in a process that may load libraries."""
    from tests.own_sites import sites_of

    def make() -> None:
        sites_of(dict(values), folder)

    os.waitpid(started(make), 0)
    count = values["data.num-partitions"]
    return [read_site_file(folder / f"site{i}" / "site.toml") for i in range(count)]


def lines_of(site: SiteFile) -> list[dict[str, Any]]:
    """Return the lines of a site's audit log; stop if it does not verify."""
    folder = site.place(site.agent.state)
    if broken := audit.verified(folder).broken:
        sys.exit(f"the audit log of {site.name} does not verify: {broken}")
    return audit.read(folder)


def one_run(
    values: Mapping[str, Any], folder: Path, kills: int, moments: random.Random
) -> tuple[Path, int, int]:
    """Play a run while agents are killed; return it, the kills, and the lost audit lines."""
    sites, run = make_sites(values, folder), folder / "run"
    agents = [started(lambda site=site: serve(site)) for site in sites]  # type: ignore[misc]
    server = started(lambda: play(values, sites, run))
    done, lost, spared = 0, 0, Counter[tuple[int, int]]()
    try:
        while not os.waitpid(server, os.WNOHANG)[0]:
            if done >= kills:
                time.sleep(0.05)
                continue
            time.sleep(moments.uniform(0, LONGEST_SECONDS))
            place, now = moments.randrange(len(sites)), rounds_of(run)
            if spared[place, now] == KILLS_OF_A_ROUND:
                continue
            spared[place, now] += 1
            before = len(lines_of(sites[place]))
            os.kill(agents[place], signal.SIGKILL)
            os.waitpid(agents[place], 0)
            lost += len(lines_of(sites[place])) < before
            agents[place] = started(lambda site=sites[place]: serve(site))  # type: ignore[misc]
            done += 1
            print(f"kill {done} at agents: site {place}, round {now}", flush=True)
    finally:
        for agent in agents:
            os.kill(agent, signal.SIGKILL)
            os.waitpid(agent, 0)
    return run, done, lost + unanswered(run, sites)


def rounds_of(run: Path) -> int:
    """Return the last finished round of a run, -1 for none."""
    records = RunDirectory(run).read_metrics() if run.is_dir() else []
    return records[-1]["round"] if records else -1


def unanswered(run: Path, sites: list[SiteFile]) -> int:
    """Return how many updates that the server used stand in no site's audit log as answered."""
    logged = {
        (place, line.get("round"))
        for place, site in enumerate(sites)
        for line in lines_of(site)
        if line["asked"] == "train" and str(line["outcome"]).startswith("answered")
    }
    used = {(p, r["round"]) for r in RunDirectory(run).read_metrics() for p in r.get("good", [])}
    return len(used - logged)


def killed(
    values: Mapping[str, Any],
    count: int,
    seed: int,
    folder: Path,
    bits: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """Kill agents until there were `count` kills and the last run is complete."""
    moments, values = random.Random(seed), {**values, **TWO_SITES}
    whole, _, lost = one_run(values, folder / "whole", 0, moments)
    expected, kills, runs, unequal = bits(whole), 0, 0, 0
    while kills < count:
        run, more, missing = one_run(values, folder / f"run-{runs}", count - kills, moments)
        kills, lost, runs = kills + more, lost + missing, runs + 1
        unequal += bits(run) != expected
    return {"kills": kills, "runs": runs, "audit-lines-lost": lost, "runs-with-other-bits": unequal}
