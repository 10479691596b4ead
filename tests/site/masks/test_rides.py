"""What rides on a round is refused where it would be refused alone, and gives no second sum."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from grandrounds.errors import PolicyError, ReplyError
from grandrounds.server.masks.masked_sum import MaskedSum
from grandrounds.site.custody.kept_masks import CustodyStore
from grandrounds.site.custody.state import SiteState
from grandrounds.site.masks.held import NO_ATTEMPT, Kept, begun, kept_of, summed
from grandrounds.wire.masks import keys, packed
from grandrounds.wire.masks.agreement import keys_text
from grandrounds.wire.masks.attempt import Attempt, given_up, threshold
from tests.masking import (
    RECEIVED,
    Rounds,
    after_masked,
    attempt_at,
    end_of,
    identity,
    roster_of_sites,
)


def ridden(count: int = 5) -> tuple[Rounds, Rounds]:
    """Return a cohort before `unmask`, and the same in the next round, whose keys are in."""
    now = after_masked(count)
    now.confirm(range(count))
    following = Rounds(count)
    following.ends = now.ends
    following.begin(attempt_at(count, round_number=2))
    following.keys()
    return now, following


def test_a_round_and_what_rides_on_it_are_two_exact_sums() -> None:
    now, following = ridden()
    assert (now.unmask([0, 1, 2, 3, 4]) == now.plain(range(5))).all()
    following.shares()
    following.masked([0, 1, 2, 3])
    following.confirm([0, 1, 2, 3])
    assert (following.unmask([0, 1, 2, 3]) == following.plain([0, 1, 2, 3])).all()


@pytest.mark.parametrize("earlier", [{"round_number": 1}, {"round_number": 2, "number": 1}])
def test_a_riding_key_replayed_from_another_round_or_attempt_is_refused(
    earlier: dict[str, int],
) -> None:
    now, following = ridden()
    known = packed.key_list(following.server.key_list())
    replayed = now.ends[1].keys if earlier["round_number"] == 1 else end_of(1, 5).keys
    known[1] = packed.signed_keys(replayed(attempt_at(5, **earlier)))
    with pytest.raises(PolicyError, match="'site-1' are not signed by its agent key for this"):
        now.ends[0].shares(following.attempt, packed.pack_key_list(known))
    assert (now.unmask(range(5)) == now.plain(range(5))).all()


def test_shares_that_rode_for_another_cohort_do_not_open() -> None:
    """The server tells one site of a cohort of four, and the others of the whole one."""
    _, following = ridden()
    whole = following.server.key_list()
    known = packed.key_list(whole)
    fewer = packed.pack_key_list({site: known[site] for site in (0, 1, 2, 3)})
    following.server.take_shares(1, following.ends[1].shares(following.attempt, whole))
    for site in (2, 3, 4):
        following.server.take_shares(site, following.ends[site].shares(following.attempt, whole))
    following.ends[0].shares(following.attempt, fewer)
    boxes = following.server.boxes(0)
    of_cohort = packed.boxes(boxes)
    with pytest.raises(PolicyError, match="'site-4', which is this site or not in the list"):
        following.ends[0].received(following.attempt, boxes, RECEIVED)
    del of_cohort[4]
    with pytest.raises(PolicyError, match="The box of 'site-1' does not open"):
        following.ends[0].received(following.attempt, packed.pack_boxes(of_cohort), RECEIVED)
    with pytest.raises(PolicyError, match="has answered the exchange 'shares'"):
        following.ends[0].shares(following.attempt, whole)


def test_boxes_of_this_round_do_not_open_in_the_next() -> None:
    now, following = ridden()
    now.unmask(range(5))
    following.shares()
    with pytest.raises(PolicyError, match="The box of 'site-1' does not open"):
        now.ends[0].received(following.attempt, now.server.boxes(0), RECEIVED)


def test_a_server_that_says_that_the_ride_failed_gets_no_second_sum() -> None:
    """Whichever attempt at a round a site answers for, it has erased the other one."""
    now, following = ridden()
    now.unmask(range(5))
    following.shares()
    following.masked()
    following.confirm(range(5))
    signed = following.server.signatures()
    end = following.ends[0]
    end.keys(attempt_at(5, round_number=2, number=1))
    with pytest.raises(PolicyError, match="has no keys for attempt 0 at round 2"):
        end.unmask(following.attempt, signed)
    for other in (1, 2, 3, 4):
        following.ends[other].unmask(following.attempt, signed)
        with pytest.raises(PolicyError, match="has answered for one sum of round 2"):
            following.ends[other].keys(attempt_at(5, round_number=2, number=1))


def test_this_round_may_be_tried_again_before_its_sum_and_the_ride_stays() -> None:
    now, following = ridden()
    first, signed = now.attempt, now.server.signatures()
    rode = following.ends[0].keys(following.attempt)
    now.begin(attempt_at(5, number=1))
    assert (now.play() == now.plain(range(5))).all()
    with pytest.raises(PolicyError, match="has no keys for attempt 0 at round 1"):
        now.ends[0].unmask(first, signed)
    assert following.ends[0].keys(following.attempt) == rode
    following.shares()
    following.masked()
    following.confirm(range(5))
    assert (following.unmask(range(5)) == following.plain(range(5))).all()


def test_signatures_over_survivors_of_one_attempt_are_of_no_use_in_another() -> None:
    """Two sets of survivors, one in each of two attempts: nobody opens the second for the first."""
    now = after_masked(5)
    all_five = packed.pack_sites(range(5))
    before = {site: now.ends[site].confirm(now.attempt, all_five) for site in range(5)}
    now.begin(attempt_at(5, number=1))
    now.keys()
    now.shares()
    now.masked()
    four = packed.pack_sites(range(4))
    for site in range(4):
        now.ends[site].confirm(now.attempt, four)
    with pytest.raises(PolicyError, match="'site-0' has not signed the survivors that this site"):
        now.ends[0].unmask(now.attempt, packed.pack_signatures({s: before[s] for s in range(4)}))


def test_a_round_is_over_once_a_later_ones_sum_was_answered() -> None:
    now, following = ridden()
    following.shares()
    following.masked()
    following.confirm(range(5))
    following.unmask(range(5))
    with pytest.raises(PolicyError, match="has answered for a sum of round 2 already"):
        now.ends[0].unmask(now.attempt, now.server.signatures())
    with pytest.raises(PolicyError, match="has answered for one sum of round 1"):
        now.ends[0].keys(attempt_at(5, number=1))


def test_two_rounds_are_open_at_a_time_and_their_attempts_only_go_on() -> None:
    def at(round_number: int, number: int) -> Attempt:
        return attempt_at(4, round_number=round_number, number=number)

    kept = None
    for one in ((1, 0), (2, 0), (1, 1), (1, 3), (2, 1)):
        kept = begun(kept, at(*one))
    assert kept == Kept(at(1, 0).roster, round=2, number=1, before=3)
    assert kept_of(kept.packed()) == kept
    for over in ((1, 0), (1, 3), (2, 0), (2, 1)):
        with pytest.raises(PolicyError, match="is over: this site was asked"):
            begun(kept, at(*over))
    for old in ((1, 2), (2, 0), (3, 0)):
        with pytest.raises(PolicyError, match="a later one has begun"):
            summed(kept, at(*old))
    assert summed(kept, at(1, 3)).summed == 1
    later = begun(kept, at(3, 0))
    assert (later.round, later.number, later.before) == (3, 0, 1)
    with pytest.raises(PolicyError, match="is over"):
        begun(later, at(1, 4))
    assert begun(kept, at(9, 0)).before == NO_ATTEMPT


def test_what_rides_is_on_disk_before_it_leaves_and_what_was_summed_stays_until_it_is_old(
    tmp_path: Path,
) -> None:
    """A site is started again after each answer; it keeps the two rounds before the newest one."""
    now, following = Rounds(4), Rounds(4)
    following.begin(attempt_at(4, round_number=2))
    folder = tmp_path / "state"

    for rounds in (now, following):
        rounds.ends = {**now.ends}

    def with_disk(step: str, rounds: Rounds, *args: object) -> object:
        with closing(SiteState(folder)) as state:
            now.ends[0] = following.ends[0] = replace(end_of(0, 4), store=CustodyStore(state))
            return getattr(rounds, step)(*args)

    for step, *args in (("keys",), ("shares",), ("masked",), ("confirm", range(4))):
        with_disk(step, now, *args)
    with_disk("keys", following)
    assert (with_disk("unmask", now, range(4)) == now.plain(range(4))).all()  # type: ignore[attr-defined]
    for step, *args in (("shares",), ("masked",), ("confirm", range(4))):
        with_disk(step, following, *args)
    with closing(SiteState(folder)) as state:
        end = replace(end_of(0, 4), store=CustodyStore(state))
        end.keys(attempt_at(4, round_number=3))
        assert end.store.vector(now.attempt) is not None
        assert end.unmask(now.attempt, now.server.signatures())
        end.unmask(following.attempt, following.server.signatures())
        end.keys(attempt_at(4, round_number=4))
        assert end.store.read(now.attempt) is None
        assert end.store.vector(following.attempt) is not None


def test_the_server_takes_no_keys_that_no_other_site_could_use() -> None:
    attempt = attempt_at(4)
    server = MaskedSum(attempt, roster_of_sites(4))
    server.take_keys(0, known := end_of(0, 4).keys(attempt))
    theirs, fresh = packed.signed_keys(known).box, keys.public_of(keys.new_secret())

    def signed(box: bytes, mask: bytes) -> bytes:
        text = keys_text(attempt, 1, box, mask)
        return packed.SignedKeys(box, mask, keys.sign(identity(1), text)).packed()

    for box, mask in ((fresh, fresh), (theirs, fresh), (fresh, theirs)):
        with pytest.raises(ReplyError, match="the same key twice, or that of another"):
            server.take_keys(1, signed(box, mask))
    with pytest.raises(ReplyError, match="of low order"):
        server.take_keys(1, signed(fresh, bytes(32)))
    server.take_keys(0, known)
    assert server.listed == [0]


def test_part_of_a_cohort_cannot_be_led_to_a_second_sum_of_the_same_round() -> None:
    """Fourteen of twenty can open a sum; the other six are asked for one among themselves.

    Without the refusal both sums would have the vectors of the six. With thirteen gone on, seven
    are left and six may do both: one less than the fourteen that open the earlier sum.
    """
    now = after_masked(20)
    now.begin(attempt_at(20, number=1))
    few = now.keys(range(12))
    with pytest.raises(PolicyError, match="of 20 sites, of which the list of keys has 12: with fe"):
        now.ends[0].shares(now.attempt, few)
    now.begin(attempt_at(20, number=2))  # it is not forgotten over another attempt
    few = now.keys(range(12))
    with pytest.raises(PolicyError, match="would be a second one"):
        now.ends[0].shares(now.attempt, few)
    now.keys(range(13))
    now.shares(range(13))


def test_an_attempt_that_is_given_up_has_no_sum_left_whoever_colludes() -> None:
    for count in range(3, 257):
        colluding = max(some for some in range(count) if 3 * some < count)
        assert (count - given_up(count)) + colluding < threshold(count)
        assert given_up(count) <= threshold(count)
