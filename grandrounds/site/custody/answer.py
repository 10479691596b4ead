"""A site's answer in its own custody, step by step, from the cheapest check to the audit log.

Used both by the site's agent and by a ClientApp that a SuperNode started. Data, base, columns and
held-out examples are the site's own, whatever the run's configuration says.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict

from grandrounds.config.keys import Config
from grandrounds.errors import GrandRoundsError, OwnDataError, PolicyError, ThrottledError
from grandrounds.model import headroom, machine
from grandrounds.site.custody import (
    audit,
    budget,
    faults,
    guarantee,
    kept_runs,
    own_masks,
    policy,
    quota,
    refusals,
    replay,
)
from grandrounds.site.custody.approvals import check_approved
from grandrounds.site.custody.counting import Begun, begin, check_quota
from grandrounds.site.custody.disclosure import (
    EVALUATE,
    NO_ANSWER,
    QUERY,
    tells_loss,
    told_examples,
)
from grandrounds.site.custody.own_base import base_folder, checked_base
from grandrounds.site.custody.own_run import (
    admit,
    in_whole_steps,
    localized,
    shapes_at_rank,
    site_in_custody,
)
from grandrounds.site.custody.received import check_received
from grandrounds.site.custody.request import Request
from grandrounds.site.custody.site_file import read_site_file
from grandrounds.site.custody.state import SiteState
from grandrounds.site.custody.telling import introduce, left, search, tensors_sha256, told
from grandrounds.site.personal import tail_config
from grandrounds.site.visit import Visit, parsed, partition_id
from grandrounds.wire import messages
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.masks.attempt import KEYS, KIND_OF
from grandrounds.wire.messages import CLIENT_APP_RAISED
from grandrounds.wire.subgroups import SUBGROUPS
from grandrounds.wire.told import HELD_OUT_LOSS

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
        if request.is_private and request.touched:
            raise OwnDataError(NO_ANSWER) from error
        raise
    except Exception as error:
        line = {**entry, "outcome": "crashed", "reason": faults.told(error)}
        line |= faults.written(error, with_text=with_text)
        refusals.record(state, entry["run"], line)
        if request.is_private and request.touched:
            raise OwnDataError(NO_ANSWER) from error
        return Message(Error(CLIENT_APP_RAISED, faults.told(error)), reply_to=request.message)
    finally:
        hold(request)
    audit.write(state.folder, {**entry, "left": left(entry, reply)})
    return reply


def hold(request: Request) -> None:
    """Wait until a multiple of `answer-every-seconds` has passed since a private request came.

    Its time then tells little of how long the visit took.
    """
    every = request.site.privacy.answer_every_seconds
    if every and request.is_private and request.touched:
        passed = time.monotonic() - request.started
        time.sleep(math.ceil(passed / every) * every - passed)


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
    policy.check_keys(site, request.context.run_config)
    policy.check_texts(site, request.context.run_config)
    config = parsed(request.context.run_config)
    kept_runs.check_pinned(state, run, config)
    own = localized(site, config)
    partition_id(site.numbers, own)

    # 3. Approval, and the policy's verdicts that need no data.
    policy.check_instruction(site, config, request.kind, request.instruction)
    request.entry |= policy.check_recipe(site, config).as_dict()
    request.entry |= check_approved(site, state.folder, config, run)
    request.is_private = config.is_private
    if config.is_masked:
        request.end = own_masks.end_at(request)

    # 4. The base: known to the site, with the expected files.
    base = checked_base(site, config.model.name)

    # 5. The same request again: its cached reply.
    digest = replay.digest_of(request, config)
    if request.is_visit and (known := replay.cached(request, digest)):
        quota.check_questions(site, state, run)
        quota.count_question(state, run)
        request.entry["outcome"] = "answered again"
        return known

    # 6. Does the visit fit in memory, and in the privacy budget? What else needs no data?
    headroom.check_fits(own)
    change = own_masks.ready_to_mask(request, config, own)
    asks_for_visits = request.trains or request.kind in (QUERY, KIND_OF[KEYS])
    if request.is_private and asks_for_visits:
        request.mechanism = guarantee.reserved(site, state, run, config)
        is_charged = request.is_visit and budget.known_key(state, run, digest)
        if not is_charged and change is None:
            budget.check_visit(budget.read(site, state), run)
    if request.is_private and request.kind in (EVALUATE, SUBGROUPS):
        return without_loss(request)
    if request.end and request.is_exchange:
        return exchanged(request, own, function)
    request.touched = True

    # 7. The site's data, and the policy's limits that depend on their number.
    examples = site_in_custody(site, own, run, keeps_held_out=request.personalises)
    visiting = in_whole_steps(site, own, examples.report)
    visiting = tail_config(visiting) if request.personalises else visiting
    request.entry |= admit(site, config, visiting, len(examples.train)).as_dict()
    data_version = search(request, config.data.prompt_template)

    # 8. The received adapter: plausible? Nothing is asked of it for a loss that may not be told.
    asks_loss = request.kind in (EVALUATE, SUBGROUPS)
    if asks_loss and not tells_loss(site, len(examples.held_out)):
        return without_loss(request)
    if request.kind == SUBGROUPS and not examples.subgroups:
        return without_loss(request)
    if request.is_visit:
        request.entry["sha256-in"] = tensors_sha256(request.message)
    kept = kept_runs.load(state, run)
    before = dict(kept)
    settled = machine.settled(visiting, request.instruction)
    magnitudes = own_magnitudes(request, settled)
    check_received(request, own, shapes_at_rank(own), kept, magnitudes)

    # 9. The visit.
    sizes = len(examples.train), visiting.arguments.max_steps * visiting.examples_per_step
    if change is None:
        begun = begin(request, config, digest, kept, sizes)
    else:
        quota.check_questions(site, state, run)
        quota.count_question(state, run)
        begun, function = Begun(), own_masks.masked_again(change)
    visit = Visit(
        request.message.content,
        kept,
        settled,
        examples,
        begun.chosen,
        request.mechanism,
        begun.coins,
        request.end,
        told_examples(site, examples.report),
    )
    reply = visited(request, visit, function)
    own_masks.note_change(request, config, kept)

    # 10. What may be told of it.
    if request.kind == QUERY:
        introduce(request, reply, base, data_version)
    reply = told(request, reply, examples)

    # 11. State and cached reply, both or neither.
    if request.is_visit:
        changed = any(before.get(name) is not record for name, record in kept.items())
        replay.keep(
            request, replay.Answered(digest, kept if changed else None, reply, change is None)
        )
    else:
        quota.count_question(state, run)
    request.entry["outcome"] = "answered"
    return reply


def own_magnitudes(request: Request, own: Config) -> Adapter:
    """Return where DoRA's magnitudes start on the site's base; none without DoRA."""
    if not (own.lora.peft_use_dora and request.is_visit):
        return {}
    return machine.prepare_model(own).magnitudes


def exchanged(request: Request, own: Config, function: Function) -> Message:
    """Return the answer to an exchange of a masked sum, which needs neither base nor data."""
    reply = visited(request, own_masks.exchange_of(request, own), function)
    quota.count_question(request.state, request.run)
    request.entry |= {"outcome": "answered", **own_masks.agreed(request)}
    request.entry |= own_masks.next_refused(reply.content)
    return Message(own_masks.leaving(reply.content), reply_to=request.message)


def without_loss(request: Request) -> Message:
    """Return the answer to a request for a held-out loss that may not be told."""
    quota.check_questions(request.site, request.state, request.run)
    quota.count_question(request.state, request.run)
    request.entry |= {"outcome": "answered", "kept": [HELD_OUT_LOSS]}
    return Message(messages.content(metrics={}), reply_to=request.message)


def visited(request: Request, visit: Visit, function: Function) -> Message:
    """Return the reply of a visit; its seconds go to the audit log."""
    started = time.perf_counter()
    reply = Message(function(visit), reply_to=request.message)
    request.entry["seconds"] = round(time.perf_counter() - started, 3)
    return reply
