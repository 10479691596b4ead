"""A site's attempts at masked sums outlive its agent; secrets do not outlive their use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grandrounds.config import recipes
from grandrounds.errors import PolicyError
from grandrounds.site.custody import kept_runs
from grandrounds.site.custody.clock import DAY_SECONDS
from grandrounds.site.custody.kept_masks import UNTRAINED_DAYS, CustodyStore, tidy
from grandrounds.site.custody.state import REPLIES, SiteState
from grandrounds.site.masks.end import SiteEnd
from grandrounds.site.masks.held import Held
from grandrounds.wire.masks import packed
from grandrounds.wire.masks.attempt import EXCHANGES
from tests.masking import RECEIVED, Rounds, attempt_at, end_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def restarted(folder: Path) -> Iterator[SiteEnd]:
    """Yield the first of four sites, as it is after its agent has been started again."""
    with closing(SiteState(folder)) as state:
        yield replace(end_of(0, 4), store=CustodyStore(state))


def each(folder: Path, ask: Callable[[SiteEnd], bytes]) -> bytes:
    """Ask a site once, restart it and ask the same; return the answer, which must be the same."""
    first, again = ([ask(end) for end in restarted(folder)] for _ in range(2))
    assert first == again
    return first[0]


Ask = Callable[[Path, Callable[[SiteEnd], bytes]], bytes]


def play(folder: Path, rounds: Rounds, ask: Ask = each) -> None:
    """Play all exchanges with a site that is restarted after each."""
    attempt, server = rounds.attempt, rounds.server
    others = (1, 2, 3)
    server.take_keys(0, ask(folder, lambda end: end.keys(attempt)))
    asked = {"shares": rounds.keys(others)}
    server.take_shares(0, ask(folder, lambda end: end.shares(attempt, asked["shares"])))
    rounds.shares(others)
    asked["masked"] = server.boxes(0)

    def mask(end: SiteEnd) -> bytes:
        known = end.received(attempt, asked["masked"], RECEIVED)
        vector = rounds.vectors[0].copy()
        return known or end.masked(attempt, asked["masked"], RECEIVED, vector)

    server.take_masked(0, np.frombuffer(ask(folder, mask), np.uint8))
    asked["confirm"] = rounds.masked(others)
    server.take_signature(0, ask(folder, lambda end: end.confirm(attempt, asked["confirm"])))
    asked["unmask"] = rounds.confirm(others)
    server.take_opened(0, ask(folder, lambda end: end.unmask(attempt, asked["unmask"])))
    assert (rounds.unmask(others) == rounds.plain(range(4))).all()


def test_a_restart_after_each_exchange_changes_no_byte(folder: Path) -> None:
    play(folder, Rounds(4))


def test_a_replay_over_a_restart_gives_no_second_sum(folder: Path) -> None:
    play(folder, Rounds(4))
    for end in restarted(folder):
        with pytest.raises(PolicyError, match="has answered for one sum of round 1"):
            end.keys(attempt_at(4, number=1))
        with pytest.raises(PolicyError, match="has answered the exchange 'confirm'"):
            end.confirm(attempt_at(4), packed.pack_sites([0, 1, 2]))


def test_a_run_that_was_forgotten_is_not_summed_again(folder: Path) -> None:
    play(folder, Rounds(4))
    with closing(SiteState(folder)) as state:
        assert list((folder / REPLIES).iterdir())
        kept_runs.forget(state, "ab")
        assert not list((folder / REPLIES).iterdir())
    for end in restarted(folder):
        for number in (0, 1):
            with pytest.raises(PolicyError, match="has answered for one sum of round 1"):
                end.keys(attempt_at(4, number=number))


def test_rounds_that_were_begun_are_over_once_a_run_was_forgotten(folder: Path) -> None:
    """The site no longer knows which vectors it has sent, and for which cohort."""
    with closing(SiteState(folder)) as state:
        end_of(0, 4, CustodyStore(state)).keys(attempt_at(4, round_number=2))
        assert kept_runs.forget(state, "ab")
        end = end_of(0, 4, CustodyStore(state))
        with pytest.raises(PolicyError, match="has answered for one sum of round 2, or forgotten"):
            end.keys(attempt_at(4, round_number=2, number=1))
        end.keys(attempt_at(4, round_number=3))


def held_at(folder: Path, round_number: int = 1) -> Held:
    attempt = attempt_at(4, round_number=round_number)
    [held] = [end.store.read(attempt) for end in restarted(folder)]
    assert held is not None
    return held


def stored(folder: Path) -> bytes:
    """Return every byte of a site's state."""
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_secrets_are_erased_once_nothing_needs_them(folder: Path) -> None:
    rounds = Rounds(4)
    for end in restarted(folder):
        end.keys(rounds.attempt)
    secrets = held_at(folder)
    own = [secrets.box_secret, secrets.mask_secret, secrets.seed]
    assert all(secret.hex().encode() in stored(folder) for secret in own)
    play(folder, rounds)
    assert not any(secret.hex().encode() in stored(folder) for secret in own)
    assert held_at(folder).shares == {}


class KilledError(Exception):
    """The agent's process ends here."""


