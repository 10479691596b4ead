"""The norm bound and the screens of direction and spread, by hand, and on a real round."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.server.aggregation.defence import cosines, norm, norm_bound, outlying, screen
from grandrounds.wire.adapter import Adapter
from tests.server.aggregation.adapters import plus, random_adapter


def of(*numbers: float) -> Adapter:
    """Return an update of two tensors."""
    return {
        "A": np.array([numbers[:1]], np.float32),
        "B": np.array([numbers[1:]], np.float32),
    }


def test_an_update_longer_than_the_bound_is_scaled_down_to_it() -> None:
    """(3, 0, 4) has norm 5; a bound of 2.5 halves it."""
    bounded, length = norm_bound(of(3, 0, 4), 2.5)
    assert length == 5.0
    assert bounded["A"].tolist() == [[1.5]]
    assert bounded["B"].tolist() == [[0.0, 2.0]]
    assert bounded["A"].dtype == np.float32


@pytest.mark.parametrize("bound", [5.0, 7.0])
def test_an_update_within_the_bound_is_left_as_it_is(bound: float) -> None:
    update = of(3, 0, 4)
    bounded, length = norm_bound(update, bound)
    assert length == 5.0
    assert bounded is update


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_is_not_above_zero_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        norm_bound(of(1, 2), bound)


def test_a_zero_update_and_a_huge_one_have_norms_too() -> None:
    assert norm_bound(of(0, 0), 1.0)[1] == 0.0
    bounded, length = norm_bound(of(3e38, 3e38), 1.0)
    assert length == pytest.approx(3e38 * 2**0.5, rel=1e-6)
    assert norm(bounded) == pytest.approx(1.0, rel=1e-6)


def test_cosines_by_hand() -> None:
    """Units x, x and y. Of the first: the others' sum is (1, 1), cosine 1 / sqrt(2); of the third:
    (2, 0), cosine 0. Lengths play no part."""
    found = cosines({4: of(1, 0), 2: of(10, 0), 7: of(0, 0.1)})
    assert list(found) == [2, 4, 7]
    assert found[2] == pytest.approx(0.5**0.5)
    assert found[4] == pytest.approx(0.5**0.5)
    assert found[7] == pytest.approx(0.0, abs=1e-12)


def test_a_flipped_update_has_a_cosine_of_minus_one() -> None:
    """Three along (3, 4), one against: of the latter -1; of the others the sum is 1 unit: +1."""
    found = cosines({0: of(3, 4), 1: of(3, 4), 2: of(6, 8), 3: of(-300, -400)})
    assert found == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0, 3: -1.0})
    assert screen({0: of(3, 4), 1: of(3, 4), 2: of(6, 8), 3: of(-300, -400)}, 0.0) == {
        3: pytest.approx(-1.0)
    }


def test_an_update_without_a_direction_has_cosine_zero() -> None:
    assert cosines({0: of(0, 0), 1: of(1, 0), 2: of(1, 0)}) == pytest.approx({0: 0, 1: 1, 2: 1})


def test_others_that_cancel_give_zero() -> None:
    assert cosines({0: of(0, 1), 1: of(1, 0.3), 2: of(-1, -0.3)})[0] == 0.0


def test_of_fewer_than_three_nobody_is_left_out() -> None:
    assert screen({}, 0.5) == screen({1: of(1, 0)}, 0.5) == {}
    assert screen({1: of(1, 0), 2: of(-1, 0)}, 0.5) == {}


def test_cosines_agree_with_flat_vectors() -> None:
    rng = np.random.default_rng(0)
    changes = {p: random_adapter(rng, 0.01) for p in (5, 1, 9, 3)}
    found = cosines(changes)
    units = {
        p: (v := np.concatenate([x.ravel() for x in c.values()]).astype(float)) / np.linalg.norm(v)
        for p, c in changes.items()
    }
    for p, unit in units.items():
        others = sum(u for q, u in units.items() if q != p)
        assert found[p] == pytest.approx(unit @ others / np.linalg.norm(others), abs=1e-12)


def test_the_screen_finds_a_minority_and_the_bound_its_length() -> None:
    """8 honest sites that share half of their direction, 2 that push 50 times as far against it:
    they are found; a third that scales an honest update is not, but its norm is bounded."""
    rng = np.random.default_rng(1)
    common = random_adapter(rng)
    honest = [plus(common, random_adapter(rng)) for _ in range(8)]
    changes: dict[int, Adapter] = dict(enumerate(honest))
    for p in (8, 9):
        changes[p] = {n: -50 * x for n, x in honest[p - 8].items()}
    changes[10] = {n: 1000 * x for n, x in honest[0].items()}
    assert set(screen(changes, 0.0)) == {8, 9}
    bounded, length = norm_bound(changes[10], 2 * norm(common))
    assert length > 100 * norm(bounded)


def test_a_majority_of_liars_screens_out_the_honest() -> None:
    """What the screen does not survive."""
    honest = {0: of(1, 0), 1: of(1, 0.1)}
    liars = {2: of(-1, 0), 3: of(-1, 0.1), 4: of(-1, -0.1), 5: of(-1, 0)}
    assert set(screen({**honest, **liars}, 0.0)) == {0, 1}


def along(count: int, *sites: tuple[int, float]) -> dict[int, Adapter]:
    """Return the update of each site: its axis, of `count`, and its length along it."""
    axes = np.eye(count)
    return {site: of(*(length * axes[axis])) for site, (axis, length) in enumerate(sites)}


def test_updates_that_vary_as_much_in_every_direction_pass() -> None:
    """Orthogonal and of equal length, they have equal eigenvalues, 1: the spread is 1."""
    assert outlying(along(7, *((i, 1.0) for i in range(7))), 1.001) == {}


def test_the_update_that_lies_farthest_out_is_rejected_with_the_spread() -> None:
    """Of lengths 1, 1, 1 and 3 along four axes: eigenvalues 1, 1 and, for the eigenvector
    (1, 1, 1, -3) / sqrt(12), (3 + 9 * 9) / 12 = 7. Its largest part is the last one's."""
    changes = along(4, (0, 1.0), (1, 1.0), (2, 1.0), (3, 3.0))
    assert outlying(changes, 6.9) == {3: pytest.approx(7)}
    assert outlying(changes, 7.1) == {}


