"""Check of lesson 10: a fair difference of two settings (C1)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev, stdev
from typing import Any

from lora_edu.course.checks.lesson_10_choice import Losses, Run, close, drawn_rates, drawn_seeds, runs_of, sweep
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps


def fair_difference(candidate: Callable[[list[Run], list[Run]], Sequence[Any]], hint: int = 1) -> Report:
    """Exercise C1 of lesson 10: ``candidate(runs_a, runs_b)`` is (mean, sd, n) of b − a, paired by seed."""
    fix = (
        "Take both best rates from pick_best, then the list of test_b[seed] − test_a[seed] over the seeds in common: "
        "its mean, its statistics.stdev, its length."
    )

    def asked(a: Losses, b: Losses) -> tuple[float, float, int]:
        got = candidate(runs_of(a), runs_of(b))
        if not isinstance(got, tuple | list) or len(got) != 3:
            raise Wrong(f"you return {got!r}: expected three values", "How far, how sure, from how many?", fix)
        return got[0], got[1], got[2]

    def drawn(sign: int, only_a: int = 0, only_b: int = 0) -> tuple[Losses, Losses, float, float, list[float]]:
        """Two sweeps in which a seed is good or bad for both, with both best rates and the right differences."""
        rates, seeds = drawn_rates(), [*drawn_seeds(), 100, 101, 102]
        common, spare = seeds[:-3], seeds[-3:]
        level = {seed: random.uniform(-0.4, 0.4) for seed in seeds}
        best_a, best_b = random.sample(range(5), 2)
        sweeps = []
        for best, extra, gap in ((best_a, spare[:only_a], 0), (best_b, spare[2 : 2 + only_b], 0.15 * sign)):
            losses = sweep(common + extra, rates, best)
            sweeps.append(
                {
                    rate: {s: (v + gap, t + level[s] + gap) for s, (v, t) in each.items()}
                    for rate, each in losses.items()
                }
            )
        a, b = sweeps
        return a, b, rates[best_a], rates[best_b], differences(a[rates[best_a]], b[rates[best_b]])

    def differences(one: Mapping, other: Mapping, split: int = 1) -> list[float]:
        return [other[seed][split] - one[seed][split] for seed in one if seed in other]

    def compare(a: Losses, b: Losses, best_a: float, best_b: float, right: list[float]) -> None:
        mean, sd, n = asked(a, b)
        of_a, of_b = ([test for _, test in each.values()] for each in (a[best_a], b[best_b]))
        test_a, test_b = (min(each, key=lambda rate: fmean(t for _, t in each[rate].values())) for each in (a, b))
        slips = {
            -fmean(right): "this is a − b, or the size alone; a negative number should say that b is the better one",
            fmean(differences(a[best_a], b[best_a])): "b runs at a's best rate",
            fmean(differences(a[best_b], b[best_b])): "a runs at b's best rate",
            fmean(differences(a[test_a], b[test_b])): "the rates are chosen on the test split",
            fmean(differences(a[best_a], b[best_b], split=0)): "these are the validation losses",
            fmean(of_b) - fmean(of_a): "seeds that only one of the two has are in your means",
            min(of_b) - min(of_a): "these are the best seeds of both",
        }
        if not close(mean, fmean(right)):
            note = next((words for value, words in slips.items() if close(mean, value)), "not b − a at the best rates")
            raise Wrong(
                f"your difference is {mean:+.4f} instead of {fmean(right):+.4f}: {note}",
                "At which rate does each of the two stand in its best light, and which runs have a partner?",
                fix,
            )
        if n != len(right):
            raise Wrong(f"you say n = {n}; there are {len(right)} pairs", "How many differences did you average?", fix)
        slips = {
            math.hypot(
                stdev(of_a), stdev(of_b)
            ): "the two spreads added in squares, as if the seeds had nothing in common",
            math.sqrt(
                (stdev(of_a) ** 2 + stdev(of_b) ** 2) / 2
            ): "this is the two spreads' mean, not that of the pairs",
            stdev(of_a + of_b): "this is the spread of all runs together",
            abs(stdev(of_a) - stdev(of_b)): "spreads do not subtract",
            pstdev(right): "this divides by n, as if the seeds were all there are",
            stdev(right) / math.sqrt(len(right)): "this is the error of the mean, not the spread of the differences",
            stdev(right) ** 2: "this is the variance",
        }
        if not close(sd, stdev(right)):
            note = next((words for value, words in slips.items() if close(sd, value)), "are the runs paired by seed?")
            raise Wrong(
                f"your spread is {sd:.5f} instead of {stdev(right):.5f}: {note}",
                "A seed sets the order of the data for both. What remains of it in a difference of the same seed?",
                fix,
            )

    def own_rates() -> None:
        for sign in (1, -1, 1):
            compare(*drawn(sign))

    def partners() -> None:
        for sign, *only in ((1, 2, 0), (-1, 0, 1), (1, 2, 1)):
            compare(*drawn(sign, *only))

    def too_few() -> None:
        a, b, *_ = drawn(1)
        keep = next(iter(a[next(iter(a))]))
        b = {
            rate: {(seed if seed == keep else seed + 200): loss for seed, loss in each.items()}
            for rate, each in b.items()
        }
        try:
            got = candidate(runs_of(a), runs_of(b))
        except ValueError:
            return
        raise Wrong(
            f"with one seed in common you return {tuple(got)}", "What is the spread of one number?", "Raise ValueError."
        )

    steps: list[Step] = [
        ("each at its own best rate, paired by seed", own_rates),
        ("seeds without a partner are left out", partners),
        ("fewer than two pairs: ValueError", too_few),
    ]
    return run_steps("a fair difference", steps, hint)
