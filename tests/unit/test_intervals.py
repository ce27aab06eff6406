"""The intervals of lesson 12: they cover what they should, are paired where they say so, and refuse what has none."""

import numpy as np
import pytest

from lora_edu.lab.intervals import bootstrap_interval, paired_interval


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        low, high = bootstrap_interval(generator.random(60) < 0.3, draws=300, seed=seed)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 200 <= 0.98


def test_the_same_seed_gives_the_same_interval_and_a_higher_level_a_wider_one():
    values = np.random.default_rng(1).normal(size=50)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert narrow == bootstrap_interval(values, level=0.5)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


def test_any_statistic_of_rows_with_several_numbers():
    """A loss per token: the sum of the losses over the sum of the tokens."""
    tokens = np.random.default_rng(2).integers(5, 40, size=80)
    rows = np.stack([3.0 * tokens, tokens], axis=1)
    low, high = bootstrap_interval(rows, statistic=lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum())
    assert (low, high) == pytest.approx((3, 3))
    assert bootstrap_interval([1, 2, 3, 4, 100], statistic=np.median)[1] <= 100


def test_pairs_take_out_what_both_systems_share():
    hard = np.random.default_rng(3).normal(size=100) * 5
    better = hard - 0.2
    low, high = paired_interval(better, hard)
    assert (low, high) == pytest.approx((-0.2, -0.2))
    own = bootstrap_interval(hard)
    assert own[1] - own[0] > 1


def test_pairs_in_another_order_are_another_difference():
    values = np.random.default_rng(4).normal(size=60)
    low, high = paired_interval(values, values[::-1].copy())
    assert low < 0 < high


@pytest.mark.errors
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bootstrap_interval([]), "0 values"),
        (lambda: bootstrap_interval([0.3]), "1 values: an interval needs at least two rows"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "not finite"),
        (lambda: bootstrap_interval([0, 1], level=95), "level=95"),
        (lambda: bootstrap_interval([0, 1], draws=0), "draws=0"),
        (lambda: paired_interval([0, 1, 1], [0, 1]), "3 and 2 rows"),
    ],
)
def test_what_has_no_interval_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