def test_one_of_two_equal_updates_is_rejected() -> None:
    """Five orthogonal ones, and two along a sixth axis: eigenvalues 1 four times, 0 and, for
    (-2, -2, -2, -2, -2, 5, 5) / sqrt(70), (5 * 4 + 10 * 10) / 70 = 12 / 7; their median is 1.
    Without one of the two all are orthogonal."""
    changes = along(6, *((i, 1.0) for i in range(6)), (5, 1.0))
    [(site, spread)] = outlying(changes, 1.7).items()
    assert site in (5, 6)
    assert spread == pytest.approx(12 / 7)
    assert outlying(changes, 1.72) == {}


def test_fewer_than_a_third_are_rejected() -> None:
    """Of seven that lie ever farther out the two farthest, and of three none."""
    changes = along(7, *((i, 10.0**i) for i in range(7)))
    assert set(outlying(changes, 1.4)) == {5, 6}
    assert set(outlying({i: changes[i] for i in range(4)}, 1.4)) == {3}
    assert outlying({i: changes[i] for i in range(3)}, 1.4) == {}
    assert outlying({}, 1.4) == {}


def test_equal_updates_are_not_told_apart_by_rounding() -> None:
    rng = np.random.default_rng(2)
    same = random_adapter(rng)
    assert outlying(dict.fromkeys(range(8), same), 1.4) == {}
    odd = outlying({**dict.fromkeys(range(8), same), 8: plus(same, same)}, 1.4)
    assert set(odd) == {8}


def test_the_screen_of_spread_finds_what_a_cosine_does_not() -> None:
    """Two that agree with each other and with the mean of the others, three times as long: their
    cosine is the highest of all."""
    rng = np.random.default_rng(3)
    honest = {p: random_adapter(rng) for p in range(5)}
    mean = {n: sum(c[n] for c in honest.values()) / 5 for n in honest[0]}
    lie = {n: 3 * x for n, x in plus(mean, random_adapter(rng, 0.5)).items()}
    changes = {**honest, 5: lie, 6: lie}
    assert min(cosines(changes), key=cosines(changes).__getitem__) < 5
    assert set(outlying(changes, 1.4)) == {5, 6}
