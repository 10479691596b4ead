"""The ClientApp of a deployment: it forwards each message to the site's agent.

Flower starts a new process for every message. This one loads neither torch nor the training code,
unless the site has no agent: then it runs the regular ClientApp itself.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from grandrounds.site.custody.agent_client import forward
from grandrounds.site.custody.node import AGENT
from grandrounds.wire.messages import answering

app = ClientApp()


@app.query()
@app.query("magnitudes")
@app.train()
@app.train("keys")
@app.train("shares")
@app.train("masked")
@app.train("confirm")
@app.train("unmask")
@app.evaluate()
@app.evaluate("formulary")
@answering
def hand_on(message: Message, context: Context) -> Message:
    """Return the answer of the site's agent, or of the ClientApp in this process without one."""
    if AGENT in context.node_config:
        return forward(message, context)
    from grandrounds.client_app import app as client_app

    return client_app(message, context)
