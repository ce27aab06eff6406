"""Choosing settings within a budget of training runs: the next learning rate to try, and the cheapest setting that is
as good as the best. Built in lesson 10.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypeVar

Setting = TypeVar("Setting")


def next_rate(tried: Mapping[float, float], factor: float = 3) -> float | None:
    """The learning rate to try next, or None once the best one lies between two others.

    Args:
        tried: {rate: loss}. A loss that is not finite belongs to a run that diverged; if all of them did, the next
            rate lies below the lowest.
        factor: how far to go beyond the lowest or the highest rate tried.

    Raises:
        ValueError: if no rate has been tried.
    """
    if not tried:
        raise ValueError("no rate has been tried: begin with a guess, for instance ten times full fine-tuning's rate")
    losses = {rate: tried[rate] if math.isfinite(tried[rate]) else math.inf for rate in sorted(tried)}
    best = min(losses, key=losses.__getitem__)  # of equal ones the lowest rate, as they are sorted
    if best == min(losses):
        return best / factor
    if best == max(losses):
        return best * factor
    return None


def best_within_noise(results: Mapping[Setting, Sequence[float]]) -> Setting:
    """The cheapest setting whose losses cannot be told from those of the best one.

    Args:
        results: {setting: its losses, one for each seed}, the cheapest setting first.

    Returns:
        The first setting whose range of losses touches that of the setting with the lowest mean.

    Raises:
        ValueError: if there are no results.
    """
    if not results:
        raise ValueError("no results: give the losses of at least one setting, one for each seed")
    best = min(results.values(), key=fmean)
    return next(setting for setting, losses in results.items() if min(losses) <= max(best))
