"""Intervals and tests of accuracies, against arithmetic done by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grandrounds.statistics import (
    PairedComparison,
    average_accuracy,
    compare_paired,
    position_bias,
    shuffled_accuracy,
    wilson_interval,
)


def test_importing_the_module_loads_no_library() -> None:
    code = (
        "import sys, grandrounds.statistics\n"
        "print({'numpy', 'scipy', 'statsmodels'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- One accuracy ---------------------------------------------------------------------------------


def test_wilson_interval_of_eight_in_ten_agrees_with_the_formula() -> None:
    """Worked out by hand from Wilson's formula, z = 1.959964.

    Centre (p + z²/2n) / (1 + z²/n) = (0.8 + 3.841459/20) / 1.3841459 = 0.716740; half width
    z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n) = 1.959964 sqrt(0.016 + 0.009603647) / 1.3841459
    = 0.226577.
    """
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.716740 - 0.226577, abs=1e-5)
    assert high == pytest.approx(0.716740 + 0.226577, abs=1e-5)


def test_wilson_interval_of_none_right_starts_at_zero() -> None:
    """With p = 0 the upper bound is (z²/n) / (1 + z²/n) = z² / (n + z²)."""
    z_squared = 1.959963984540054**2
    low, high = wilson_interval(0, 20)
    assert low == 0.0
    assert high == pytest.approx(z_squared / (20 + z_squared))


@pytest.mark.parametrize(
    ("correct", "n"),
    [(0, 0), (-1, 5), (6, 5)],
)
def test_impossible_counts_are_refused(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(correct, n)


# --- Two models on the same items -----------------------------------------------------------------


def compare_cells(both: int, only_first: int, only_second: int, neither: int) -> PairedComparison:
    """Compare two models whose answers give these four counts."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return compare_paired(first, second)


def test_items_are_paired_by_their_place() -> None:
    result = compare_paired([True, True, False, False, True], [True, False, True, False, True])
    assert (result.only_first, result.only_second) == (1, 1)
    assert (result.n, result.difference) == (5, 0.0)


def test_difference_is_positive_where_the_second_is_better() -> None:
    result = compare_cells(36, 2, 12, 0)
    assert result.difference == pytest.approx((12 - 2) / 50)
    assert result.p_value < 0.05
    assert result.interval[0] > 0


def test_mcnemar_p_is_the_two_sided_binomial_of_the_discordant_items() -> None:
    """With 2 against 12, p = 2 (C(14,0) + C(14,1) + C(14,2)) / 2^14 = 2 (1 + 14 + 91) / 16384.

    With 0 against 5, p = 2 / 2^5 = 0.0625: no table with five discordant items is significant.
    """
    assert compare_cells(36, 2, 12, 0).p_value == pytest.approx(212 / 16384)
    assert compare_cells(14, 5, 0, 22).p_value == pytest.approx(0.0625)
    assert compare_cells(14, 0, 5, 22).p_value == pytest.approx(0.0625)
    assert compare_cells(3, 7, 7, 3).p_value == pytest.approx(1.0)


def test_mcnemar_p_equals_that_of_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    for both, only_first, only_second, neither in [(40, 9, 21, 30), (0, 1, 0, 0), (500, 80, 61, 9)]:
        expected = tables.mcnemar([[both, only_first], [only_second, neither]], exact=True).pvalue
        result = compare_cells(both, only_first, only_second, neither)
        assert result.p_value == pytest.approx(float(expected))


def test_newcombe_interval_with_negative_correlation() -> None:
    """Cells 36, 2, 12, 0 of 50, worked out by hand after Newcombe (1998), method 10.

    Accuracies 38/50 = 0.76, Wilson 0.625873 to 0.857026, and 48/50 = 0.96, Wilson 0.865399 to
    0.988961. The numerator of phi, 36·0 - 2·12 = -24, is negative and stays as it is; phi
    = -24 / sqrt(38·12·48·2) = -24 / 209.2272 = -0.114708. Lower distance
    sqrt(0.094601² + 0.097026² + 2·0.114708·0.094601·0.097026) = sqrt(0.0204690) = 0.143070; upper
    sqrt(0.028961² + 0.134127² + 2·0.114708·0.028961·0.134127) = sqrt(0.0197199) = 0.140428.
    """
    low, high = compare_cells(36, 2, 12, 0).interval
    assert low == pytest.approx(0.2 - 0.143070, abs=2e-6)
    assert high == pytest.approx(0.2 + 0.140428, abs=2e-6)


