"""How far a figure may be off because it was measured on these rows and not on others: bootstrap intervals, for one
system and for the difference of two that saw the same rows. Built in lesson 12.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], Any]


def bootstrap_interval(
    values: Sequence[Any] | np.ndarray,
    statistic: Statistic = np.mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The range that holds a statistic in ``level`` of the samples drawn, with replacement, from the rows themselves.

    Args:
        values: one value for each row, True and False for a share. A row may also be several numbers, such as a sum
            of losses and a count of tokens, if the statistic makes one number of an array of shape (rows, numbers).
        statistic: what is measured; it gets an array whose first axis is the drawn rows.
        level: how much of the drawn statistics lie inside, the same share left out at either end.
        draws: how many samples.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        (low, high). Where all values are alike both ends are that value: with 0 of n the bootstrap sees no
        uncertainty, and 3 / n is the usual upper end at 95 percent.

    Raises:
        ValueError: for fewer than two rows, a value that is not finite, or a level that is not between 0 and 1.

    Source: Efron and Tibshirani 1993, chapter 13 (the percentile interval). Built in lesson 12.
    """
    rows = _rows(values)
    return _interval([statistic(rows[drawn]) for drawn in _draw(len(rows), draws, seed)], level)


def paired_interval(
    first: Sequence[Any] | np.ndarray,
    second: Sequence[Any] | np.ndarray,
    statistic: Statistic = np.mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of ``statistic(first) − statistic(second)`` for two systems on the same rows in the same order.

    Both get the same drawn rows each time, so a row that is hard for both widens nothing. Where 0 lies inside, these
    rows do not tell the two apart. Arguments, result and errors as in :func:`bootstrap_interval`.

    Raises:
        ValueError: also if the two do not have the same number of rows.
    """
    one, other = _rows(first), _rows(second)
    if len(one) != len(other):
        raise ValueError(
            f"{len(one)} and {len(other)} rows: a paired interval needs two values for each row, in the same order"
        )
    differences = [statistic(one[drawn]) - statistic(other[drawn]) for drawn in _draw(len(one), draws, seed)]
    return _interval(differences, level)


def _rows(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    rows = np.asarray(values, dtype=float)
    if rows.ndim == 0 or len(rows) < 2:
        raise ValueError(f"{rows.size} values: an interval needs at least two rows, and is worth little below twenty")
    if not np.isfinite(rows).all():
        raise ValueError("a value is not finite: find the row that it belongs to before you average")
    return rows


def _draw(rows: int, draws: int, seed: int) -> np.ndarray:
    """Row numbers, (draws, rows)."""
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one sample is needed; 2000 is usual")
    return np.random.default_rng(seed).integers(rows, size=(draws, rows))


def _interval(drawn: Sequence[Any], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a number between 0 and 1, for instance 0.95")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
