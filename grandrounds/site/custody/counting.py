"""What is counted of a request: before anything is done for it, and when its visit begins."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import RecordDict

from grandrounds.config.keys import Config
from grandrounds.site.custody import budget, kept_runs, order, quota, replay
from grandrounds.site.custody.request import Request
from grandrounds.site.private.coins import Coins, KeyedCoins
from grandrounds.site.visit import Chosen, given_to_run


@dataclass(frozen=True)
class Begun:
    """A visit that was counted."""

    chosen: Chosen | None = None
    """Its examples."""
    coins: Coins | None = None
    """Secret coins of a private visit."""


def check_quota(request: Request) -> None:
    """Raise `PolicyError` if the site has reached a limit of 24 hours.

    A visit is counted when it begins, a roll call when it was answered. A visit whose reply may be
    cached needs no new one.
    """
    site, state, run = request.site, request.state, request.run
    quota.check_run(site, state, run)
    if not request.is_visit:
        quota.check_questions(site, state, run)
    elif not replay.may_have(request):
        quota.check_visits(site, state)


def begin(
    request: Request, config: Config, digest: str, kept: RecordDict, sizes: tuple[int, int]
) -> Begun:
    """Count a visit, also if it fails afterwards, and return what it trains on and with.

    A private visit is charged: when this returns, the charge is on disk.

    Parameters
    ----------
    kept
        What the site keeps of the run.
    sizes
        Training examples of the site, and examples of the visit.

    Raises
    ------
    PolicyError
        If a limit was reached meanwhile, the budget is spent, or the state folder is full.
    """
    site, state, run = request.site, request.state, request.run
    if not request.is_visit:
        return Begun()
    kept_runs.check_room(state)
    trains, key, start = request.trains, b"", None
    with state.lasting():
        quota.check_run(site, state, run)
        quota.check_visits(site, state)
        quota.count_visit(state, run, request.round)
        kept_runs.note_visit(state, run, config)
        if trains and request.mechanism:
            visit = budget.Visiting(run, digest, request.round, request.mechanism)
            key = budget.charge(site, state, visit)
        elif trains or request.personalises:
            start = replay.reserve(request, digest, *sizes)
    if key:
        budget.note_sequence(site, state)
        # Cursor and seed of the run play no part: each step draws its units by these coins.
        return Begun(Chosen((), given_to_run(kept), 0), KeyedCoins(key))
    return Begun(order.choose(state, start, kept, sizes)) if start else Begun()
