"""Check of lesson 10: the best rate of a sweep (B1)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev, stdev
from typing import Any

from lora_edu.course.checks.report import Report, Step, Wrong, run_steps

Run = dict[str, Any]
Losses = Mapping[float, Mapping[int, tuple[float, float]]]
NAN = float("nan")


def drawn_seeds() -> list[int]:
    """Three to five seeds that are no 0, 1, 2."""
    return random.sample(range(3, 99), random.randint(3, 5))


def drawn_rates(number: int = 5) -> list[float]:
    """Learning rates in rising order, each two to three times the one before."""
    rates = [random.uniform(1e-4, 4e-4)]
    while len(rates) < number:
        rates.append(rates[-1] * random.uniform(2, 3))
    return [float(f"{rate:.2g}") for rate in rates]


def runs_of(losses: Losses, first: float | None = None) -> list[Run]:
    """The lines of a record, shuffled, from {rate: {seed: (validation, test)}}; one rate may be put in front."""
    runs = [
        {"job": {"learning_rate": rate, "seed": seed, "r": 8}, "validation": validation, "test": test}
        for rate, of_rate in losses.items()
        for seed, (validation, test) in of_rate.items()
    ]
    random.shuffle(runs)
    return sorted(runs, key=lambda line: line["job"]["learning_rate"] != first)


def sweep(seeds: Sequence[int], rates: Sequence[float], best: int) -> dict[float, dict[int, tuple[float, float]]]:
    """Losses in which validation, test, one lucky seed and the highest loss each point to another rate."""
    others = [i for i in range(len(rates)) if i != best]
    random.shuffle(others)
    lucky, best_on_test, *rest = others
    levels = {best: (4.0, 4.3), best_on_test: (4.2, 4.1), lucky: (4.9, 5.4)} | {i: (4.4, 4.7) for i in rest}
    if rest:
        levels[rest[0]] = 5.9, 5.9
    losses = {
        rates[i]: {seed: (level + random.uniform(0, 0.05), test + random.uniform(0, 0.1)) for seed in seeds}
        for i, (level, test) in levels.items()
    }
    losses[rates[lucky]][random.choice(seeds)] = 3.5, 3.5
    return losses


def pick_best(candidate: Callable[[list[Run]], Sequence[Any]], hint: int = 1) -> Report:
    """Exercise B1 of lesson 10: ``candidate(runs)`` is (rate, mean, sd, at_edge), the rate chosen on validation."""

    def asked(runs: list[Run]) -> tuple[float, float, float, bool]:
        try:
            got = candidate(runs)
        except AttributeError as error:  # what statistics.stdev raises if it meets a NaN
            if "numerator" not in str(error):
                raise
            raise Wrong(
                "some runs diverged, their losses are NaN, and your function computes a spread with them",
                "Which rates may take part in the choice, and what if none may?",
                "Before you choose, leave out rates with a loss that is not finite. Raise ValueError if none is left.",
            ) from None
        if not isinstance(got, tuple | list) or len(got) != 4:
            raise Wrong(
                f"you return {got!r}: expected four values",
                "What does the task want to know about the choice?",
                "Return Choice(rate, mean, sd, at_edge).",
            )
        return got[0], got[1], got[2], got[3]

    def check_rate(got: float, right: float, losses: Losses) -> None:
        if got == right:
            return
        if got not in losses:
            raise Wrong(
                f"you choose the rate {got!r}, and nobody tried it: there are {', '.join(map(str, sorted(losses)))}",
                "Do you average over rates, or return an index or a loss?",
                'Group the runs by line["job"]["learning_rate"], and return one of these rates.',
            )
        seeds = {seed for of_rate in losses.values() for seed in of_rate}
        validation = {rate: [v for v, _ in of_rate.values()] for rate, of_rate in losses.items()}
        if len(validation[got]) < len(seeds):
            note = f"that rate has {len(validation[got])} of {len(seeds)} seeds: its mean is over other runs"
        elif not all(map(math.isfinite, validation[got])):
            note = "with that rate a run diverged"
        elif got == max(losses, key=lambda rate: fmean(validation[rate])):
            note = "that one has the highest validation loss"
        elif got == min(losses, key=lambda rate: min(validation[rate])):
            note = "it has the best single run, one lucky seed, and a high mean"
        elif got == min(losses, key=lambda rate: fmean(t for _, t in losses[rate].values())):
            note = "it is the best on the test split, which then is no test any more"
        else:
            note = "its validation losses have a higher mean"
        raise Wrong(
            f"you choose the rate {got}, expected {right}: {note}",
            "Which number decides, on which split, over which runs?",
            "The lowest mean of the validation losses, among the rates at which every seed is there and finite.",
        )

    def compare(losses: Losses, right: float, first: float | None = None) -> None:
        runs = runs_of(losses, first)
        try:
            rate, mean, sd, _ = asked(runs)
        except ValueError as error:
            raise Wrong(
                f"your function refuses runs of which a rate is complete: ValueError: {error}",
                "Which seeds must be there? They need not be 0, 1, 2, and not three.",
                'The seeds that occur in the runs: {line["job"]["seed"] for line in runs}.',
            ) from None
        check_rate(rate, right, losses)
        chosen = [test for _, test in losses[right].values()]
        everything = [line["test"] for line in runs]
        of_validation = [validation for validation, _ in losses[right].values()]
        if not close(mean, fmean(chosen)):
            slips = {
                fmean(of_validation): "these are the validation losses, by which you have chosen: they are too good",
                fmean(everything): "this is the mean over all rates",
                min(chosen): "this is the best seed, not the mean",
                max(chosen): "this is the worst seed, not the mean",
            }
            note = next((words for value, words in slips.items() if close(mean, value)), "not the mean of its runs")
            raise Wrong(
                f"the rate is right; your test loss is {mean:.4f} instead of {fmean(chosen):.4f}: {note}",
                "Which runs and which split tell how good the choice is on new data?",
                "The mean of the test losses of the chosen rate, over its seeds.",
            )
        if not close(sd, stdev(chosen)):
            slips = {
                pstdev(chosen): f"this divides by n = {len(chosen)}, as if the seeds were all there are",
                stdev(chosen) / len(chosen) ** 0.5: "this is the error of the mean, not the spread of the seeds",
                stdev(chosen) ** 2: "this is the variance",
                max(chosen) - min(chosen): "this is the range, which grows with the number of seeds",
                stdev(of_validation): "this is the spread on the validation split",
            }
            if math.isfinite(sum(everything)):
                slips[stdev(everything)] = "this is the spread over all rates: the rate is no chance"
            note = next((words for value, words in slips.items() if close(sd, value)), "not the sample's deviation")
            raise Wrong(
                f"your spread is {sd:.5f} instead of {stdev(chosen):.5f}: {note}",
                "How far apart are the seeds, and by what do you divide if they are a sample?",
                "statistics.stdev of the chosen rate's test losses (it divides by n − 1).",
            )

    def lowest() -> None:
        for _ in range(3):
            rates = drawn_rates()
            best = random.randrange(len(rates))
            compare(sweep(drawn_seeds(), rates, best), rates[best])

    def missing() -> None:
        for _ in range(3):
            rates, seeds = drawn_rates(), drawn_seeds()
            best, gap = random.sample(range(len(rates)), 2)
            losses = sweep(seeds, rates, best)
            losses[rates[gap]] = {seed: (random.uniform(3, 3.4), random.uniform(3, 3.4)) for seed in seeds[1:]}
            compare(losses, rates[best])

    def diverged() -> None:
        for bad in (NAN, math.inf):
            rates, seeds = drawn_rates(), drawn_seeds()
            best, gap = random.sample(range(len(rates)), 2)
            losses = sweep(seeds, rates, best)
            losses[rates[gap]] = {seed: (random.uniform(3, 3.4), random.uniform(3, 3.4)) for seed in seeds}
            losses[rates[gap]][random.choice(seeds)] = (bad, bad)
            compare(losses, rates[best], first=rates[gap])

    def edges() -> None:
        for best, cut in ((0, False), (4, False), (2, False), (1, True), (3, True)):
            rates, seeds = drawn_rates(), drawn_seeds()
            losses = sweep(seeds, rates, best)
            where = "the lowest" if best == 0 else "the highest" if best == 4 else "neither the lowest nor the highest"
            if cut:  # the rate beyond the best one diverged, so that side has been tried
                beyond = 0 if best == 1 else 4
                losses[rates[beyond]] = {seed: (NAN, NAN) for seed in seeds}
                where += ", as the one beyond was tried and diverged"
            rate, _, _, at_edge = asked(runs_of(losses))
            check_rate(rate, rates[best], losses)
            if bool(at_edge) != (best in (0, 4)):
                raise Wrong(
                    f"the best of the five rates tried is {where}; you say at_edge = {at_edge}",
                    "Could the true optimum lie outside of what was tried? The runs come in any order.",
                    "at_edge = rate in (min(rates), max(rates)), over all rates that occur in the runs.",
                )

    def nothing() -> None:
        rates, seeds = drawn_rates(3), drawn_seeds()
        losses = sweep(seeds, rates, 1)
        for rate, seed in zip(rates, seeds, strict=False):
            losses[rate][seed] = (NAN, NAN)
        try:
            got = asked(runs_of(losses))
        except ValueError:
            return
        raise Wrong(
            f"at each rate one run diverged, and you return {got}",
            "What can be said about a sweep without one complete rate?",
            "Raise ValueError if no rate is complete.",
        )

    steps: list[Step] = [
        ("the lowest mean on validation, reported on test", lowest),
        ("a rate that lacks a seed is out", missing),
        ("a rate at which a run diverged is out", diverged),
        ("whether the best rate is at the edge", edges),
        ("no complete rate: ValueError", nothing),
    ]
    return run_steps("the best rate", steps, hint)


def close(a: float, b: float) -> bool:
    """Equal to rounding."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