def killed(*_: object) -> None:
    raise KilledError


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_killed_between_disk_and_answer_the_same_bytes_come_later(
    folder: Path, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk leaves the site, and nothing else: `erase` follows the transaction."""
    count = 1 + EXCHANGES.index(exchange)
    erase, calls = SiteState.erase, []

    def once(state: SiteState) -> None:
        calls.append(1)
        if len(calls) == count:
            raise KilledError
        erase(state)

    def again(where: Path, function: Callable[[SiteEnd], bytes]) -> bytes:
        try:
            return each(where, function)
        except KilledError:
            return each(where, function)

    monkeypatch.setattr(SiteState, "erase", once)
    play(folder, Rounds(4), again)
    assert len(calls) == 5


def test_killed_before_the_vector_is_on_disk_nothing_has_left_and_it_is_masked_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Rounds(4)
    for end in restarted(folder):
        rounds.server.take_keys(0, end.keys(rounds.attempt))
        listed = rounds.keys((1, 2, 3))
        rounds.server.take_shares(0, end.shares(rounds.attempt, listed))
        rounds.shares((1, 2, 3))
        boxes = rounds.server.boxes(0)
        with monkeypatch.context() as patched:
            patched.setattr("grandrounds.site.custody.kept_masks.Held.packed", killed)
            with pytest.raises(KilledError):
                end.masked(rounds.attempt, boxes, RECEIVED, rounds.vectors[0].copy())
    for end in restarted(folder):
        assert end.received(rounds.attempt, boxes, RECEIVED) is None
        vector = end.masked(rounds.attempt, boxes, RECEIVED, rounds.vectors[0].copy())
        rounds.server.take_masked(0, np.frombuffer(vector, np.uint8))


def test_the_round_before_is_kept_and_earlier_ones_are_not(folder: Path) -> None:
    for end in restarted(folder):
        first = [end.keys(attempt_at(4, round_number=number)) for number in (1, 2, 3)]
        assert [end.keys(attempt_at(4, round_number=number)) for number in (2, 3)] == first[1:]
        with pytest.raises(PolicyError, match="Attempt 0 at round 1 is over"):
            end.keys(attempt_at(4, round_number=1))
        end.keys(attempt_at(4, round_number=3, number=1))
        with pytest.raises(PolicyError, match="Attempt 0 at round 3 is over"):
            end.keys(attempt_at(4, round_number=3))


def test_attempts_of_a_run_that_never_trained_go_after_seven_days_and_their_secrets_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trained keeps its attempts; a round that was begun stays begun."""
    now = SiteState.now
    with closing(SiteState(folder)) as state:
        end = end_of(0, 4, CustodyStore(state))
        end.keys(attempt_at(4, run="cd"))
        kept_runs.note_visit(state, "cd", recipes.resolve({}))
        end.keys(attempt_at(4, round_number=2))
    secret = held_at(folder, round_number=2).box_secret.hex().encode()

    def attempts(days: float, another: str) -> list[str]:
        monkeypatch.setattr(SiteState, "now", lambda state: now(state) + days * DAY_SECONDS)
        with closing(SiteState(folder)) as state:
            end_of(0, 4, CustodyStore(state)).keys(attempt_at(4, run=another))
            rows = state.table.execute("select run from mask_attempts order by run").fetchall()
        return [row[0] for row in rows]

    assert attempts(UNTRAINED_DAYS - 0.1, "ef") == ["ab", "cd", "ef"]
    assert secret in stored(folder)
    assert attempts(UNTRAINED_DAYS + 0.1, "01") == ["01", "cd", "ef"]
    assert secret not in stored(folder)
    monkeypatch.setattr(SiteState, "now", lambda state: now(state) + 30 * DAY_SECONDS)
    with closing(SiteState(folder)) as state:
        tidy(state)
        assert state.count("select count(*) from mask_attempts where run <> 'cd'") == 0
    for end in restarted(folder):
        with pytest.raises(PolicyError, match="Attempt 0 at round 2 is over"):
            end.keys(attempt_at(4, round_number=2))
        end.keys(attempt_at(4, round_number=2, number=1))


def test_attempts_of_before_are_dated_when_the_state_is_taken_over(folder: Path) -> None:
    with closing(SiteState(folder)) as state:
        end_of(0, 4, CustodyStore(state)).keys(attempt_at(4))
        state.table.execute("alter table mask_attempts drop column at")
        state.table.execute("pragma user_version = 3")
    with closing(SiteState(folder)) as state:
        end_of(0, 4, CustodyStore(state)).keys(attempt_at(4, run="cd"))
        rows = state.table.execute("select run, at from mask_attempts order by run").fetchall()
        assert [row[0] for row in rows] == ["ab", "cd"]
        assert 0 <= state.now() - rows[0][1] < 60


def test_two_processes_cannot_both_answer(folder: Path) -> None:
    """The second one finds the exchange answered, and its own answer never leaves."""
    for end in restarted(folder):
        end.keys(attempt_at(4))
        held = end.store.read(attempt_at(4))
        assert held is not None
        end.store.replace(replace(held, stage="shares"), "keys")
        with pytest.raises(PolicyError, match="not at the exchange 'keys' any more"):
            end.store.replace(replace(held, stage="shares"), "keys", b"vector")
    assert not list((folder / REPLIES).iterdir())
