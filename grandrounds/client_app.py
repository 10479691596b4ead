"""What happens at a site: it introduces itself, trains on what it receives, and answers.

Read it from top to bottom: each function is one kind of message (see `grandrounds.wire.messages`).
Where a site has an agent, it is the agent that calls them (`at_site`).
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from grandrounds.model import machine
from grandrounds.quiet import quiet_libraries
from grandrounds.site import visit as visits
from grandrounds.site.custody.dispatch import at_site
from grandrounds.wire import messages
from grandrounds.wire.messages import answering

quiet_libraries()  # here too: in Flower's simulation this module is imported by Ray's workers
app = ClientApp()


@app.query()
@answering
@at_site
def introduce(message: Message, context: Context) -> Message:
    """Say who this site is, what it holds and what it would train on."""
    site, config = visits.site_of(context)
    return messages.reply(message, config=visits.introduction(site, config))


@app.train()
@answering
@at_site
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on the site's next examples; answer with its change."""
    site, config = visits.site_of(context)
    instruction = message.content.config_records[messages.CONFIG]
    start = visits.read_cursor(context.state, instruction)

    resident = machine.prepare_model(config)
    number = visits.round_of(instruction)
    received = visits.receive_adapter(resident, message, config, context, number)
    batches, cursor = visits.next_batches(site, config, instruction, start)
    result = visits.train(resident, batches, config, instruction, site)

    change = visits.change_of(resident, received, config, instruction, site)
    arrays = visits.encoded(change, config, context, instruction, site, (start, cursor))
    visits.write_cursor(context.state, cursor)
    metrics = visits.train_metrics(site, result, cursor, config, change)
    return messages.reply(message, arrays=arrays, metrics=metrics)


@app.evaluate()
@answering
@at_site
def evaluate(message: Message, context: Context) -> Message:
    """Answer the received adapter's loss on the examples that the site holds out."""
    site, config = visits.site_of(context)
    resident = machine.prepare_model(config)
    visits.receive_adapter(resident, message, config, context)
    return messages.reply(message, metrics=visits.evaluate(resident, site, config))


@app.evaluate("formulary")
@answering
@at_site
def examine(message: Message, context: Context) -> Message:
    """Answer the formulary's questions with the received adapter and without it."""
    _, config = visits.site_of(context)
    resident = machine.prepare_model(config)
    visits.receive_adapter(resident, message, config, context)
    return messages.reply(message, metrics=visits.examine(resident, config))


VISITS = {
    "query": introduce,
    "train": train,
    "evaluate": evaluate,
    "evaluate.formulary": examine,
}
"""Kind of message → its function, for a site's agent."""
