"""The end of a run with personal adapters: every site makes its own, and tells what it scores.

The server sends the last adapter, and gets figures: it never has a personal adapter, or a part of
one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from flwr.app import Message

from grandrounds.errors import ReplyError
from grandrounds.server.exchange import Tally
from grandrounds.server.judging import noting
from grandrounds.server.parcels import after_the_last_round
from grandrounds.server.run import Run
from grandrounds.server.unfinished import PERSONAL as FAILED
from grandrounds.wire import messages, told
from grandrounds.wire.personal import FEDERATED_LOSS, FEDERATED_NLL, PERSONAL, WEIGHT


def personalise(run: Run) -> dict[str, Any]:
    """Let all connected sites make their personal adapters; return the entry of summary.json.

    Sites that connected since the last round are among them.
    """
    run.roster.refresh(run.exchange)
    run.write_sites()
    cards = run.roster.cards

    def use(site: int, reply: Message) -> messages.Metrics:
        required = () if cards[site].in_custody else messages.PERSONAL_METRICS
        metrics = messages.metrics_of(reply, required)
        for name, loss in losses(metrics).items():
            if loss > told.HIGHEST_LOSS:
                raise ReplyError(f"its {name} loss is {loss:.3g} nats per token")
        return metrics

    tally = run.exchange.ask(
        "personal", after_the_last_round(run, PERSONAL), use, noting(run, FAILED)
    )
    run.state.note_loads(tally)
    return entry(run, tally)


def losses(metrics: messages.Metrics) -> dict[str, float]:
    """Return a site's personal and federated loss in nats per answer token, as far as it tells."""
    if tokens := metrics.get("tokens"):
        found = {"personal": metrics.get("nll-sum"), "federated": metrics.get(FEDERATED_NLL)}
        return {name: total / tokens for name, total in found.items() if total is not None}
    found = {
        "personal": metrics.get(told.HELD_OUT_LOSS),
        "federated": metrics.get(FEDERATED_LOSS),
    }
    return {name: float(loss) for name, loss in found.items() if loss is not None}


def entry(run: Run, tally: Tally) -> dict[str, Any]:
    """Return `personal` of summary.json: by site, the mean over sites, and the worst site.

    Every site counts the same in the means: a personal adapter is judged at its own site.
    """
    sites: dict[str, dict[str, float | int]] = {}
    for site, metrics in sorted(tally.good.items()):
        shown = {name: metrics[name] for name in (WEIGHT, "steps") if name in metrics}
        if "num-examples" in metrics:
            shown["held-out-examples"] = int(metrics["num-examples"])
        sites[str(site)] = {**shown, **losses(metrics)}
    return {
        "name": run.config.personalisation.name,
        "sites": sites,
        "failed": {str(p): why for p, why in sorted(tally.failed.items())},
        **summarised(sites),
    }


def summarised(sites: Mapping[str, Mapping[str, float | int]]) -> dict[str, Any]:
    """Return mean, spread and worst site of both losses; empty if no site tells both."""
    both = {p: s for p, s in sites.items() if {"personal", "federated"} <= s.keys()}
    if not both:
        return {}
    worst = max(both, key=lambda p: both[p]["personal"])
    of = {name: [float(s[name]) for s in both.values()] for name in ("federated", "personal")}
    return {
        "mean": {name: statistics.fmean(found) for name, found in of.items()},
        "spread": {name: statistics.pstdev(found) for name, found in of.items()},
        "worst": {"site": int(worst), **{name: both[worst][name] for name in of}},
        "better": sum(float(s["personal"]) < float(s["federated"]) for s in both.values()),
        "worse": sum(float(s["personal"]) > float(s["federated"]) for s in both.values()),
    }