def test_newcombe_interval_with_positive_correlation_agrees_with_the_published_one() -> None:
    """Complete response before and after consolidation, 59, 16, 6, 80 (Cavo et al. 2012).

    phi = (59·80 - 16·6 - 161/2) / sqrt(75·86·65·96) = 4543.5 / 6344.13 = 0.716174. Fagerland,
    Lydersen and Laake, "Statistical Analysis of Contingency Tables" (2017), chapter 8, give
    -0.0621 (-0.1186 to -0.0046); so does their R package contingencytables, tests/test-ch8.R.
    """
    result = compare_cells(59, 16, 6, 80)
    assert result.difference == pytest.approx(-0.0621, abs=5e-5)
    assert result.interval == pytest.approx((-0.1186, -0.0046), abs=5e-5)


def test_newcombe_interval_drops_a_correlation_below_its_correction() -> None:
    """Cells 1, 7, 1, 12 of 21: 1·12 - 7·1 = 5 is below 21/2, so phi = 0.

    Accuracies 8/21, Wilson 0.207510 to 0.591213, and 2/21, Wilson 0.026519 to 0.289141. Lower
    distance sqrt(0.068719² + 0.210261²) = 0.221206, upper sqrt(0.193903² + 0.173442²) = 0.260155,
    around -6/21 = -0.285714.
    """
    low, high = compare_cells(1, 7, 1, 12).interval
    assert low == pytest.approx(-0.285714 - 0.221206, abs=2e-6)
    assert high == pytest.approx(-0.285714 + 0.260155, abs=2e-6)


def test_equal_answers_leave_an_interval_with_width_and_p_of_one() -> None:
    """All 30 right: phi has a zero margin and is 0, so each distance is z² / (n + z²)."""
    result = compare_cells(30, 0, 0, 0)
    distance = 1.959963984540054**2 / (30 + 1.959963984540054**2)
    assert result.interval == pytest.approx((-distance, distance))
    assert (result.difference, result.p_value) == (0.0, 1.0)


def test_interval_and_test_may_disagree_near_the_limit() -> None:
    """Cells 14, 0, 5, 22: the interval excludes 0, the exact p is 0.0625."""
    result = compare_cells(14, 0, 5, 22)
    assert result.interval == pytest.approx((0.01148, 0.22649), abs=1e-5)
    assert result.p_value > 0.05


cells = st.integers(0, 300)


@given(cells, cells, cells, cells)
def test_interval_holds_the_difference_and_mirrors_when_models_swap(
    both: int, only_first: int, only_second: int, neither: int
) -> None:
    if both + only_first + only_second + neither == 0:
        return
    result = compare_cells(both, only_first, only_second, neither)
    swapped = compare_cells(both, only_second, only_first, neither)
    low, high = result.interval
    assert -1 - 1e-12 <= low <= result.difference <= high <= 1 + 1e-12
    assert low < high
    assert swapped.interval == pytest.approx((-high, -low))
    assert swapped.difference == -result.difference
    assert swapped.p_value == pytest.approx(result.p_value)
    assert 0 < result.p_value <= 1


def test_items_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot pair 2 with 1"):
        compare_paired([True, False], [True])
    with pytest.raises(ValueError, match="cannot pair 0 with 0"):
        compare_paired([], [])


# --- Several benchmarks ---------------------------------------------------------------------------


