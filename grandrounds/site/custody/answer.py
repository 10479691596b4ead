"""A site's answer in its own custody: policy, visit, state and audit log, in this order.

Used both by the site's agent and by a ClientApp that a SuperNode started. Data, base, columns and
held-out examples are the site's own, whatever the run's configuration says.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from grandrounds.config.bases import bases_folder, find_base, names_a_base
from grandrounds.config.keys import Config
from grandrounds.config.recipes import resolve
from grandrounds.data.formulary import FORMULARY, base_path
from grandrounds.errors import (
    DataError,
    GrandRoundsError,
    ModelError,
    OwnDataError,
    PolicyError,
    ReplyError,
)
from grandrounds.model import machine
from grandrounds.model.base import BaseSpec
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.model.machine import specs
from grandrounds.site.custody import audit, policy
from grandrounds.site.custody.base_content import content_sha256
from grandrounds.site.custody.own_data import own_site, own_split
from grandrounds.site.custody.site_file import SiteFile, read_site_file
from grandrounds.site.custody.state import SiteState
from grandrounds.site.local_data import Site
from grandrounds.site.visit import Visit, partition_id
from grandrounds.wire import messages
from grandrounds.wire.messages import CLIENT_APP_RAISED
from grandrounds.wire.names import NAME, SOURCE

SITE = "site"
"""Key of a node's configuration: the path of its site.toml."""

BASE = "base-content"
"""Key of an introduction: the SHA-256 of the base's files."""

RUN_KEY = re.compile(r"[0-9a-f]{1,32}")


def answer(
    path: Path, message: Message, context: Context, function: Callable[[Visit], RecordDict]
) -> Message:
    """Answer a message under a site's policy, and log the request and what left the site.

    The text of a crash may quote the site's data, so the server learns only its type. In error
    texts the site's paths are replaced by descriptions.

    Parameters
    ----------
    function
        The ClientApp's function for this kind of message.

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
        return _answer(site, message, context, function)
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


def _answer(
    site: SiteFile, message: Message, context: Context, function: Callable[[Visit], RecordDict]
) -> Message:
    with closing(SiteState(site.place(site.agent.state))) as state:
        entry = _question(message, context)
        try:
            run = run_key(message)
            config = resolve(context.run_config)
            own = localized(site, config)
            base = base_sha256(site, config.model.name, state)
            policy.check_base(site, config.model.name, base)
            check_unchanged(config.model.name, own.model.name, base)
            entry |= admit(site, config, own, run).as_dict()
            is_visit = message.metadata.message_type != "query"
            if is_visit:
                policy.check_visits(site, state.visits_today())
                state.count_visit(run, entry["round"])  # even if it fails
            else:
                policy.check_questions(site, state.count_question())
            partition_id(site.numbers, own)
            examples = site_in_custody(site, own, run)
            settled = machine.settled(own, messages.instruction_of(message.content))
            visit = Visit(message.content, state.load(run), settled, examples)
            started = time.perf_counter()
            reply = Message(function(visit), reply_to=message)
            entry["seconds"] = round(time.perf_counter() - started, 3)
            if is_visit:
                state.save(run, visit.state)
            else:
                facts = reply.content.config_records[messages.CONFIG]
                facts[NAME], facts[BASE] = site.name, base
                if site.data.source == FORMULARY:
                    facts[SOURCE] = FORMULARY
        except GrandRoundsError as error:
            outcome = "refused" if isinstance(error, PolicyError) else "failed"
            cause = error.__cause__ if isinstance(error, OwnDataError) else error
            audit.write(state.folder, {**entry, "outcome": outcome, "reason": str(cause)})
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            audit.write(state.folder, {**entry, "outcome": "crashed", "reason": reason})
            logging.getLogger("grandrounds").exception("A visit crashed.")
            told = f"the site's visit crashed ({type(error).__name__}); its audit log says why"
            return Message(Error(CLIENT_APP_RAISED, told), reply_to=message)
        audit.write(state.folder, {**entry, "outcome": "answered", "left": _left(reply)})
        return reply


def admit(site: SiteFile, config: Config, own: Config, run: str) -> policy.Asked:
    """Return what a run requests; raise `PolicyError` if the site's policy forbids it."""
    examples = len(site_in_custody(site, own, run).train)
    asked = policy.asked_of(config, _targets(*specs(own)), examples)
    policy.check_run(site, asked, examples)
    return asked


@lru_cache(maxsize=8)
def _targets(base: BaseSpec, lora: LoraSpec) -> tuple[str, ...]:
    return tuple(adapter_layout(base.name, lora)[1])


