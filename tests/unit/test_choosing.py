"""Choosing within a budget: where the next learning rate lies, and which setting is the cheapest that is as good."""

import math

import pytest

from lora_edu.lab.choosing import best_within_noise, next_rate


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({0.003: 4.0}, 0.001),
        ({0.003: 4.0, 0.001: 4.2}, 0.009),
        ({0.001: 4.0, 0.003: 4.2}, 0.001 / 3),
        ({0.009: 4.5, 0.001: 4.2, 0.003: 4.0}, None),
        ({0.001: math.nan, 0.003: 4.2, 0.009: math.inf}, None),
        ({0.003: math.nan, 0.001: math.inf}, 0.001 / 3),
        ({0.003: math.nan, 0.001: 4.2}, 0.001 / 3),
    ],
)
def test_the_next_rate_lies_beyond_the_best_until_that_has_a_worse_one_on_each_side(tried, expected):
    assert next_rate(tried) == pytest.approx(expected)


def test_the_factor_is_the_step():
    assert next_rate({0.01: 4.2, 0.1: 4.0}, factor=10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({1: [4.3, 4.4], 4: [4.05, 4.25], 16: [4.0, 4.1]}, 4),
        ({1: [4.3, 4.4], 4: [4.15, 4.25], 16: [4.0, 4.1]}, 16),
        ({1: [4.1, 4.4], 4: [4.05, 4.25], 16: [4.0, 4.1]}, 1),  # ranges that touch in one point
        ({1: [4.2, 4.4], 4: [4.05, 4.25], 16: [4.0, 4.1]}, 4),  # 1 touches 4, and not the best
        ({"first": [4.0]}, "first"),
    ],
)
def test_the_cheapest_setting_whose_range_touches_that_of_the_best(results, expected):
    assert best_within_noise(results) == expected


@pytest.mark.parametrize(("call", "words"), [(next_rate, "begin with a guess"), (best_within_noise, "at least one")])
def test_nothing_to_choose_from_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call({})
