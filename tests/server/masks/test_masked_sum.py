"""A masked sum is that of the plain vectors bit for bit, whoever stops answering and where."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grandrounds.errors import ReplyError, RoundError
from grandrounds.wire.masks import keys, packed
from grandrounds.wire.masks.attempt import EXCHANGES, threshold
from grandrounds.wire.masks.fixed_point import BITS
from tests.masking import Rounds, after_masked, attempt_at, chi_square_of

PLACES = ("shares", "masked", "confirm", "unmask")
"""Exchanges from which on a site may not answer; those without shares count nowhere."""


@pytest.fixture(autouse=True)
def _verify_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify each signature once only, not once at every site of a cohort."""
    verify, known = keys.is_signed, dict[tuple[int, bytes, bytes], bool]()

    def is_signed(public: keys.Public, text: bytes, signature: bytes) -> bool:
        which = (id(public), text, signature)  # rosters are kept for all tests
        if which not in known:
            known[which] = verify(public, text, signature)
        return known[which]

    monkeypatch.setattr(keys, "is_signed", is_signed)


def expected(rounds: Rounds, lost: dict[str, list[int]]) -> np.ndarray:
    gone = {site for place in ("shares", "masked") for site in lost.get(place, [])}
    return rounds.plain([site for site in rounds.ends if site not in gone])


@pytest.mark.parametrize("codec", BITS)
@pytest.mark.parametrize("count", [3, 4, 5, 20])
def test_the_sum_is_that_of_the_plain_vectors(count: int, codec: str) -> None:
    rounds = Rounds(count, codec=codec)
    assert (rounds.play() == rounds.plain(range(count))).all()


@pytest.mark.parametrize("count", [4, 5])
def test_the_sum_is_exact_for_every_pattern_of_lost_sites(count: int) -> None:
    spare = count - threshold(count)
    for gone in itertools.combinations(range(count), spare):
        for places in itertools.product(PLACES, repeat=spare):
            rounds = Rounds(count, values=3)
            lost = {
                place: [s for s, p in zip(gone, places, strict=True) if p == place]
                for place in PLACES
            }
            assert (rounds.play(lost) == expected(rounds, lost)).all(), lost


@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_the_sum_of_20_is_exact_whichever_up_to_6_are_lost(data: st.DataObject) -> None:
    check_lost(20, data)


def check_lost(count: int, data: st.DataObject) -> None:
    """Play a cohort in which a drawn set of sites stops answering, each at a drawn exchange."""
    spare = count - threshold(count)
    gone = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=spare))
    lost: dict[str, list[int]] = {place: [] for place in PLACES}
    for site in gone:
        lost[data.draw(st.sampled_from(PLACES))].append(site)
    rounds = Rounds(count, values=3)
    assert (rounds.play(lost) == expected(rounds, lost)).all()


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=1, deadline=None)
def test_the_sum_of_100_is_exact_whichever_up_to_33_are_lost(data: st.DataObject) -> None:
    check_lost(100, data)


def test_sites_without_keys_make_the_cohort_smaller() -> None:
    rounds = Rounds(5)
    assert (rounds.play({"keys": [1]}) == rounds.plain([0, 2, 3, 4])).all()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_round_with_too_few_sites_is_lost_and_says_at_which_exchange(exchange: str) -> None:
    what = {
        "keys": "2 sites sent their keys",
        "shares": "2 sites sent their shares",
        "masked": "2 sites sent their masked vectors",
        "confirm": "2 sites sent their confirmations",
        "unmask": "2 sites sent their opened shares",
    }
    with pytest.raises(RoundError, match=what[exchange]):
        Rounds(4).play({exchange: [1, 3]})


def test_three_sites_survive_no_loss() -> None:
    with pytest.raises(RoundError, match="needs 3"):
        Rounds(3).play({"masked": [2]})


def test_a_lost_attempt_is_made_again_with_fresh_keys() -> None:
    rounds = Rounds(4)
    first = rounds.keys()
    rounds.begin(attempt_at(4, number=1))
    assert (rounds.play() == rounds.plain(range(4))).all()
    assert rounds.server.key_list() != first


# --- Sites that send something else ---------------------------------------------------------------


def test_keys_that_nobody_of_the_roster_has_signed_are_refused() -> None:
    rounds = Rounds(4)
    theirs = rounds.ends[1].keys(rounds.attempt)
    for site in (0, 9):
        with pytest.raises(ReplyError, match="not signed by the agent key"):
            rounds.server.take_keys(site, theirs)


def test_a_signature_over_other_survivors_is_refused() -> None:
    rounds = after_masked(4)
    fewer = packed.pack_sites([0, 1, 2])
    with pytest.raises(ReplyError, match="has not signed the survivors"):
        rounds.server.take_signature(0, rounds.ends[0].confirm(rounds.attempt, fewer))


def test_a_vector_of_another_length_is_refused() -> None:
    rounds = after_masked(4)
    with pytest.raises(ReplyError, match="bytes, not"):
        rounds.server.take_masked(0, np.zeros(4, np.uint8))


@pytest.mark.parametrize("lost", [{}, {"masked": [3]}])
def test_a_false_share_is_found_and_the_sum_is_not_used(lost: dict[str, list[int]]) -> None:
    """Of four sites any three open shares; one share of one site is changed by its teller."""
    rounds = Rounds(4)
    take = rounds.server.take_opened

    def changed(site: int, reply: bytes) -> None:
        take(site, reply[:-1] + bytes([reply[-1] ^ 1]) if site == 0 else reply)

    rounds.server.take_opened = changed  # type: ignore[method-assign]
    with pytest.raises(RoundError, match="'site-3' are not those of its secret"):
        rounds.play(lost)


# --- What the server sees before the sum ----------------------------------------------------------


@pytest.mark.parametrize("codec", BITS)
def test_masked_vectors_are_uniform_and_do_not_resemble_the_plain_ones(codec: str) -> None:
    rounds = Rounds(3, values=100_000, codec=codec)
    rounds.keys()
    rounds.shares()
    signed = f"<i{rounds.server.numbers.dtype.itemsize}"
    for site in rounds.ends:
        plain, masked = rounds.vectors[site], rounds.vector(site)
        assert abs(chi_square_of(masked)) < 5 < abs(chi_square_of(plain.tobytes()))
        seen = np.frombuffer(masked, signed).astype(np.float64)
        meant = plain.view(signed).astype(np.float64)
        assert abs(np.corrcoef(seen, meant)[0, 1]) < 4 / math.sqrt(len(meant))


def test_all_sites_but_one_and_the_server_together_see_the_last_one() -> None:
    """What masks cannot do: two of three who share their vectors subtract them from the sum."""
    rounds = Rounds(3)
    total = rounds.play()
    assert (total - rounds.plain([0, 1]) == rounds.vectors[2]).all()


def test_the_sum_stays_masked_without_the_shares() -> None:
    rounds = after_masked(4)
    rounds.confirm(range(4))
    with pytest.raises(RoundError, match="0 sites sent their opened shares"):
        rounds.server.total()