def test_average_counts_every_benchmark_once() -> None:
    """(8/10 + 0/20) / 2 = 0.4, though 8 of 30 questions are 0.267.

    Wilson of 8/10 is 0.490163 to 0.943317, of 0/20 it is 0 to 0.161125. Lower bound
    0.4 - sqrt(0.309837² + 0²) / 2 = 0.245082; upper 0.4 + sqrt(0.143317² + 0.161125²) / 2
    = 0.4 + 0.215641 / 2 = 0.507820.
    """
    accuracy, interval = average_accuracy([(8, 10), (0, 20)])
    assert accuracy == pytest.approx(0.4)
    assert interval == pytest.approx((0.245082, 0.507820), abs=2e-6)


def test_average_of_one_benchmark_is_its_wilson_interval() -> None:
    assert average_accuracy([(30, 40)])[1] == pytest.approx(wilson_interval(30, 40))


@given(
    st.lists(
        st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
        min_size=1,
        max_size=5,
    )
)
def test_average_interval_stays_within_zero_and_one(rows: list[tuple[int, int]]) -> None:
    accuracy, (low, high) = average_accuracy(rows)
    assert -1e-12 <= low <= accuracy <= high <= 1 + 1e-12
    assert low < high


def test_an_average_needs_benchmarks_with_possible_counts() -> None:
    with pytest.raises(ValueError, match="no benchmark"):
        average_accuracy([])
    with pytest.raises(ValueError, match="5 of 4"):
        average_accuracy([(5, 4)])


# --- Order of the options -------------------------------------------------------------------------


def test_position_bias_agrees_with_chi_square_by_hand() -> None:
    """10, 20, 30, 40 against 25 each: (15² + 5² + 5² + 15²) / 25 = 20, 3 degrees of freedom.

    With 3 degrees P(X > x) = erfc(sqrt(x/2)) + sqrt(2x/pi) exp(-x/2) = 0.00016974 at x = 20.
    """
    bias = position_bias([0] * 10 + [1] * 20 + [2] * 30 + [3] * 40, options=4)
    assert bias.counts == (10, 20, 30, 40)
    assert bias.shares == pytest.approx((0.1, 0.2, 0.3, 0.4))
    expected = math.erfc(math.sqrt(10)) + math.sqrt(40 / math.pi) * math.exp(-10)
    assert bias.p_value == pytest.approx(expected)
    assert bias.p_value == pytest.approx(0.00016974, abs=1e-8)


def test_equal_shares_show_no_position_bias_and_an_unused_position_is_counted() -> None:
    assert position_bias([0, 1, 2] * 10, options=3).p_value == pytest.approx(1.0)
    assert position_bias([0, 1, 0, 1], options=3).counts == (2, 2, 0)


def test_choices_that_are_no_position_are_refused() -> None:
    with pytest.raises(ValueError, match="choice 4 is not a position; allowed: 0 to 3"):
        position_bias([0, 4], options=4)
    with pytest.raises(ValueError, match="choice -1"):
        position_bias([-1], options=4)
    with pytest.raises(ValueError, match="0 choices"):
        position_bias([], options=4)
    with pytest.raises(ValueError, match="among 1 options"):
        position_bias([0], options=1)


def test_shuffled_accuracy_counts_items_that_survive_every_permutation() -> None:
    """Four items, three permutations with 3, 2 and 2 right; only the first is always right."""
    result = shuffled_accuracy(
        [[True, True, True, False], [True, False, True, False], [True, True, False, False]]
    )
    assert (result.n, result.correct) == (4, (3, 2, 2))
    assert result.mean == pytest.approx(7 / 12)
    assert (result.minimum, result.maximum) == (0.5, 0.75)
    assert (result.always_correct, result.always_correct_share) == (1, 0.25)


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=6)
    )
)
def test_always_correct_is_never_above_the_worst_permutation(answers: list[list[bool]]) -> None:
    result = shuffled_accuracy(answers)
    tolerance = 1e-12
    assert result.always_correct_share <= result.minimum <= result.mean + tolerance
    assert result.mean <= result.maximum + tolerance


@pytest.mark.parametrize("answers", [[], [[]], [[True], [True, False]]])
def test_permutations_of_different_items_are_refused(answers: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match="the same items"):
        shuffled_accuracy(answers)
