"""How much a site may weigh, whatever it claims."""

from __future__ import annotations

import pytest

from grandrounds.config.recipes import resolve
from grandrounds.errors import ConfigError
from grandrounds.server.weights import limited


def share(weights: list[int], largest: float = 2.0) -> float:
    """Return the share of the last site."""
    most = limited(dict(enumerate(weights)), largest)
    return most[len(weights) - 1] / sum(most.values())


def test_by_default_a_weight_is_at_most_twice_the_median() -> None:
    assert resolve().strategy.largest_weight == 2
    assert limited({0: 75, 4: 75, 7: 75, 9: 2**24}, 2.0) == {0: 75, 4: 75, 7: 75, 9: 150}
    with pytest.raises(ConfigError, match=r"largest-weight = 0\.5 would limit every site"):
        resolve({"strategy.largest-weight": 0.5})


@pytest.mark.parametrize(
    "others",
    [[75] * 6, [1, 1, 1, 100, 100, 100], [1, 2, 3, 4, 5, 6], [7] * 5 + [2**24], [1] * 5 + [9]],
)
def test_one_of_seven_never_has_more_than_a_quarter(others: list[int]) -> None:
    """2 / (2 + 6). Without the limit it had 99.9 %: one site decided what the model became."""
    assert share([*others, 2**24]) <= 0.25 + 1e-9
    assert share([*others, 2**24], 0) > 0.49


def test_sites_of_about_the_same_size_keep_their_weights() -> None:
    for weights in ([74, 75, 75, 76], [30] * 20, [10, 19], [5], [1425, 1500, 2000, 2800, 1425]):
        numbered = dict(enumerate(weights))
        assert limited(numbered, 2.0) == numbered


def test_of_two_sites_the_smaller_is_the_median() -> None:
    """20 among 10 is two thirds, as 2 / (2 + 1)."""
    assert limited({0: 10, 1: 10**6}, 2.0) == {0: 10, 1: 20}


def test_every_share_stays_at_least_one_example() -> None:
    assert limited({0: 1, 1: 1, 2: 9}, 1.0) == {0: 1, 1: 1, 2: 1}
