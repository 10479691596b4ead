"""What a site tells of an answer, and what its audit log says that it told."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from flwr.app import Message

from grandrounds.data.embedded import EMBEDDED
from grandrounds.site.custody import guarantee, order
from grandrounds.site.custody.disclosure import Told, disclosed
from grandrounds.site.custody.own_data import own_identifiers
from grandrounds.site.custody.own_run import unusable
from grandrounds.site.custody.request import Request
from grandrounds.site.custody.rules_hash import policy_sha256
from grandrounds.site.local_data import Site
from grandrounds.wire import messages
from grandrounds.wire.names import NAME, SOURCE
from grandrounds.wire.told import BASE, DATA_TAG, POLICY


def search(request: Request, template: str) -> str:
    """Note what looks like identifiers in the site's data, once per version; return the version.

    Parameters
    ----------
    template : str
        `data.prompt-template` of the run.

    Raises
    ------
    OwnDataError
        If there are some that the site refuses. The server learns only that its data cannot be
        used.
    """
    site, state = request.site, request.state
    private = request.is_private
    found = own_identifiers(site, request.run, private=private, template=template)
    how = site.data.identifiers
    if how != "off" and not state.count(
        "select count(*) from searched where version = ?", found.version
    ):
        request.entry |= {"searched": found.examples, "identifiers": dict(found.counts)}
        state.table.execute("insert into searched values (?, ?)", (found.version, state.now()))
    if how == "refuse" and found.certain:
        request.entry |= {"searched": found.examples, "identifiers": dict(found.counts)}
        raise unusable(site)
    return found.version


def introduce(request: Request, reply: Message, base: str, data_version: str) -> None:
    """Add the site's name, hashes of base and policy, a public source and the data's tag.

    The tag is the same as long as the data are, in one run, and says nothing else.
    """
    site, facts = request.site, reply.content.config_records[messages.CONFIG]
    facts[NAME], facts[BASE], facts[POLICY] = site.name, base, policy_sha256(site)
    secret = order.secret_of(request.state.folder)
    of_run = f"data {request.run} {data_version}".encode()
    facts[DATA_TAG] = hmac.digest(secret, of_run, "sha256").hex()[:16]
    if request.mechanism:
        facts.update(guarantee.spent(site, request.state, request.run))
    if site.data.source in EMBEDDED:
        facts[SOURCE] = site.data.source


def told(request: Request, reply: Message, examples: Site) -> Message:
    """Return the part of a reply that may leave; all of its figures go to the audit log."""
    figures = dict(reply.content.metric_records.get(messages.METRICS) or {})
    if request.is_private and request.trains:
        used = guarantee.used(request.site, request.state, request.run)
        reply.content.metric_records[messages.METRICS].update(used)
        request.entry |= used
    tells_loss = request.mechanism is not None and request.mechanism.tells_loss
    rules = Told(request.site, examples.report, request.is_private, tells_loss)
    found = disclosed(request.kind, reply.content, rules)
    request.entry |= {"figures": figures, "kept": list(found.kept)}
    if not request.is_visit:
        request.entry["data"] = dict(examples.report)
    return Message(found.content, reply_to=request.message)


def left(entry: Mapping[str, Any], reply: Message) -> Mapping[str, Any]:
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
