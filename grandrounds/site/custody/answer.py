"""A site's answer in its own custody, step by step, from the cheapest check to the audit log.

Used both by the site's agent and by a ClientApp that a SuperNode started. Data, base, columns and
held-out examples are the site's own, whatever the run's configuration says.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, MessageType, RecordDict

from grandrounds.config.keys import Config
from grandrounds.data.formulary import FORMULARY
from grandrounds.errors import GrandRoundsError, OwnDataError, PolicyError, ThrottledError
from grandrounds.model import machine
from grandrounds.site.custody import audit, faults, kept_runs, order, quota, refusals, replay
from grandrounds.site.custody.disclosure import EVALUATE, disclosed, tells_loss
from grandrounds.site.custody.own_base import base_folder, checked_base
from grandrounds.site.custody.own_run import admit, localized, site_in_custody
from grandrounds.site.custody.request import Request
from grandrounds.site.custody.site_file import SiteFile, read_site_file
from grandrounds.site.custody.state import SiteState
from grandrounds.site.local_data import Site
from grandrounds.site.visit import Chosen, Visit, parsed, partition_id
from grandrounds.wire import messages
from grandrounds.wire.messages import CLIENT_APP_RAISED
from grandrounds.wire.names import NAME, SOURCE
from grandrounds.wire.schedule import examples_of_a_visit
from grandrounds.wire.told import BASE, HELD_OUT_LOSS

Function = Callable[[Visit], RecordDict]
"""The ClientApp's function for a kind of message."""


def answer(path: Path, message: Message, context: Context, function: Function) -> Message:
    """Answer a message under a site's policy, and log the request and what left the site.

    The text of a crash may quote the site's data, so the server learns only its kind, and nothing
    of it is printed. In error texts the site's paths are replaced by descriptions.

    Raises
    ------
    GrandRoundsError
        If the policy forbids the visit, or it fails; the error is sent to the server.
    """
    places = {str(path.parent): "the site's folder"}
    try:
        site = read_site_file(path)
        places |= {str(base_folder(site, name)): f"the base {name!r}" for name in site.bases}
        places[str(site.place(site.agent.state))] = "the agent's state"
        with closing(SiteState(site.place(site.agent.state))) as state:
            return _logged(Request(site, state, message, context), function)
    except GrandRoundsError as error:
        words = [str(value) for value in context.run_config.values()]
        raise type(error)(without_places(str(error), places, words)) from error


