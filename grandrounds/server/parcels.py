"""What a round's sites are sent: parcels with the adapter, and the messages that carry them."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message

from grandrounds.server.run import Run
from grandrounds.wire.downlink import Parcel

NOT_THERE = "not connected"


def parcels_for(run: Run, number: int, cohort: Iterable[int], *, trains: bool) -> dict[int, Parcel]:
    """Return the parcels that give the adapter to the connected sites of a cohort."""
    there, rounds = [p for p in cohort if p in run.roster.cards], number - trains
    return {
        p: run.beside(run.sender.parcel(number, p, run.state.adapter, trains=trains), p, rounds)
        for p in there
    }


def addressed(run: Run, kind: str, number: int, parcels: dict[int, Parcel]) -> dict[int, Message]:
    """Return the messages that carry parcels to sites that only evaluate."""
    cards = run.roster.cards
    return {
        p: run.exchange.message(cards[p].node_id, kind, number, parcel, cards[p].arithmetic)
        for p, parcel in parcels.items()
    }


def continues_at(run: Run, site: int) -> dict[str, int]:
    """Return the example at which a site continues; empty for one that keeps its own cursor."""
    known = run.state.cursors
    return (
        {}
        if run.roster.cards[site].in_custody and site not in known
        else {"cursor": known.get(site, 0)}
    )


def after_the_last_round(run: Run, kind: str) -> dict[int, Message]:
    """Return the messages that carry the last adapter, exactly, to all connected sites."""
    number, parcel = run.state.round, run.sender.exact(run.state.adapter)
    return {
        p: run.exchange.message(
            card.node_id,
            kind,
            number,
            run.beside(parcel, p, number),
            {**continues_at(run, p), **card.arithmetic},
        )
        for p, card in sorted(run.roster.cards.items())
    }
