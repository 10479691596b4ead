"""Where a ClientApp's function runs: at the site's agent, in the site's custody, or here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from grandrounds.model.base import base_loads
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody.agent_client import AGENT, forward
from grandrounds.site.visit import PROCESS, Visit

_LOADED = "grandrounds-loaded"


def at_site(
    function: Callable[[Visit], RecordDict],
) -> Callable[[Message, Context], Message]:
    """Turn a function of a visit into a Flower message handler.

    - `agent` in the node's configuration: the site's agent answers.
    - `site`: the function runs in this process, under the policy and with the data of that
      site.toml.
    - neither: it runs in this process, on the data that the run's configuration names.
    """

    @functools.wraps(function)
    def answer(message: Message, context: Context) -> Message:
        if AGENT in context.node_config:
            return forward(message, context)
        before = base_loads()
        if custody.SITE in context.node_config:
            path = Path(str(context.node_config[custody.SITE]))
            reply = custody.answer(path, message, context, function)
        else:
            visit = Visit.here(message.content, context)
            reply = Message(function(visit), reply_to=message)
        if base_loads() > before:
            _warn_if_again(context)
        return reply

    return answer


def _warn_if_again(context: Context) -> None:
    """Warn if another process has loaded the base for this site before."""
    loaded = context.state.config_records.get(_LOADED)
    context.state.config_records[_LOADED] = ConfigRecord({"process": PROCESS})
    if loaded is not None and loaded["process"] != PROCESS:
        print(
            "grandrounds: the base model was loaded again for this message, because Flower starts "
            "a new process for each. A site's agent keeps it loaded: see grandrounds site serve.",
            file=sys.stderr,
            flush=True,
        )
