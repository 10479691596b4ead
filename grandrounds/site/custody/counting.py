"""What is counted of a request: before anything is done for it, and when its visit begins."""

from __future__ import annotations

from flwr.app import MessageType, RecordDict

from grandrounds.config.keys import Config
from grandrounds.site.custody import kept_runs, order, quota, replay
from grandrounds.site.custody.request import Request
from grandrounds.site.visit import Chosen


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
) -> Chosen | None:
    """Count a visit, also if it fails afterwards, and return the examples that it trains on.

    Parameters
    ----------
    kept
        What the site keeps of the run.
    sizes
        Training examples of the site, and examples of the visit.

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
    with state.lasting():
        quota.check_run(site, state, run)
        quota.check_visits(site, state)
        quota.count_visit(state, run, request.round)
        kept_runs.note_visit(state, run, config)
        start = replay.reserve(request, digest, *sizes) if trains else None
    return order.choose(state, start, kept, sizes) if start else None
