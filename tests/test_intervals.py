"""Intervals and tests: against scipy, against formulas, and on simulated data of known truth."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from afina.evaluation.intervals import (
    LossChange,
    crossed_estimate,
    holm,
    linearized_ratio,
    paired_change,
    paired_difference,
    pareto,
    percentage_estimate,
    unpaired_difference,
    variance_components,
    zero_count_bound,
)


def table(
    random: np.random.Generator, seeds: int, rows: int, of_seeds: float, of_rows: float, rest: float
) -> np.ndarray:
    """A table whose true mean is 0."""
    a, b = random.normal(0, of_seeds, (seeds, 1)), random.normal(0, of_rows, (1, rows))
    return a + b + random.normal(0, rest, (seeds, rows))


def test_with_one_seed_it_is_the_paired_t_test() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(0.2, 1, 30), random.normal(0, 1, 30)
    ours, p = paired_difference(x, y)
    theirs = stats.ttest_rel(x, y)
    interval = theirs.confidence_interval()
    assert p == pytest.approx(theirs.pvalue, rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_rows_apart_are_welchs_test() -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(0.2, 1, 30), random.normal(0, 3, 12)
    interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
    ours = unpaired_difference(x, y)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-10)


def test_the_variance_is_that_of_the_components() -> None:
    """Over many tables the estimate is the true variance of the mean, which is known here."""
    random = np.random.default_rng(2)
    true = 0.5**2 / 4 + 1.0 / 30 + 0.8**2 / 120
    made = [table(random, 4, 30, 0.5, 1.0, 0.8) for _ in range(3000)]
    assert np.mean([variance_components(x).error ** 2 for x in made]) == pytest.approx(
        true, rel=0.05
    )
    assert np.var([x.mean() for x in made]) == pytest.approx(true, rel=0.08)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_rows", "rest"),
    [(1, 0, 1, 0), (3, 0.0, 1.0, 0.5), (3, 0.3, 1.0, 0.5), (3, 1.0, 0.3, 0.3)],
)
def test_the_bootstrap_covers(seeds: int, of_seeds: float, of_rows: float, rest: float) -> None:
    random = np.random.default_rng(3)
    found = [
        crossed_estimate(table(random, seeds, 40, of_seeds, of_rows, rest), seed=n)
        for n in range(250)
    ]
    covered = np.mean(
        [f.low <= 0 <= f.high for f in found if f.low is not None and f.high is not None]
    )
    assert 0.915 <= covered <= 0.99, covered


def test_a_share_keeps_its_crooked_interval() -> None:
    """2 of 60 right: the interval does not reach below 0, and reaches further up than down."""
    found = crossed_estimate([100.0] * 2 + [0.0] * 58)
    assert found.low is not None and found.high is not None
    assert found.low >= -0.1
    assert found.high - found.mean > found.mean - found.low


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "of_seeds"), [(1, 0.0), (3, 0.0), (3, 0.7)])
def test_false_alarms_come_at_the_stated_rate(seeds: int, of_seeds: float) -> None:
    """Two methods that do not differ: at most 5 in 100 tests say so, and not many fewer."""
    random = np.random.default_rng(4)
    draw = lambda: table(random, seeds, 50, of_seeds, 1.0, 0.6)  # noqa: E731
    alarms = np.mean([paired_difference(draw(), draw())[1] < 0.05 for _ in range(1000)])
    assert 0.02 <= alarms <= 0.064, alarms


def test_a_true_difference_is_found() -> None:
    random = np.random.default_rng(5)
    rows = random.normal(
        0, 3, (1, 60)
    )  # hard and easy rows, the same for both: pairing takes them out
    one, other = (rows + shift + random.normal(0, 1, (3, 60)) for shift in (1.0, 0.0))
    found, p = paired_difference(one, other)
    assert p < 1e-4
    assert found.low is not None and 0 < found.low < 1.0


def test_few_rows_cannot_say_much() -> None:
    assert paired_difference([1.0, 1.0, 1.0, 0.0], [0.0] * 4)[1] >= 0.25
    assert paired_difference([1.0] * 5, [1.0] * 5)[1] == 1.0
    assert paired_difference([[1.0, 2.0], [2.0, 3.0]], [[0.0, 1.0], [0.0, 1.0]])[1] == 0.5
    assert paired_difference([1.0], [0.0])[1] == 1.0
    assert crossed_estimate([3.0]).low is None


def test_a_ratio_is_that_of_the_sums() -> None:
    sums, labels = np.array([[3.0, 10.0, 1.0], [5.0, 8.0, 2.0]]), [2, 8, 1]
    made = linearized_ratio(sums, labels)
    assert made.mean() == pytest.approx(sums.sum() / 22)
    k, mean = 3, sums.sum() / 22
    d = sums.mean(0) - mean * np.array(labels)
    assert variance_components(made.mean(0)).error ** 2 == pytest.approx(
        k / (k - 1) * (d @ d) / 11**2
    )  # as in judge/change.py


def test_none_of_ten_is_not_never() -> None:
    """Clopper and Pearson, as scipy has it."""
    exact = stats.binomtest(0, 10).proportion_ci(0.95, method="exact")
    assert percentage_estimate([[0.0] * 10] * 3).high == pytest.approx(100 * exact.high)
    assert percentage_estimate([100.0] * 10).low == pytest.approx(100 * (1 - exact.high))
    assert zero_count_bound(10) == pytest.approx(100 * exact.high)
    assert percentage_estimate([100.0, 0.0] * 20).high < 100.0  # type: ignore[operator]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_the_front_by_brute_force(points: list[tuple[int, ...]]) -> None:
    def beats(q: tuple[int, ...], p: tuple[int, ...]) -> bool:
        return q != p and all(a <= b for a, b in zip(q, p, strict=True))

    assert pareto(points) == [
        i for i, p in enumerate(points) if not any(beats(q, p) for q in points)
    ]


def test_the_interval_ends_where_the_test_does() -> None:
    """A difference as large as half of the interval has a p-value of 0.05, with seeds that differ and without."""
    random = np.random.default_rng(6)
    for of_seeds in (0.0, 0.5):
        found = variance_components(table(random, 3, 40, of_seeds, 1.0, 0.5))
        assert found.two_sided_p(found.reach) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("freedom", "point"),
    [(1, 12.7062), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (999, 1.962)],
)
def test_interval_uses_students_t(freedom: int, point: float) -> None:
    low, high = LossChange(freedom + 1, 0.0, 1.0).interval or (0.0, 0.0)
    assert (-low, high) == pytest.approx((stats.t.ppf(0.975, freedom),) * 2, rel=1e-9)
    assert high == pytest.approx(point, rel=1e-3)


def test_interval_of_a_loss_change_covers_the_true_change() -> None:
    """Of 2,000 samples of 6 rows of different lengths, about 95% have the true change in their interval."""
    draw, hits = Random(0), 0
    for _ in range(2000):
        labels = [draw.randint(3, 30) for _ in range(6)]
        after = [
            sum(draw.gauss(-0.3, 0.5) for _ in range(n)) + n * draw.gauss(0, 0.4) for n in labels
        ]
        low, high = paired_change([0.0] * 6, after, labels).interval or (0.0, 0.0)
        hits += low <= -0.3 <= high
    assert 0.92 <= hits / 2000 <= 0.97
    assert paired_change([3.0], [1.0], [2]) == LossChange(1, -1.0, None)
    assert paired_change([3.0, 3.0], [1.0, 1.0], [2, 2]).interval == (-1.0, -1.0)


def test_change_of_equal_rows_is_the_paired_t_test() -> None:
    random = np.random.default_rng(7)
    before, after = random.normal(0.2, 1, 30), random.normal(0, 1, 30)
    theirs = stats.ttest_rel(after, before).confidence_interval()
    ours = paired_change(list(before), list(after), [1] * 30)
    assert ours.interval == pytest.approx((theirs.low, theirs.high), rel=1e-9)
