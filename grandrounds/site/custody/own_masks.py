"""A site's own end of masked sums: its agent key, the roster that it has accepted, and its state.

The protocol is `grandrounds.site.masks.end`, the same as in process; what is a custody's own is who
the site is, with whom it takes part, and that its attempts outlive the agent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from grandrounds.config.keys import Config
from grandrounds.errors import PolicyError
from grandrounds.site.custody import kept_runs, replay
from grandrounds.site.custody.agent_key import IDENTITY, accepted
from grandrounds.site.custody.kept_masks import CustodyStore
from grandrounds.site.custody.request import Request
from grandrounds.site.local_data import Site
from grandrounds.site.masks import visit as masks
from grandrounds.site.masks.end import SiteEnd
from grandrounds.site.visit import Visit
from grandrounds.wire import messages
from grandrounds.wire.masks import packed
from grandrounds.wire.masks.carried import NEXT
from grandrounds.wire.masks.keys import read_private_key

_CHANGE_OF = "grandrounds-change-of"


def end_at(request: Request) -> SiteEnd:
    """Return the site's end of a run's masked sums.

    Raises
    ------
    PolicyError
        If the site has no agent key, or has accepted no roster that lists it.
    ConfigError
        If the roster or the key is damaged, or other users can read the key.
    """
    site = request.site
    file, roster = site.path.parent / IDENTITY, accepted(site)
    if not file.is_file():
        raise PolicyError(
            "This site has no agent key, which masked sums need: its operator makes one with "
            "grandrounds site rotate-key."
        )
    if roster is None:
        raise PolicyError(
            "This site has accepted no roster of agent keys, which masked sums need: its operator "
            "accepts the consortium's with grandrounds site accept-roster."
        )
    end = SiteEnd(
        site.node.partition_id,
        read_private_key(file),
        roster,
        site.secure.min_cohort,
        CustodyStore(request.state),
    )
    end.attempt(request.run, 1, 0)  # the roster lists the site, with this key
    return end


def exchange_of(request: Request, own: Config) -> Visit:
    """Return an exchange of a masked sum as a visit, without data."""
    site = Site(request.site.node.partition_id, (), (), {})
    return Visit(request.message.content, RecordDict(), own, site, end=request.end)


def ready_to_mask(request: Request, config: Config, own: Config) -> NDArray[np.float32] | None:
    """Check what came with a request to train, before anything is charged, counted or read.

    Returns
    -------
    array, optional
        The change of a visit that was trained for an earlier attempt at the same sum. Masked once
        more it tells nothing new, and the site is neither charged nor counted again.

    Raises
    ------
    ReplyError, PolicyError
        If the boxes of the other sites do not open, or another request of this attempt was
        answered.
    """
    if not (request.end and request.trains):
        return None
    masks.check_boxes(exchange_of(request, own))
    request.entry |= agreed(request)
    kept = kept_runs.load(request.state, request.run)
    of = kept.config_records.get(_CHANGE_OF)
    if of is None or of["digest"] != replay.digest_of(request, config, of_change=True):
        return None
    return kept.array_records[masks.CHANGE][masks.CHANGE].numpy()


def note_change(request: Request, config: Config, kept: RecordDict) -> None:
    """Note of which request the change is that the site keeps of a run."""
    if request.end and request.trains:
        digest = replay.digest_of(request, config, of_change=True)
        kept.config_records[_CHANGE_OF] = ConfigRecord({"digest": digest})


def masked_again(change: NDArray[np.float32]) -> Callable[[Visit], RecordDict]:
    """Return what answers a request to train with a change that is there already."""

    def answer(visit: Visit) -> RecordDict:
        masks.check_boxes(visit)
        reply = masks.masked(visit, {masks.CHANGE: change})
        return RecordDict({**reply, **messages.content(metrics={})})

    return answer


def agreed(request: Request) -> dict[str, Any]:
    """Return what the audit log says of an attempt: its number, and the sites in each of its sets.

    Sites are partition ids of the roster.
    """
    assert request.end is not None
    attempt = masks.attempt_of(request.end, request.instruction)
    held = request.end.store.read(attempt)
    entry: dict[str, Any] = {"attempt": attempt.number, "roster": request.end.roster.serial}
    if held is not None and held.key_list:
        entry["cohort"] = list(packed.key_list(held.key_list))
    if held is not None and held.survivors:
        entry["survivors"] = list(held.survivors)
    return entry


def leaving(content: RecordDict) -> RecordDict:
    """Return what leaves of the answer to an exchange: its array, and that of the next round."""
    arrays, said = content.array_records, messages.instruction_of(content)
    whole = RecordDict({name: arrays[name] for name in (messages.ARRAYS, NEXT) if name in arrays})
    if NEXT in said:
        whole.update(messages.content(config={NEXT: said[NEXT]}))  # type: ignore[dict-item]
    return whole


def next_refused(content: RecordDict) -> dict[str, str]:
    """Return why the next round's part of an exchange was refused, for the audit log."""
    said = messages.instruction_of(content)
    return {"next-refused": str(said[NEXT])} if NEXT in said else {}
