"""The end of a run that names columns of subgroups: sites tell the held-out loss of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message

from grandrounds.errors import ReplyError
from grandrounds.server.judging import noting
from grandrounds.server.parcels import after_the_last_round
from grandrounds.server.run import Run
from grandrounds.server.unfinished import SUBGROUPS as FAILED
from grandrounds.wire import messages, told
from grandrounds.wire.messages import CONFIG, MANY, METRICS, Metrics
from grandrounds.wire.subgroups import (
    EXAMPLES,
    LOSSES,
    MOST,
    NAMES,
    NLL_SUMS,
    SUBGROUPS,
    TOKENS,
    named,
)
from grandrounds.wire.told import HELD_OUT_LOSS, HIGHEST_LOSS


def tell_subgroups(run: Run) -> dict[str, Any]:
    """Let all connected sites tell losses by subgroup; return the entry of summary.json.

    Of `groups` the losses are those of all sites that tell one, in nats per answer token, weighted
    as the held-out loss is. `silent` are the sites that tell none: their policy names no such
    column, or all of their subgroups are too small.
    """
    columns = run.config.subgroup_columns
    by_site: dict[int, dict[str, Metrics]] = {}

    def use(site: int, reply: Message) -> Metrics:
        by_site[site] = subgroups_of(reply, columns)
        return messages.metrics_of(reply)

    tally = run.exchange.ask(
        "subgroups", after_the_last_round(run, SUBGROUPS), use, noting(run, FAILED)
    )
    run.state.note_loads(tally)
    telling = {site: by_site[site] for site in sorted(tally.good) if by_site.get(site)}
    names = sorted({name for groups in telling.values() for name in groups})
    return {
        "columns": list(columns),
        "groups": {
            name: {
                HELD_OUT_LOSS: told.held_out_loss(of.values()),
                "held-out-examples": sum(int(one["num-examples"]) for one in of.values()),
                "sites": list(of),
            }
            for name in names
            for of in [{site: all_of[name] for site, all_of in telling.items() if name in all_of}]
        },
        "silent": sorted(set(tally.good) - telling.keys()),
        "failed": {str(site): why for site, why in sorted(tally.failed.items())},
    }


def subgroups_of(reply: Message, columns: Sequence[str]) -> dict[str, Metrics]:
    """Return what a site tells of its subgroups, by name; empty if it tells nothing.

    Raises
    ------
    ReplyError
        If a name is of no column that was asked for, is there twice or has no figure, or a figure
        is none.
    """
    told: Mapping[str, Any] = reply.content.config_records.get(CONFIG) or {}
    metrics: Mapping[str, Any] = reply.content.metric_records.get(METRICS) or {}
    names = told.get(NAMES, [])
    if not isinstance(names, list) or len(names) > MOST or len(set(names)) < len(names):
        raise ReplyError(f"its subgroups are no list of up to {MOST} different names")
    for name in names:
        column, _, value = str(name).partition(" = ")
        if column not in columns or name != named(column, value):
            raise ReplyError(f"its subgroup {str(name)[:80]!r} is of no column that was asked for")
    lists = {
        HELD_OUT_LOSS: _numbers(metrics, LOSSES, len(names), HIGHEST_LOSS),
        "num-examples": _numbers(metrics, EXAMPLES, len(names), MANY),
        "nll-sum": _numbers(metrics, NLL_SUMS, len(names), 1e15),
        "tokens": _numbers(metrics, TOKENS, len(names), MANY),
    }
    found = {
        name: {key: values[i] for key, values in lists.items() if values}
        for i, name in enumerate(names)
    }
    if any(not {HELD_OUT_LOSS, "num-examples"} <= of.keys() for of in found.values()):
        raise ReplyError("its subgroups have no losses or no numbers of examples")
    return found


def _numbers(metrics: Mapping[str, Any], key: str, count: int, high: float) -> list[float | int]:
    """Return a list of the reply, one number for each name; empty if it tells none."""
    values = metrics.get(key, [])
    if not isinstance(values, list) or (values and len(values) != count):
        raise ReplyError(f"{key} is no list of {count} numbers")
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= high:
            raise ReplyError(f"{key} has {value!r}, not a number from 0 to {high:g}")
    return values