def without_places(text: str, places: Mapping[str, str], words: Sequence[str]) -> str:
    """Replace places in a text by their descriptions.

    Words that the run itself supplied are kept; otherwise it could probe for paths.
    """
    own = {word for word in words if any(place in word for place in places)}
    longest_first = sorted({*own, *places}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(pattern, lambda found: found[0] if found[0] in own else places[found[0]], text)


def _logged(request: Request, function: Function) -> Message:
    """Answer a request and write its line of the audit log, whatever comes of it."""
    state, entry = request.state, request.entry
    with_text = request.site.agent.log_errors_with_text
    try:
        reply = _answered(request, function)
    except ThrottledError:
        raise
    except GrandRoundsError as error:
        outcome = "refused" if isinstance(error, PolicyError) else "failed"
        line = {**entry, "outcome": outcome, **_reason(error, with_text=with_text)}
        refusals.record(state, entry["run"], line)
        raise
    except Exception as error:
        line = {**entry, "outcome": "crashed", "reason": faults.told(error)}
        line |= faults.written(error, with_text=with_text)
        refusals.record(state, entry["run"], line)
        return Message(Error(CLIENT_APP_RAISED, faults.told(error)), reply_to=request.message)
    audit.write(state.folder, {**entry, "left": _left(entry, reply)})
    return reply


def _reason(error: GrandRoundsError, *, with_text: bool) -> Mapping[str, object]:
    """Return the reason of a refusal or failure for the audit log.

    What is wrong with the site's data may quote a row.
    """
    if not isinstance(error, OwnDataError) or error.__cause__ is None:
        return {"reason": str(error)}
    return {"reason": str(error), **faults.written(error.__cause__, with_text=with_text)}


def _answered(request: Request, function: Function) -> Message:
    """Return the answer to a request: each step may refuse it, the cheapest come first."""
    site, state = request.site, request.state

    # 1. Cheap checks and counters.
    refusals.check(state, request.entry["run"])
    run = request.run
    check_quota(request)

    # 2. The run's configuration: that of its first visit, and what it becomes at this site.
    config = parsed(request.context.run_config)
    kept_runs.check_pinned(state, run, config)
    own = localized(site, config)
    partition_id(site.numbers, own)

    # 3. Approval, and the policy's verdicts that need no data.

    # 4. The base: known to the site, with the expected files.
    base = checked_base(site, config.model.name)

    # 5. The same request again: its cached reply.
    digest = replay.digest_of(request, config)
    if request.is_visit and (known := replay.cached(request, digest)):
        quota.count_question(site, state, run)
        request.entry["outcome"] = "answered again"
        return known

    # 6. Does the visit fit in memory?

    # 7. The site's data, and the policy's limits that depend on their number.
    examples = site_in_custody(site, own, run)
    request.entry |= admit(site, config, own, len(examples.train)).as_dict()

    # 8. The received adapter: plausible?

    # 9. The visit; none for a loss that may not be told.
    if request.kind == EVALUATE and not tells_loss(site, len(examples.held_out)):
        request.entry |= {"outcome": "answered", "kept": [HELD_OUT_LOSS]}
        return Message(messages.content(metrics={}), reply_to=request.message)
    kept = kept_runs.load(state, run)
    chosen = begin(request, config, digest, kept, len(examples.train))
    settled = machine.settled(own, request.instruction)
    visit = Visit(request.message.content, kept, settled, examples, chosen)
    reply = visited(request, visit, function)

    # 10. What may be told of it.
    if not request.is_visit:
        introduce(site, reply, base)
    reply = told(request, reply, examples)

    # 11. State and cached reply, both or neither.
    if request.is_visit:
        replay.keep(request, replay.Answered(digest, visit.state, reply))
    request.entry["outcome"] = "answered"
    return reply


def check_quota(request: Request) -> None:
    """Raise `PolicyError` if the site has reached a limit of 24 hours; count a roll call.

    A visit is counted when it begins. One whose reply may be cached needs no new one.
    """
    site, state, run = request.site, request.state, request.run
    quota.check_run(site, state, run)
    if not request.is_visit:
        quota.count_question(site, state, run)
    elif not replay.may_have(request):
        quota.check_visits(site, state)


def begin(
    request: Request, config: Config, digest: str, kept: RecordDict, num_examples: int
) -> Chosen | None:
    """Count a visit, also if it fails afterwards, and return the examples that it trains on.

    Parameters
    ----------
    kept
        What the site keeps of the run.
    num_examples : int
        Training examples of the site.

    Raises
    ------
    PolicyError
        If a limit was reached meanwhile, or the state folder is full.
    """
    site, state, run = request.site, request.state, request.run
    if not request.is_visit:
        return None
    kept_runs.check_room(state)
    trains = request.kind == MessageType.TRAIN
    size = examples_of_a_visit(config, num_examples)
    with state.lasting():
        quota.check_run(site, state, run)
        quota.check_visits(site, state)
        quota.count_visit(state, run, request.round)
        kept_runs.note_visit(state, run, config)
        start = replay.reserve(request, digest, num_examples, size) if trains else None
    return order.choose(state, start, kept, (num_examples, size)) if start else None


def visited(request: Request, visit: Visit, function: Function) -> Message:
    """Return the reply of a visit; its seconds go to the audit log."""
    if request.is_visit:
        request.entry["sha256-in"] = tensors_sha256(request.message)
    started = time.perf_counter()
    reply = Message(function(visit), reply_to=request.message)
    request.entry["seconds"] = round(time.perf_counter() - started, 3)
    return reply


def told(request: Request, reply: Message, examples: Site) -> Message:
    """Return the part of a reply that may leave; all of its figures go to the audit log."""
    figures = dict(reply.content.metric_records.get(messages.METRICS) or {})
    found = disclosed(request.site, request.kind, reply.content, examples.report)
    request.entry |= {"figures": figures, "kept": list(found.kept)}
    return Message(found.content, reply_to=request.message)


def introduce(site: SiteFile, reply: Message, base: str) -> None:
    """Add the site's name, the base's hash and a public source to an introduction."""
    facts = reply.content.config_records[messages.CONFIG]
    facts[NAME], facts[BASE] = site.name, base
    if site.data.source == FORMULARY:
        facts[SOURCE] = FORMULARY


def _left(entry: Mapping[str, Any], reply: Message) -> Mapping[str, Any]:
    """Return the audit log's entry for a reply: names, sizes, the update's norm and its hash."""
    sizes = messages.tensor_sizes(reply)
    metrics: Mapping[str, Any] = reply.content.metric_records.get(messages.METRICS) or {}
    told: Mapping[str, Any] = reply.content.config_records.get(messages.CONFIG) or {}
    return {
        "tensors": len(sizes),
        "bytes": sum(size for _, size in sizes),
        "norm": entry.get("figures", {}).get(messages.UPDATE_NORM),
        "sha256": tensors_sha256(reply) if sizes else None,
        "told": sorted([*metrics, *told]),
    }


def tensors_sha256(message: Message) -> str:
    """Return the SHA-256 of the tensors in a message, with their names."""
    digest = hashlib.sha256()
    for record in message.content.array_records.values():
        for name, array in record.items():
            digest.update(f"{name}\0{len(array.data)}\0".encode())
            digest.update(array.data)
    return digest.hexdigest()
