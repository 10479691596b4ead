"""The rules that combine updates by their distances, against examples worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from grandrounds.errors import RoundError
from grandrounds.server.aggregation.combination import geometric_median, squared_distances
from grandrounds.server.aggregation.make import make_rule
from grandrounds.server.aggregation.nnm import neighbours
from grandrounds.wire.adapter import Adapter
from tests.server.aggregation.adapters import distance, named, play, plus, random_adapter

NAME = "m.lora_B.weight"
START: Adapter = {NAME: np.ones((1, 2), np.float32)}

Points = list[tuple[float, float]]


def changes_of(points: Points, weight: int = 1) -> list[tuple[Adapter, int]]:
    return [({NAME: np.array([point], np.float32)}, weight) for point in points]


def moved(name: str, points: Points, **settings: int) -> NDArray[np.float64]:
    """Return by how much a rule moves the adapter, given updates in the plane."""
    result = play(make_rule(named(name, **settings)), START, changes_of(points))
    return (result[NAME] - START[NAME])[0].astype(np.float64)


def test_the_geometric_median_of_four_corners_is_where_their_diagonals_cross() -> None:
    """For any convex quadrangle: each distance to two opposite corners is least on their diagonal.

    (0, 0), (6, 6) and (4, 0), (0, 4): y = x and y = 4 - x cross at (2, 2). The mean is (2.5, 2.5).
    """
    points = [(0.0, 0.0), (6.0, 6.0), (4.0, 0.0), (0.0, 4.0)]
    assert moved("geomedian", points) == pytest.approx([2, 2], abs=1e-6)


def test_the_geometric_median_may_be_one_of_the_updates() -> None:
    """Of 0, 1 and 5 on a line it is their median, 1, however far the last one is away."""
    for far in (5.0, 5e6):
        assert moved("geomedian", [(0, 0), (1, 0), (far, 0)]) == pytest.approx([1, 0], rel=1e-3)


def test_the_geometric_median_weights_by_examples() -> None:
    """On a line it is the weighted median: 2 examples at 3 outweigh one at 0 and none other."""
    changes = [*changes_of([(0, 0)], 1), *changes_of([(3, 0)], 2)]
    result = play(make_rule(named("geomedian")), START, changes)
    assert result[NAME][0] - 1 == pytest.approx([3, 0], rel=1e-4)


def test_updates_that_change_nothing_have_a_median() -> None:
    assert moved("geomedian", [(0, 0), (0, 0)]).tolist() == [0, 0]


def test_each_update_is_mixed_with_its_nearest() -> None:
    """0, 1, 3 and 7 on a line, f = 1: 0, 1 and 3 have each other; 7 has 3 and 1."""
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert squared_distances(x @ x.T)[3].tolist() == [49, 36, 16, 0]
    third = 1 / 3
    expected = [[third, third, third, 0]] * 3 + [[0, third, third, third]]
    assert np.allclose(neighbours(x @ x.T, 1), expected)


def test_nearest_neighbour_mixing_leaves_out_what_no_other_update_is_near() -> None:
    """As above, mixed to 4/3, 4/3, 4/3 and 11/3 (or far away): their median is 4/3."""
    for far in (7.0, 7e6):
        points = [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (far, 0.0)]
        found = moved("nnm", points, num_malicious_nodes=1)
        assert found == pytest.approx([4 / 3, 0], rel=1e-3)


def test_mixing_that_expects_nobody_hostile_is_the_mean() -> None:
    points = [(0.0, 0.0), (1.0, 2.0), (3.0, 4.0), (8.0, 2.0)]
    assert moved("nnm", points, num_malicious_nodes=0) == pytest.approx([3, 2])


def test_equal_updates_of_many_sites_are_no_trouble() -> None:
    """All distances are 0, also from an update to itself."""
    assert moved("nnm", [(1, 2)] * 5, num_malicious_nodes=2) == pytest.approx([1, 2])


def test_mixing_lowers_what_it_expects_with_fewer_updates_and_says_so() -> None:
    """Of five updates it tolerates two, of four and of three one; two are refused."""
    for count, tolerated in ((7, 2), (5, 2), (4, 1), (3, 1)):
        rule = make_rule(named("nnm", num_malicious_nodes=2))
        play(rule, START, changes_of([(float(i), 0.0) for i in range(count)]))
        assert rule.report() == {"hostile-tolerated": tolerated}
    with pytest.raises(RoundError, match=r"nnm' needs at least 3 good replies .* got 2"):
        play(make_rule(named("nnm", num_malicious_nodes=2)), START, changes_of([(1, 0)] * 2))


@pytest.mark.parametrize("name", ["geomedian", "nnm"])
@pytest.mark.parametrize("hostile", [-1000.0, 1000.0, 1.0])
def test_two_of_seven_cannot_move_the_result_beyond_the_honest_spread(
    name: str, hostile: float
) -> None:
    """Updates that agree as much as they differ; the mean goes wherever the two want."""
    rng = np.random.default_rng(3)
    start, common = random_adapter(rng), random_adapter(rng, 0.1)
    honest = [(plus(common, random_adapter(rng, 0.1)), 20) for _ in range(5)]
    bad = [({n: np.float32(hostile) * x for n, x in honest[0][0].items()}, 20)] * 2
    honest = [({n: x.astype(np.float32) for n, x in c.items()}, w) for c, w in honest]
    center = play(make_rule(named("fedavg")), start, honest)
    spread = max(distance(plus(start, change), center) for change, _ in honest)
    bad = [({n: x.astype(np.float32) for n, x in c.items()}, w) for c, w in bad]
    result = play(make_rule(named(name, num_malicious_nodes=2)), start, [*honest, *bad])
    assert distance(result, center) < 1.5 * spread
    if abs(hostile) > 1:
        plain = play(make_rule(named("fedavg")), start, [*honest, *bad])
        assert distance(plain, center) > 100 * spread


def test_the_coefficients_are_those_of_weiszfeld_on_the_updates_themselves() -> None:
    """The same iteration on vectors in float64, from the mean."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, 40))
    shares = np.array([1, 2, 3, 1, 1, 2]) / 10
    v = shares @ x
    for _ in range(200):
        pull = shares / np.linalg.norm(x - v, axis=1)
        v = pull @ x / pull.sum()
    assert np.allclose(geometric_median(x @ x.T, shares) @ x, v, atol=1e-7)
