"""The ClientApp: a site introduces itself, trains the received adapter, and evaluates it.

Each function answers one kind of message (see `grandrounds.wire.messages`). If a site has an agent,
the agent calls them (`at_site`).
"""

from __future__ import annotations

from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from grandrounds.model import machine
from grandrounds.quiet import quiet_libraries
from grandrounds.site import personal, personal_files, steps, subgroups
from grandrounds.site import visit as visits
from grandrounds.site.custody.dispatch import at_site
from grandrounds.site.masks import visit as masks
from grandrounds.site.visit import Visit
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.messages import MAGNITUDES, answering, content, to_arrays
from grandrounds.wire.personal import PERSONAL
from grandrounds.wire.subgroups import SUBGROUPS

quiet_libraries()  # also here: in Flower's simulation, Ray's workers import this module
app = ClientApp()


@app.query()
@answering
@at_site
def introduce(visit: Visit) -> RecordDict:
    """Introduce the site: its data, base, prompt, versions and device."""
    return content(config=visits.introduction(visit.site, visit.config, visit.mechanism))


@app.query("magnitudes")
@answering
@at_site
def tell_magnitudes(visit: Visit) -> RecordDict:
    """Tell where DoRA's magnitudes start: the norms of the base's weights. No data are read."""
    resident = machine.prepare_model(visit.config)
    arrays = to_arrays(resident.magnitudes)
    return content(arrays=arrays, metrics=visits.process_facts())


@app.train()
@answering
@at_site
def train(visit: Visit) -> RecordDict:
    """Train the received adapter on the site's next examples; reply with its change."""
    masks.check_kind(visit, masked=False)
    change, metrics = trained(visit)
    arrays = visits.encoded(visit, change)
    visit.write_cursor()
    return content(arrays=arrays, metrics=metrics)


@app.train("masked")
@answering
@at_site
def train_masked(visit: Visit) -> RecordDict:
    """Train as in `train`; reply with the change in fixed point, under masks."""
    masks.check_boxes(visit)
    change, metrics = trained(visit)
    reply = masks.masked(visit, change)
    visit.write_cursor()
    told = metrics if visit.end else visits.without_figures(metrics)  # a custody tells less itself
    return RecordDict({**reply, **content(metrics=told)})


@app.train("keys")
@answering
@at_site
def keys(visit: Visit) -> RecordDict:
    """Send fresh public keys for a masked sum."""
    return masks.answer(visit, "keys")


@app.train("shares")
@answering
@at_site
def shares(visit: Visit) -> RecordDict:
    """Send shares of the masks' secrets, sealed for each other site."""
    return masks.answer(visit, "shares")


@app.train("confirm")
@answering
@at_site
def confirm(visit: Visit) -> RecordDict:
    """Sign which sites are in the sum."""
    return masks.answer(visit, "confirm")


@app.train("unmask")
@answering
@at_site
def unmask(visit: Visit) -> RecordDict:
    """Reveal what removes the masks of the sum."""
    return masks.answer(visit, "unmask")


def trained(visit: Visit) -> tuple[Adapter, dict[str, float | int]]:
    """Return the change of the adapter after the local steps, and the metrics of the visit."""
    batches = [] if visit.mechanism else visits.next_batches(visit)
    resident = visits.prepared(visit.config)
    received = visits.receive_adapter(visit, resident, trains=True)
    with steps.visiting("training", visit.site.partition_id):
        if visit.mechanism:
            noised_loss = visits.train_privately(visit, visit.mechanism, resident)
        else:
            result = visits.train(visit, resident, batches)

    change = visits.change_of(visit, resident, received)
    if visit.mechanism:
        return change, visits.private_metrics(visit, visit.mechanism, noised_loss)
    return change, visits.train_metrics(visit, result, change)


@app.train("personal")
@answering
@at_site
def personalise(visit: Visit) -> RecordDict:
    """Make the site's personal adapter of the received one; it stays, and its loss is told."""
    made = personal.personalised(visit)
    personal_files.keep(visit, made)
    return content(metrics=personal.told(visit, made))


@app.evaluate()
@answering
@at_site
def evaluate(visit: Visit) -> RecordDict:
    """Evaluate the loss of the received adapter on the site's held-out examples."""
    resident = visits.prepared(visit.config)
    visits.receive_adapter(visit, resident, trains=False)
    with steps.visiting("held-out loss", visit.site.partition_id):
        return content(metrics=visits.evaluate(resident, visit.site, visit.config))


@app.evaluate("subgroups")
@answering
@at_site
def evaluate_subgroups(visit: Visit) -> RecordDict:
    """Evaluate the received adapter on each subgroup of the held-out examples that may be told."""
    resident = visits.prepared(visit.config)
    visits.receive_adapter(visit, resident, trains=False)
    with steps.visiting("held-out loss by subgroup", visit.site.partition_id):
        return subgroups.evaluate(visit, resident)


@app.evaluate("formulary")
@answering
@at_site
def examine(visit: Visit) -> RecordDict:
    """Hold the formulary's exam, with and without the received adapter."""
    resident = machine.prepare_model(visit.config)
    visits.receive_adapter(visit, resident, trains=False, alone=True)
    with steps.visiting("formulary exam", visit.site.partition_id):
        return content(metrics=visits.examine(resident, visit.config))


VISITS = {
    "query": introduce,
    MAGNITUDES: tell_magnitudes,
    "train": train,
    "train.keys": keys,
    "train.shares": shares,
    "train.masked": train_masked,
    "train.confirm": confirm,
    "train.unmask": unmask,
    PERSONAL: personalise,
    "evaluate": evaluate,
    SUBGROUPS: evaluate_subgroups,
    "evaluate.formulary": examine,
}
"""Kind of message → function, for a site's agent."""
