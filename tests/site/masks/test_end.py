"""Every act of a hostile server against a site's end is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import RecordDict

from grandrounds.errors import GrandRoundsError, PolicyError, ReplyError
from grandrounds.site.masks.held import RehearsalStore
from grandrounds.wire.masks import keys, packed
from grandrounds.wire.masks.agreement import keys_text
from grandrounds.wire.masks.attempt import MOST_ATTEMPTS, Attempt
from grandrounds.wire.masks.packed import SignedKeys
from grandrounds.wire.masks.roster import Roster
from tests.masking import (
    RECEIVED,
    Rounds,
    after_masked,
    attempt_at,
    end_of,
    identity,
    roster_of_sites,
)


def listed(count: int = 4) -> tuple[Rounds, dict[int, SignedKeys]]:
    """Return a cohort whose sites have sent their keys, and these keys."""
    rounds = Rounds(count)
    return rounds, packed.key_list(rounds.keys())


def ask_shares(rounds: Rounds, keys_of: dict[int, SignedKeys]) -> bytes:
    return rounds.ends[0].shares(rounds.attempt, packed.pack_key_list(keys_of))


def forged(attempt: Attempt, site: int, signer: int) -> SignedKeys:
    """Return fresh keys for a site, signed by some agent key."""
    box, mask = keys.public_of(keys.new_secret()), keys.public_of(keys.new_secret())
    return SignedKeys(box, mask, keys.sign(identity(signer), keys_text(attempt, site, box, mask)))


# --- Keys -----------------------------------------------------------------------------------------


def test_keys_are_pinned() -> None:
    """A server's own key in the place of a site's, whoever has signed it, is refused."""
    for signer in (99, 1, 3):
        rounds, known = listed()
        known[2] = forged(rounds.attempt, 2, signer)
        with pytest.raises(PolicyError, match="'site-2' are not signed by its agent key"):
            ask_shares(rounds, known)


def test_a_stranger_to_the_roster_is_refused() -> None:
    rounds, known = listed()
    known[7] = forged(rounds.attempt, 7, 7)
    with pytest.raises(PolicyError, match="Site 7 is not in the roster"):
        ask_shares(rounds, known)


def test_the_keys_of_a_site_as_those_of_another_are_refused() -> None:
    rounds, known = listed()
    known[2] = known[1]
    with pytest.raises(PolicyError, match="the same key twice"):
        ask_shares(rounds, known)
    del known[1]
    with pytest.raises(PolicyError, match="'site-2' are not signed"):
        ask_shares(rounds, known)


def test_a_site_that_signs_the_same_key_twice_is_refused() -> None:
    rounds, known = listed()
    same = known[1].box
    text = keys_text(rounds.attempt, 2, same, same)
    known[2] = SignedKeys(same, same, keys.sign(identity(2), text))
    with pytest.raises(PolicyError, match="the same key twice"):
        ask_shares(rounds, known)


@pytest.mark.parametrize("earlier", [{"round_number": 2}, {"number": 1}, {"run": "cd"}])
def test_signed_keys_of_another_attempt_are_refused(earlier: dict[str, int]) -> None:
    rounds, known = listed()
    other = end_of(1, 4).keys(attempt_at(4, **earlier))  # type: ignore[arg-type]
    known[1] = packed.signed_keys(other)
    with pytest.raises(PolicyError, match="'site-1' are not signed by its agent key for this"):
        ask_shares(rounds, known)


def test_a_list_without_the_sites_own_keys_is_refused() -> None:
    rounds, known = listed()
    del known[0]
    with pytest.raises(PolicyError, match="does not have the keys that this site has sent"):
        ask_shares(rounds, known)
    rounds, known = listed()
    known[0] = forged(rounds.attempt, 0, 0)  # validly signed, but of no attempt of this end
    with pytest.raises(PolicyError, match="does not have the keys that this site has sent"):
        ask_shares(rounds, known)


@pytest.mark.parametrize(("count", "min_cohort"), [(2, 3), (4, 5)])
def test_a_cohort_below_min_cohort_is_refused(count: int, min_cohort: int) -> None:
    rounds, known = listed(5)
    rounds.ends[0] = replace(rounds.ends[0], min_cohort=min_cohort)
    with pytest.raises(PolicyError, match=rf"has {count} sites; .* at least {min_cohort}"):
        ask_shares(rounds, {site: known[site] for site in range(count)})


def test_threshold_is_ours() -> None:
    """No message carries a threshold: one more number is refused, and too few shares tell nothing.

    Four sites have t = 3; after one of them is lost, two signatures are too few.
    """
    rounds, known = listed()
    with pytest.raises(ReplyError, match="bytes, not"):
        rounds.ends[0].shares(rounds.attempt, packed.pack_key_list(known) + b"\0\1")
    rounds = after_masked(4)
    survivors = rounds.server.survivors()
    signed = {site: rounds.ends[site].confirm(rounds.attempt, survivors) for site in range(4)}
    two = packed.pack_signatures({site: signed[site] for site in (1, 2)})
    with pytest.raises(PolicyError, match=r"Only 2 sites have signed .* needs 3"):
        rounds.ends[0].unmask(rounds.attempt, two)


def test_a_site_that_the_roster_does_not_have_takes_no_part() -> None:
    for roster in (
        roster_of_sites(3),
        replace(
            roster_of_sites(5),
            members={**roster_of_sites(5).members, 4: roster_of_sites(5).members[1]},
        ),
    ):
        end = replace(end_of(4, 5), roster=roster)
        with pytest.raises(PolicyError, match="does not list its agent key as site 4"):
            end.attempt("ab", 1, 0)


def test_a_run_keeps_to_its_first_roster() -> None:
    end = end_of(0, 4)
    end.keys(end.attempt("ab", 1, 0))
    changed = Roster("rounds", 2, roster_of_sites(4).members)
    other = replace(end, roster=changed)
    with pytest.raises(PolicyError, match="The roster has changed since this run began"):
        other.keys(other.attempt("ab", 1, 1))
    with pytest.raises(PolicyError, match="has no keys for attempt 0"):
        other.shares(other.attempt("ab", 1, 0), b"")


# --- Shares and masked vectors --------------------------------------------------------------------


def ready(count: int = 5) -> tuple[Rounds, dict[int, bytes]]:
    """Return a cohort whose sites have sent shares, and the boxes for the first one."""
    rounds = Rounds(count)
    rounds.keys()
    rounds.shares()
    return rounds, packed.boxes(rounds.server.boxes(0))


def ask_masked(rounds: Rounds, boxes: dict[int, bytes]) -> bytes | None:
    return rounds.ends[0].received(rounds.attempt, packed.pack_boxes(boxes), RECEIVED)


def test_a_share_changed_on_its_way_is_refused_before_the_site_trains() -> None:
    for place in (0, 40, -1):
        rounds, boxes = ready()
        changed = bytearray(boxes[3])
        changed[place] ^= 1
        with pytest.raises(PolicyError, match="The box of 'site-3' does not open"):
            ask_masked(rounds, {**boxes, 3: bytes(changed)})


def test_a_box_for_another_site_or_from_another_one_is_refused() -> None:
    rounds, boxes = ready()
    for wrong in (packed.boxes(rounds.server.boxes(1))[3], boxes[2]):
        with pytest.raises(PolicyError, match="The box of 'site-3' does not open"):
            ask_masked(rounds, {**boxes, 3: wrong})


def test_boxes_of_strangers_and_of_the_site_itself_are_refused() -> None:
    rounds, boxes = ready()
    for site in (0, 9):
        with pytest.raises(PolicyError, match="which is this site or not in the list of keys"):
            ask_masked(rounds, {**boxes, site: boxes[1]})


def test_boxes_of_too_few_are_refused() -> None:
    """Of five sites four must have sent shares."""
    rounds, boxes = ready()
    with pytest.raises(PolicyError, match=r"has 3 sites; .* at least 4"):
        ask_masked(rounds, {site: boxes[site] for site in (1, 2)})


def test_the_same_round_asked_to_mask_again_gives_nothing_new() -> None:
    """Two vectors under the same masks would differ by two changes of the site."""
    rounds, boxes = ready()
    end, request = rounds.ends[0], packed.pack_boxes(boxes)
    end.masked(rounds.attempt, request, RECEIVED, rounds.vectors[0].copy())
    fewer = packed.pack_boxes({site: boxes[site] for site in (1, 2, 3)})
    for again, received in ((fewer, RECEIVED), (request, bytes(32))):
        with pytest.raises(PolicyError, match="has answered the exchange 'masked'"):
            end.masked(rounds.attempt, again, received, rounds.vectors[0].copy())
    with pytest.raises(PolicyError, match="no longer kept"):
        end.masked(rounds.attempt, request, RECEIVED, rounds.vectors[0].copy())


def test_another_adapter_to_one_site_leaves_noise_and_no_site_opens_it() -> None:
    rounds, _ = ready(4)
    for site in range(4):
        other = bytes(32) if site == 2 else RECEIVED
        vector = np.frombuffer(rounds.vector(site, other), np.uint8)
        rounds.server.take_masked(site, vector)
    survivors = rounds.server.survivors()
    signed = {site: rounds.ends[site].confirm(rounds.attempt, survivors) for site in range(4)}
    with pytest.raises(PolicyError, match="'site-2' has not signed the survivors"):
        rounds.ends[0].unmask(rounds.attempt, packed.pack_signatures(signed))
    # Even a server that had every secret of its own masks would not have the sum.
    total = rounds.plain([])
    for site, end in rounds.ends.items():
        sent = end.store.read(rounds.attempt)
        assert sent is not None
        assert sent.seed == sent.mask_secret == sent.box_secret == b""
        total = total + rounds.vectors[site]
    assert (rounds.server._total != total).mean() > 0.99


# --- Survivors ------------------------------------------------------------------------------------


def test_survivors_of_one_or_of_too_few_are_refused() -> None:
    for few in ([0], [0, 1], [0, 1, 2]):
        rounds = after_masked(5)
        with pytest.raises(PolicyError, match="this site takes part in sums of at least 4"):
            rounds.ends[0].confirm(rounds.attempt, packed.pack_sites(few))


def test_survivors_below_min_cohort_are_refused() -> None:
    rounds = after_masked(5)
    end = replace(rounds.ends[0], min_cohort=5)
    with pytest.raises(PolicyError, match=r"has 4 sites; .* at least 5 "):
        end.confirm(rounds.attempt, packed.pack_sites([0, 1, 2, 3]))


def test_survivors_without_the_site_or_with_strangers_are_refused() -> None:
    rounds = after_masked(5)
    with pytest.raises(PolicyError, match="do not include this site"):
        rounds.ends[0].confirm(rounds.attempt, packed.pack_sites([1, 2, 3, 4]))
    with pytest.raises(PolicyError, match="include site 9, whose shares"):
        rounds.ends[0].confirm(rounds.attempt, packed.pack_sites([0, 1, 2, 9]))


def test_a_second_set_of_survivors_is_refused() -> None:
    rounds = after_masked(5)
    rounds.ends[0].confirm(rounds.attempt, packed.pack_sites([0, 1, 2, 3, 4]))
    with pytest.raises(PolicyError, match="has answered the exchange 'confirm'"):
        rounds.ends[0].confirm(rounds.attempt, packed.pack_sites([0, 1, 2, 3]))


def confirmed(rounds: Rounds, survivors: list[int]) -> dict[int, bytes]:
    request = packed.pack_sites(survivors)
    return {site: rounds.ends[site].confirm(rounds.attempt, request) for site in survivors}


def ask_unmask(rounds: Rounds, signed: dict[int, bytes]) -> bytes:
    return rounds.ends[0].unmask(rounds.attempt, packed.pack_signatures(signed))


def test_another_sites_signature_over_another_set_is_refused() -> None:
    rounds = after_masked(5)
    signed = confirmed(rounds, [0, 1, 2, 3])
    all_five = packed.pack_sites(range(5))
    signed[1] = after_masked(5).ends[1].confirm(rounds.attempt, all_five)
    with pytest.raises(PolicyError, match="'site-1' has not signed the survivors"):
        ask_unmask(rounds, signed)


def test_a_signature_of_a_lost_site_or_in_anothers_name_is_refused() -> None:
    rounds = after_masked(5)
    signed = confirmed(rounds, [0, 1, 2, 3])
    with pytest.raises(PolicyError, match="'site-4' has signed, but is no survivor"):
        ask_unmask(rounds, {**signed, 4: signed[3]})
    with pytest.raises(PolicyError, match="'site-2' has not signed"):
        ask_unmask(rounds, {**signed, 2: signed[3]})


def test_never_both_shares() -> None:
    """Of each site one share only, and the other one cannot be had in any later exchange."""
    rounds = after_masked(5)
    held = rounds.ends[0].store.read(rounds.attempt)
    assert held is not None
    signed = confirmed(rounds, [0, 1, 2, 3])
    opened = packed.opened(ask_unmask(rounds, signed), range(5))
    for site, share in opened.items():
        seed, mask = held.shares[site][:33], held.shares[site][33:]
        assert share == (seed if site < 4 else mask)
        assert share != (mask if site < 4 else seed)
    after = rounds.ends[0].store.read(rounds.attempt)
    assert after is not None
    assert after.shares == {}
    with pytest.raises(PolicyError, match="has answered the exchange 'unmask'"):
        ask_unmask(rounds, {site: signed[site] for site in (0, 1, 2)} | {3: bytes(96)})


def test_one_sum_a_round() -> None:
    rounds = after_masked(4)
    ask_unmask(rounds, confirmed(rounds, [0, 1, 2, 3]))
    with pytest.raises(PolicyError, match="has answered for one sum of round 1"):
        rounds.ends[0].keys(attempt_at(4, number=1))
    assert rounds.ends[0].keys(attempt_at(4, round_number=2))
    with pytest.raises(PolicyError, match="has answered for one sum of round 1"):
        rounds.ends[0].keys(attempt_at(4, number=2))


def test_an_attempt_is_over_once_a_later_one_has_begun() -> None:
    rounds = after_masked(4)
    rounds.ends[0].keys(attempt_at(4, number=1))
    with pytest.raises(PolicyError, match="has no keys for attempt 0"):
        rounds.ends[0].confirm(rounds.attempt, packed.pack_sites(range(4)))
    with pytest.raises(PolicyError, match="Attempt 0 at round 1 is over"):
        rounds.ends[0].keys(rounds.attempt)
    for number, round_number in ((-1, 1), (MOST_ATTEMPTS, 1), (0, 0)):
        with pytest.raises(PolicyError, match=f"Attempt {number} at round {round_number} is not"):
            rounds.ends[0].attempt("ab", round_number, number)


@pytest.mark.parametrize("skipped", ["shares", "masked", "confirm", "unmask"])
def test_an_exchange_out_of_turn_is_refused(skipped: str) -> None:
    rounds = Rounds(4)
    end = rounds.ends[0]
    if skipped != "shares":
        end.keys(rounds.attempt)
    asked: dict[str, Callable[[], object]] = {
        "shares": lambda: end.shares(rounds.attempt, b""),
        "masked": lambda: end.received(rounds.attempt, b"", RECEIVED),
        "confirm": lambda: end.confirm(rounds.attempt, b""),
        "unmask": lambda: end.unmask(rounds.attempt, b""),
    }
    with pytest.raises(PolicyError, match=r"does not follow 'keys'|has no keys"):
        asked[skipped]()


def test_the_same_request_gets_the_same_bytes() -> None:
    rounds = after_masked(4)
    end, attempt = rounds.ends[0], rounds.attempt
    signed = confirmed(rounds, [0, 1, 2, 3])
    first = ask_unmask(rounds, signed)
    assert ask_unmask(rounds, signed) == first
    assert confirmed(rounds, [0, 1, 2, 3]) == signed
    known = packed.key_list(rounds.server.key_list())
    assert end.keys(attempt) == known[0].packed()
    assert end.shares(attempt, rounds.server.key_list()) == rounds.server._dealt[0].packed()


# --- Messages that were changed -------------------------------------------------------------------


@pytest.mark.parametrize("times", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_changed_messages_are_refused_without_a_crash_and_nothing_grows(times: int) -> None:
    """Bytes changed, cut, doubled and swapped before each exchange; then the site goes on.

    Of three sites all must answer, so that no message other than the right one will do.
    """
    generator, state = np.random.default_rng(7), RecordDict()
    rounds = Rounds(3)
    rounds.ends[0] = replace(rounds.ends[0], store=RehearsalStore(state))

    def storm(exchange: str, request: bytes) -> None:
        before = dict(state.config_records["grandrounds-masks"])
        for _ in range(times // 4):
            if (changed := mutated(request, generator)) != request:
                assert is_refused(rounds, exchange, changed), changed.hex()
        assert dict(state.config_records["grandrounds-masks"]) == before

    storm("shares", rounds.keys())
    rounds.shares()
    storm("masked", rounds.server.boxes(0))
    storm("confirm", rounds.masked())
    storm("unmask", rounds.confirm(range(3)))
    assert (rounds.unmask(range(3)) == rounds.plain(range(3))).all()


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """Return a message with a byte changed, cut off, doubled or two of them swapped."""
    how, place = generator.integers(5), int(generator.integers(len(data)))
    out = bytearray(data)
    if how == 0:
        out[place] ^= 1 << int(generator.integers(8))
    elif how == 1:
        del out[place:]
    elif how == 2:
        out[place:place] = out[place:]
    elif how == 3:
        out = bytearray(generator.bytes(len(data)))
    else:
        other = int(generator.integers(len(data)))
        out[place], out[other] = out[other], out[place]
    return bytes(out)


def is_refused(rounds: Rounds, exchange: str, request: bytes) -> bool:
    end = rounds.ends[0]
    try:
        if exchange == "masked":
            end.received(rounds.attempt, request, RECEIVED)
        else:
            getattr(end, exchange)(rounds.attempt, request)
    except GrandRoundsError:
        return True
    return False
