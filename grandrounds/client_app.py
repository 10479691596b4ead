"""What happens at a site: it introduces itself, trains on what it receives, and answers.

Read it from top to bottom: each function is one kind of message (see `grandrounds.wire.messages`).
Where a site has an agent, it is the agent that calls them (`at_site`).
"""

from __future__ import annotations

from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from grandrounds.model import machine
from grandrounds.quiet import quiet_libraries
from grandrounds.site import visit as visits
from grandrounds.site.custody.dispatch import at_site
from grandrounds.site.visit import Visit
from grandrounds.wire.messages import answering, content

quiet_libraries()  # here too: in Flower's simulation this module is imported by Ray's workers
app = ClientApp()


@app.query()
@answering
@at_site
def introduce(visit: Visit) -> RecordDict:
    """Say who this site is, what it holds and what it would train on."""
    return content(config=visits.introduction(visit.site, visit.config))


@app.train()
@answering
@at_site
def train(visit: Visit) -> RecordDict:
    """Train the received adapter on the site's next examples; answer with its change."""
    batches = visits.next_batches(visit)
    resident = machine.prepare_model(visit.config)
    received = visits.receive_adapter(visit, resident, trains=True)
    result = visits.train(visit, resident, batches)

    change = visits.change_of(visit, resident, received)
    arrays = visits.encoded(visit, change)
    metrics = visits.train_metrics(visit, result, change)
    visit.write_cursor()
    return content(arrays=arrays, metrics=metrics)


@app.evaluate()
@answering
@at_site
def evaluate(visit: Visit) -> RecordDict:
    """Answer the received adapter's loss on the examples that the site holds out."""
    resident = machine.prepare_model(visit.config)
    visits.receive_adapter(visit, resident, trains=False)
    return content(metrics=visits.evaluate(resident, visit.site, visit.config))


@app.evaluate("formulary")
@answering
@at_site
def examine(visit: Visit) -> RecordDict:
    """Answer the formulary's questions with the received adapter and without it."""
    resident = machine.prepare_model(visit.config)
    visits.receive_adapter(visit, resident, trains=False)
    return content(metrics=visits.examine(resident, visit.config))


VISITS = {
    "query": introduce,
    "train": train,
    "evaluate": evaluate,
    "evaluate.formulary": examine,
}
"""Kind of message → its function, for a site's agent."""
