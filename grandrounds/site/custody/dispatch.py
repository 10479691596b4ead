"""Where a ClientApp's function runs: at the site's agent, in the site's custody, or here."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from grandrounds.errors import DataError, OwnDataError
from grandrounds.model.base import base_loads
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody import policy
from grandrounds.site.custody.agent_client import forward
from grandrounds.site.custody.faults import (
    keep_texts_off_the_terminal,
    kinds,
    places,
    say,
    telling_kinds_only,
)
from grandrounds.site.custody.node import AGENT, SITE, check_choice, is_one_machine
from grandrounds.site.personal_files import rehearsal_folder
from grandrounds.site.visit import PROCESS, Visit, parsed, partition_id

FLOWERS_PROCESS = "flwr.supernode.runtime.run_clientapp"
"""Module of a process that a SuperNode starts for a message."""

_LOADED = "grandrounds-loaded"


def at_site(
    function: Callable[[Visit], RecordDict],
) -> Callable[[Message, Context], Message]:
    """Turn a function of a visit into a Flower message handler.

    - `agent` in the node's configuration: the site's agent answers.
    - `site`: the function runs in this process, under the policy and with the data of that
      site.toml.
    - neither: it runs in this process, on the data that the run's configuration names; at a
      SuperNode only with `data-of-the-run=true`, and errors are told by their kind.
    """

    @functools.wraps(function)
    def answer(message: Message, context: Context) -> Message:
        if AGENT in context.node_config:
            return forward(message, context)
        if is_one_machine(context.node_config):
            return here(message, context)
        if FLOWERS_PROCESS in sys.modules:
            keep_texts_off_the_terminal()
        return telling_kinds_only(here)(message, context)

    def here(message: Message, context: Context) -> Message:
        before = base_loads()
        if SITE in context.node_config:
            path = Path(str(context.node_config[SITE]))
            reply = custody.answer(path, message, context, function)
        else:
            reply = Message(function(_visit(message, context)), reply_to=message)
        if base_loads() > before:
            _warn_if_again(context)
        return reply

    return answer


def _visit(message: Message, context: Context) -> Visit:
    """Return a visit to this node on the data that the run names.

    Raises
    ------
    PolicyError
        If the node is a SuperNode that was not started for that.
    OwnDataError
        If a SuperNode cannot use the data. The reason may quote a row, and stays there.
    """
    if is_one_machine(context.node_config):
        visit = Visit.here(message.content, context)
        return dataclasses.replace(visit, folder=rehearsal_folder(visit.config))
    check_choice(context.node_config)
    config = parsed(context.run_config)
    policy.check_no_masks(config)
    partition_id(context.node_config, config)
    try:
        return Visit.here(message.content, context)
    except DataError as error:
        say(f"the run's data cannot be used: {kinds(error)} at {', '.join(places(error))}")
        raise OwnDataError(
            "The data that the run names cannot be used at this site: read them there with "
            "grandrounds plan, which says why."
        ) from error


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