def localized(site: SiteFile, config: Config) -> Config:
    """Return a run's configuration with the site's own base and threads.

    Raises
    ------
    PolicyError
        If the site has no base of that name.
    """
    policy.check_known(site, config.model.name)
    threads = site.agent.num_threads or min(config.train.num_threads, os.cpu_count() or 1)
    compiles = config.arguments.torch_compile and site.agent.torch_compile
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=base_location(site, config.model.name)),
        train=dataclasses.replace(config.train, num_threads=threads),
        arguments=dataclasses.replace(config.arguments, torch_compile=compiles),
        static=dataclasses.replace(config.static, name=f"the data of {site.name}"),
    )


def inventory(site: SiteFile) -> Iterator[str]:
    """Yield a description of the site's examples and of each base with its hash.

    Raises
    ------
    GrandRoundsError
        If data or a base cannot be read, or a base differs from the hash in the site's file.
    """
    report = own_split(site).report
    yield f"{report.train_examples:,} examples to train on, {report.held_out_examples:,} held out"
    with closing(SiteState(site.place(site.agent.state))) as state:
        for name in site.bases:
            digest = base_sha256(site, name, state)
            policy.check_base(site, name, digest)
            yield f"base {name}: sha256 {digest}"


def base_location(site: SiteFile, name: str) -> str:
    """Return the path or name that loads the site's copy of a base."""
    if site.bases[name].path:
        return str(base_folder(site, name))
    return name if names_a_base(name) else FORMULARY


def base_sha256(site: SiteFile, name: str, state: SiteState) -> str:
    """Return the SHA-256 of the files in the site's copy of a base.

    Raises
    ------
    ModelError
        If the files cannot be read, or the base has not been fetched.
    """
    if not site.bases[name].path:
        find_base(name)
    return content_sha256(base_folder(site, name), state.hashes)


_loaded: dict[str, str] = {}
"""Location of a base → the SHA-256 of its files when this process first used it."""


def check_unchanged(name: str, location: str, sha256: str) -> None:
    """Raise `ModelError` if a base's files have changed since this process first used it."""
    if (loaded := _loaded.setdefault(location, sha256)) != sha256:
        raise ModelError(
            f"The files of the base {name!r} have changed since the site's agent loaded them: "
            f"their sha256 was {loaded} and is now {sha256}. Restart the agent."
        )


def base_folder(site: SiteFile, name: str) -> Path:
    """Return the folder of the site's copy of a base; without a path, the one of that name here."""
    if path := site.bases[name].path:
        return site.place(path)
    return bases_folder() / name if names_a_base(name) else base_path()


def site_in_custody(site: SiteFile, own: Config, run: str) -> Site:
    """Return the site's examples for a run with this configuration.

    Raises
    ------
    OwnDataError
        If they cannot be read. The reason may quote a row or a query, so it is only in the
        error's cause, which stays at the site.
    """
    try:
        found = own_site(site, own.model.name, own.data.prompt_template, own.train.seq_length, run)
    except DataError as error:
        raise OwnDataError(
            f"The data of site {site.name!r} cannot be used; its audit log says why."
        ) from error
    if site.policy.report_held_out_loss:
        return found
    return dataclasses.replace(found, held_out=(), report={**found.report, "held-out-examples": 0})


def run_key(message: Message) -> str:
    """Return the key by which a site identifies a run; a resume keeps it.

    Raises
    ------
    ReplyError
        If it is missing or malformed.
    """
    record = message.content.config_records.get(messages.CONFIG) or ConfigRecord()
    key = record.get(messages.RUN)
    if not isinstance(key, str) or not RUN_KEY.fullmatch(key):
        raise ReplyError(f"run is {str(key)[:40]!r}, not a key of up to 32 hex digits")
    return key


def _question(message: Message, context: Context) -> dict[str, Any]:
    """Return the audit log's entry for a message, before it is processed."""
    record = message.content.config_records.get(messages.CONFIG) or ConfigRecord()
    number = record.get("round")
    return {
        "run": str(record.get(messages.RUN, ""))[:40],
        "flower-run": str(context.run_id),
        "round": number if isinstance(number, int) else 0,
        "asked": message.metadata.message_type,
        **{name: _number(record[name]) for name in ("cursor", "learning-rate") if name in record},
        "bytes-in": sum(size for _, size in messages.tensor_sizes(message)),
    }


def _number(value: object) -> object:
    """Return a number; anything else as its repr, shortened."""
    return value if isinstance(value, int | float) else repr(value)[:40]


def _left(reply: Message) -> Mapping[str, Any]:
    """Return the audit log's entry for a reply: names, never contents, and the update's norm."""
    sizes = messages.tensor_sizes(reply)
    metrics: Mapping[str, Any] = reply.content.metric_records.get(messages.METRICS) or {}
    told: Mapping[str, Any] = reply.content.config_records.get(messages.CONFIG) or {}
    return {
        "tensors": len(sizes),
        "bytes": sum(size for _, size in sizes),
        "norm": metrics.get(messages.UPDATE_NORM),
        "told": sorted([*metrics, *told]),
    }
