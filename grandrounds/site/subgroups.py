"""The held-out loss of a site by subgroup, of those that it may tell."""

from __future__ import annotations

import dataclasses

from flwr.app import RecordDict

from grandrounds.model.resident import Resident
from grandrounds.site import visit as visits
from grandrounds.site.visit import Visit
from grandrounds.wire.messages import CONFIG, METRICS, content
from grandrounds.wire.subgroups import EXAMPLES, LOSSES, NAMES, NLL_SUMS, TOKENS


def evaluate(visit: Visit, resident: Resident) -> RecordDict:
    """Return the reply with the loss of the adapter in the model by subgroup.

    Each subgroup is evaluated by itself, so that all together take as long as the held-out examples
    once for each column.
    """
    site = visit.site
    found = {
        name: visits.evaluate(
            resident,
            dataclasses.replace(site, held_out=[site.held_out[i] for i in places]),
            visit.config,
        )
        for name, places in site.subgroups.items()
    }
    reply = content(config={}, metrics=visits.process_facts())
    if found:
        every = list(found.values())
        reply.config_records[CONFIG][NAMES] = list(found)
        reply.metric_records[METRICS].update(
            {
                NLL_SUMS: [float(one["nll-sum"]) for one in every],
                TOKENS: [int(one["tokens"]) for one in every],
                LOSSES: [float(one["nll-sum"]) / one["tokens"] for one in every],
                EXAMPLES: [int(one["num-examples"]) for one in every],
            }
        )
    return reply
