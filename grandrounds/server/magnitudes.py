"""Where DoRA's magnitudes start: asked of two sites, once, since the server never loads the base.

Two sites must agree to the bit, or the run ends. A third one compares its own base with what they
told at each visit, and refuses if it differs (`wire/downlink.py`).
"""

from __future__ import annotations

import logging

from flwr.app import Message

from grandrounds.errors import EngineError, ReplyError
from grandrounds.server.judging import noting
from grandrounds.server.run import Run
from grandrounds.server.unfinished import MAGNITUDES
from grandrounds.wire import messages
from grandrounds.wire.adapter import Adapter, adapter_sha256
from grandrounds.wire.downlink import Parcel
from grandrounds.wire.traffic import MAGNITUDES_UP, STARTERS

_log = logging.getLogger("grandrounds")


def ask_for_magnitudes(run: Run) -> Adapter:
    """Return where DoRA's magnitudes start, and note in `run.started_by` which sites told it.

    The sites with the lowest numbers are asked; where one cannot answer, the next. Where a single
    one takes part, nothing can be compared, which the log says.

    Raises
    ------
    EngineError
        If two sites differ, or fewer answer than `STARTERS` and take part in the run.
    """
    cards, told = run.roster.cards, dict[int, Adapter]()
    waiting, failed = sorted(cards), dict[int, str]()
    wanted = min(STARTERS, len(waiting))

    def use(site: int, reply: Message) -> messages.Metrics:
        arrays = reply.content.array_records.get(messages.ARRAYS)
        if arrays is None:
            raise ReplyError("the reply has no tensors")
        told[site] = messages.magnitudes_from(arrays, run.magnitudes)
        return messages.metrics_of(reply) if reply.content.metric_records else {}

    nothing = Parcel(None, {}, {})
    while waiting and (count := wanted - len(told)) > 0:
        asked, waiting = waiting[:count], waiting[count:]
        outgoing = {
            site: run.exchange.message(
                cards[site].node_id, messages.MAGNITUDES, 0, nothing, cards[site].arithmetic
            )
            for site in asked
        }
        tell = noting(run, MAGNITUDES)
        tally = run.exchange.ask(MAGNITUDES_UP.removesuffix(".up"), outgoing, use, tell)
        run.state.note_loads(tally)
        failed |= tally.failed
    names = run.roster.names
    if len(told) < wanted:
        reasons = "; ".join(f"{names.with_number(site)}: {why}" for site, why in failed.items())
        raise EngineError(
            f"DoRA's magnitudes start as the norms of the base's weights, which {wanted} sites "
            f"must tell, and {len(told)} of {len(cards)} did. {reasons}"
        )
    hashes = {site: adapter_sha256(found) for site, found in told.items()}
    if len(set(hashes.values())) > 1:
        sites = "; ".join(
            f"{names.with_number(s)} has {digest[:16]}" for s, digest in hashes.items()
        )
        raise EngineError(
            f"The sites do not have the same base: the norms of its weights, where DoRA's "
            f"magnitudes start, differ ({sites}; {_largest_difference(*told.values())}). Compare "
            "the files of the base and its precision there (sites.json), and use the same ones."
        )
    if len(told) < STARTERS:
        _log.warning(
            "DoRA's magnitudes start as %s tells them: with a single site nothing is compared",
            names[next(iter(told))],
        )
    run.started_by = sorted(told)
    return next(iter(told.values()))


def _largest_difference(one: Adapter, other: Adapter) -> str:
    """Describe where two starts differ most, relatively."""
    worst = {
        name: float((abs(values - other[name]) / values).max()) for name, values in one.items()
    }
    name = max(worst, key=worst.__getitem__)
    return f"most in {name.removeprefix('base_model.model.')}, by {100 * worst[name]:.2g} %"
