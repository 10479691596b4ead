"""What a SuperNode starts for each message where the site has an agent: it hands the message on.

Flower starts a new process for every message. This one loads neither torch nor the site's code for
training, unless there is no agent: then it is the ClientApp itself that answers.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from grandrounds.site.custody.agent_client import AGENT, forward
from grandrounds.wire.messages import answering

app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
@app.evaluate("formulary")
@answering
def hand_on(message: Message, context: Context) -> Message:
    """Let the site's agent answer, or the ClientApp in this process where there is none."""
    if AGENT in context.node_config:
        return forward(message, context)
    from grandrounds.client_app import app as client_app

    return client_app(message, context)
