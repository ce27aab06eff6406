"""The checks of lesson 10: a scale (A1), the best rate (B1), a sweep within a budget (B2), a difference (C1)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.course.checks.tools import (
    close_number,
    is_number,
    is_several,
    known_slip,
    need_number,
    need_refusal,
    need_several,
    need_whole,
    normal,
    off_by,
)

Problem = tuple[Tensor, Tensor, Tensor, Tensor]
STEPS = 12
Run = dict[str, Any]
Losses = Mapping[float, Mapping[int, tuple[float, float]]]
Case = tuple[Tensor, Tensor, int, float]


def agree(one: Sequence[float], other: Sequence[float]) -> bool:
    """Equal to rounding, number by number."""
    return all(close_number(a, b, 1e-6) for a, b in zip(one, other, strict=True))


def named(got: Sequence[float], wrong: Sequence[Mapping[str, Any]], otherwise: str) -> str:
    """The mistake whose values are all the learner's; each of ``wrong`` gives {mistake: its value} for one draw."""
    return known_slip(got, [([each[words] for each in wrong], words) for words in wrong[0]], agree, otherwise)


def drawn_problem() -> Problem:
    """(W₀, x, targets, start of A with σ = 1) in float64, with in ≠ out and r > 1."""
    inputs, outputs, r = random.randint(10, 13), random.randint(6, 9), random.randint(2, 4)
    shapes = (outputs, inputs), (16, inputs), (16, outputs), (r, inputs)
    weight, x, targets, start = (normal(*shape) for shape in shapes)
    return weight, x, targets, start


def adam_update(scale: float, sigma: float, rate: float, problem: Problem, steps: int) -> Tensor:
    """ΔW = s·BA after some steps of Adam on a squared error. Its ε is next to nothing, so that it cannot matter."""
    weight, x, targets, start = problem
    A = nn.Parameter(sigma * start)
    B = nn.Parameter(torch.zeros(weight.shape[0], start.shape[0], dtype=torch.float64))
    optimizer = torch.optim.Adam([A, B], lr=rate, eps=1e-30)
    with torch.enable_grad():
        for _ in range(steps):
            loss = (x @ weight.T + scale * (x @ A.T @ B.T) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (scale * B @ A).detach()


def same_training(candidate: Callable[..., Sequence[float]], hint: int = 1) -> Report:
    """Exercise A1 of lesson 10: ``candidate(sigma_A, rate, k)`` makes up for a scale k times as large."""
    rule = "Return (sigma_A / math.sqrt(k), rate / math.sqrt(k))."

    def settings(larger: bool) -> tuple[float, float, float, float]:
        k = random.uniform(2, 9)
        return random.uniform(0.5, 4), random.uniform(0.05, 0.3), random.uniform(0.005, 0.03), k if larger else 1 / k

    def answer(sigma: float, rate: float, k: float) -> tuple[float, float]:
        got = candidate(sigma, rate, k)
        given = f"sigma_A {sigma:.3f}, rate {rate:.4f}, k {k:.3f}: you return {got!r}"
        if not is_several(got, 2) or not all(map(is_number, got)):
            raise Wrong(given, "Which two numbers does the task ask for?", rule)
        new = float(got[0]), float(got[1])
        if not all(math.isfinite(value) and value > 0 for value in new):
            raise Wrong(given, "Can training start from such a size, at such a rate?", rule)
        root = 1 / math.sqrt(k)
        if agree(new, (root, root)):
            raise Wrong(f"{given}; these are factors", "Which numbers are they factors of?", rule)
        if agree(new, (rate * root, sigma * root)):
            raise Wrong(f"{given}; these are swapped", "Which of the two numbers comes first?", rule)
        return new

    def start() -> None:
        for larger in (True, False):
            answer(*settings(larger)[1:])

    def run(steps: int, larger: bool) -> None:
        for _ in range(3):
            scale, sigma, rate, k = settings(larger)
            new, problem = answer(sigma, rate, k), drawn_problem()
            old = adam_update(scale, sigma, rate, problem, steps)
            other = adam_update(k * scale, *new, problem, steps)
            if (off := off_by(other, old)) > 1e-6:
                of_sigma, of_rate = (
                    round(math.log(a / b) / math.log(k), 6) for a, b in zip(new, (sigma, rate), strict=True)
                )
                raise Wrong(
                    f"k = {k:.3f}, after {steps} step{'s' * (steps > 1)} of Adam: the update differs by {off:.0%} "
                    f"(your sigma_A is times k^{of_sigma:.3g}, "
                    f"your rate times k^{of_rate:.3g})",
                    *(after_one(of_sigma, of_rate) if steps == 1 else after_many(of_sigma, of_rate)),
                )

    def after_one(of_sigma: float, of_rate: float) -> tuple[str, str]:
        if (of_sigma, of_rate) == (-0.5, -1):
            return (
                "This would be right for plain SGD, whose step grows with the gradient. Does Adam's?",
                f"Adam moves every entry by about the rate, however small its gradient. {rule}",
            )
        about: dict[tuple[float, float], str] = {
            (0, 0): "The scale has grown, and nothing has shrunk.",
            (-0.5, 0): "A is smaller now. What sets how large B gets?",
            (0, -0.5): "B is smaller now. And A?",
            (-1, -1): "You divide by k twice, once through A and once through B.",
            (0.5, 0.5): "If the scale grows, must A and B grow or shrink?",
        }
        said = about.get((of_sigma, of_rate), "")
        question = "After one step B is ± the rate, A as it began: which product of three numbers is the update's size?"
        return f"{said} {question}".strip(), f"scale · sigma_A · rate must stay what it was. {rule}"

    def after_many(of_sigma: float, of_rate: float) -> tuple[str, str]:
        about: dict[tuple[float, float], str] = {
            (0, -1): "You take the scale for a learning rate: for one step it is, then not.",
            (-1, 0): "All of k goes into the start of A.",
        }
        said = about.get((of_sigma, of_rate), "One step agrees, more do not.")
        return (
            f"{said} Adam moves an entry of A by about the rate: how far is that, compared to where A started?",
            f"rate / sigma_A must stay what it was, too, or A turns at another pace. {rule}",
        )

    steps = [
        ("two positive numbers", start),
        ("the same update after one step", lambda: run(1, True)),
        (f"the same update after {STEPS} steps", lambda: run(STEPS, True)),
        ("also for k below 1", lambda: run(STEPS, False)),
    ]
    return run_steps("the same training", steps, hint)


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
        question, fix = "What does the task want to know about the choice?", "Return Choice(rate, mean, sd, at_edge)."
        rate, mean, sd, at_edge = need_several(got, 4, "four values", question, fix)
        for number in (rate, mean, sd):
            need_number(number, question, fix)
        return rate, mean, sd, at_edge

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
        if not close_number(mean, fmean(chosen)):
            slips = {
                fmean(of_validation): "these are the validation losses, by which you have chosen: they are too good",
                fmean(everything): "this is the mean over all rates",
                min(chosen): "this is the best seed, not the mean",
                max(chosen): "this is the worst seed, not the mean",
            }
            note = known_slip(mean, slips.items(), otherwise="not the mean of its runs")
            raise Wrong(
                f"the rate is right; your test loss is {mean:.4f} instead of {fmean(chosen):.4f}: {note}",
                "Which runs and which split tell how good the choice is on new data?",
                "The mean of the test losses of the chosen rate, over its seeds.",
            )
        if not close_number(sd, stdev(chosen)):
            slips = {
                pstdev(chosen): f"this divides by n = {len(chosen)}, as if the seeds were all there are",
                stdev(chosen) / len(chosen) ** 0.5: "this is the error of the mean, not the spread of the seeds",
                stdev(chosen) ** 2: "this is the variance",
                max(chosen) - min(chosen): "this is the range, which grows with the number of seeds",
                stdev(of_validation): "this is the spread on the validation split",
            }
            if math.isfinite(sum(everything)):
                slips[stdev(everything)] = "this is the spread over all rates: the rate is no chance"
            note = known_slip(sd, slips.items(), otherwise="not the sample's deviation")
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
        for bad in (math.nan, math.inf):
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
                losses[rates[beyond]] = {seed: (math.nan, math.nan) for seed in seeds}
                where += ", as the one beyond was tried and diverged"
            in_front = rates[best] if best == 2 else None  # of the runs, whose order says nothing
            rate, _, _, at_edge = asked(runs_of(losses, first=in_front))
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
            losses[rate][seed] = (math.nan, math.nan)
        need_refusal(
            lambda: asked(runs_of(losses)),
            lambda got: f"at each rate one run diverged, and you return {got}",
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


def fair_difference(candidate: Callable[[list[Run], list[Run]], Sequence[Any]], hint: int = 1) -> Report:
    """Exercise C1 of lesson 10: ``candidate(runs_a, runs_b)`` is (mean, sd, n) of b − a, paired by seed."""
    fix = (
        "Take both best rates from pick_best, then the list of test_b[seed] − test_a[seed] over the seeds in common: "
        "its mean, its statistics.stdev, its length."
    )

    def asked(a: Losses, b: Losses) -> tuple[float, float, int]:
        got = candidate(runs_of(a), runs_of(b))
        for number in need_several(got, 3, "three values", "How far, how sure, from how many?", fix):
            need_number(number, "How far, how sure, from how many?", fix)
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
        if not close_number(mean, fmean(right)):
            note = known_slip(mean, slips.items(), otherwise="not b − a at the best rates")
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
        if not close_number(sd, stdev(right)):
            note = known_slip(sd, slips.items(), otherwise="are the runs paired by seed?")
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
        need_refusal(
            lambda: candidate(runs_of(a), runs_of(b)),
            lambda got: f"with one seed in common you return {tuple(got)}",
            "What is the spread of one number?",
            "Raise ValueError.",
        )

    steps: list[Step] = [
        ("each at its own best rate, paired by seed", own_rates),
        ("seeds without a partner are left out", partners),
        ("fewer than two pairs: ValueError", too_few),
    ]
    return run_steps("a fair difference", steps, hint)


MOVE = "Return best / factor or best * factor as long as the best rate is the lowest or the highest one, then None."


def next_rate(candidate: Callable[..., float | None], hint: int = 1) -> Report:
    """*Your turn* in lesson 10: ``candidate(tried, factor)`` is the rate to try next, or None once it is bracketed."""

    def drawn(best: int, number: int, factor: float) -> dict[float, float]:
        """Losses of a valley with its lowest point at that place, in any order."""
        lowest = random.uniform(1e-4, 1e-2)
        losses = {lowest * factor**i: 4 + 0.3 * abs(i - best) + random.uniform(0, 0.1) for i in range(number)}
        return dict(random.sample(sorted(losses.items()), number))

    def asked(tried: Mapping[float, float], factor: float) -> tuple[float | None, str]:
        got = candidate(dict(tried), factor)
        given = ", ".join(f"{rate:.2g}: {loss:.2f}" for rate, loss in sorted(tried.items()))
        if got is not None:
            need_number(got, "What is tried next: a rate, or nothing?", MOVE)
        return got, f"tried {{{given}}} with factor {factor:g}: you return {got if got is None else f'{got:.3g}'}"

    def need_rate(tried: Mapping[float, float], factor: float, *right: float) -> None:
        got, told = asked(tried, factor)
        if got is not None and any(close_number(got, rate, 1e-6) for rate in right):
            return
        low, high = min(tried), max(tried)
        finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
        if got is None:
            note = "the best rate has no worse one on one of its sides, so a better one may lie there"
        elif any(close_number(got, rate, 1e-6) for rate in tried):
            note = "that rate has been tried"
        elif finite and close_number(got, max(finite, key=finite.__getitem__) * factor, 1e-6):
            note = "that is beyond the rate with the highest loss"
        elif factor != 3 and any(close_number(got, edge, 1e-6) for edge in (low / 3, high * 3)):
            note = "the right way, by a factor of 3"
        elif (got > high and right[0] < low) or (got < low and right[0] > high):
            note = "the wrong way"
        else:
            note = "neither the lowest rate divided by the factor nor the highest times it"
        raise Wrong(
            f"{told} instead of {right[0]:.3g}: {note}",
            "On which side of the best rate has nothing worse been tried yet?",
            MOVE,
        )

    def need_end(tried: Mapping[float, float], factor: float) -> None:
        got, told = asked(tried, factor)
        if got is not None:
            raise Wrong(
                f"{told} instead of None, though a lower and a higher rate are both worse than the best",
                "When do you know on both sides that it gets worse?",
                MOVE,
            )

    def edge(high: bool) -> None:
        for number in (2, 3, 5):
            factor = random.choice((2.0, 5.0, 10.0))
            tried = drawn(number - 1 if high else 0, number, factor)
            need_rate(tried, factor, max(tried) * factor if high else min(tried) / factor)

    def bracketed() -> None:
        for best, number in ((1, 3), (2, 5), (3, 5), (1, 4)):
            factor = random.choice((2.0, 5.0, 10.0))
            need_end(drawn(best, number, factor), factor)

    def diverged() -> None:
        for bad in (math.nan, math.inf):
            tried = drawn(0, 3, 3.0)
            low, middle, high = sorted(tried)
            need_rate({high: bad, middle: bad, low: tried[low]}, 3.0, low / 3)
            need_end({high: bad, low: tried[middle], middle: tried[low]}, 3.0)
            need_end({low: bad, high: tried[middle], middle: tried[low]}, 3.0)

    def none_left() -> None:
        for number in (2, 3):
            rates = sorted(drawn(0, number, 3.0))
            for order in (rates, rates[::-1]):
                need_rate({rate: random.choice((math.nan, math.inf)) for rate in order}, 3.0, rates[0] / 3)

    def alone() -> None:
        ((rate, loss),) = drawn(0, 1, 3.0).items()
        need_rate({rate: loss}, 4.0, rate / 4, rate * 4)

    steps: list[Step] = [
        ("the best is the highest rate tried: go higher", lambda: edge(True)),
        ("the best is the lowest rate tried: go lower", lambda: edge(False)),
        ("worse rates on both sides: None", bracketed),
        ("a run that diverged is worse than any other", diverged),
        ("all runs diverged: go below the lowest", none_left),
        ("one rate alone", alone),
    ]
    return run_steps("the next rate", steps, hint)


TOUCH = "best = min(results.values(), key=mean); the first setting for which min(losses) <= max(best)."


def best_within_noise(candidate: Callable[[Mapping[Any, list[float]]], Any], hint: int = 1) -> Report:
    """*Your turn* in lesson 10: ``candidate(results)`` is the cheapest setting whose range touches the best one's."""

    def around(low: float, high: float) -> list[float]:
        """The losses of three to five seeds from the lowest to the highest, in any order."""
        losses = [low, high, *(random.uniform(low, high) for _ in range(random.randint(1, 3)))]
        random.shuffle(losses)
        return losses

    def need(ranges: Sequence[tuple[float, float]], right: int, question: str) -> None:
        """``ranges`` are the lowest and the highest loss of each setting, the cheapest first."""
        names = random.sample((1, 2, 4, 8, 16, 32, 64), len(ranges))  # in the order of their cost, not of their size
        results = {
            name: around(2 + low, 2 + high) if low < high else [2 + low] * 3
            for name, (low, high) in zip(names, ranges, strict=True)
        }
        got = candidate({name: list(losses) for name, losses in results.items()})
        if isinstance(got, int) and got == names[right]:
            return
        means = {name: fmean(losses) for name, losses in results.items()}
        best = min(means, key=means.__getitem__)
        limit = max(results[best])
        if not (isinstance(got, int) and got in results):
            note = "that is not one of the settings"
        elif min(results[got]) > limit:
            note = "each of its seeds is worse than the worst of the best setting"
        elif got == best:
            note = "it has the lowest mean, and a cheaper one cannot be told from it"
        else:
            note = "a cheaper one cannot be told from the best either"
        told = ", ".join(f"{name}: {min(ls):.2f} to {max(ls):.2f}" for name, ls in results.items())
        raise Wrong(
            f"the cheapest first, {told}: you return {got!r} instead of {names[right]}; {note}", question, TOUCH
        )

    def clear() -> None:
        which = "Which settings have a seed that is as good as the worst seed of the best one?"
        need([(0.9, 1.0), (0.6, 0.7), (0.1, 0.2)], 2, which)
        need([(0.6, 0.7), (0.1, 0.2), (0.4, 0.5)], 1, which)
        need([(0.1, 0.2), (0.6, 0.7), (0.3, 0.5)], 0, which)

    def touching() -> None:
        order = "Several settings are as good as the best. In which order do you look at them?"
        need([(0.9, 1.0), (0.18, 0.4), (0.1, 0.2)], 1, order)
        need([(0.9, 1.0), (0.17, 0.5), (0.15, 0.3), (0.1, 0.2), (0.6, 0.7)], 1, order)
        need([(0.19, 0.6), (0.9, 1.0), (0.1, 0.2), (0.12, 0.3)], 0, order)

    def chain() -> None:
        neighbour = "With which setting do you compare: with the best, or with the next one?"
        need([(0.25, 0.45), (0.18, 0.3), (0.1, 0.2)], 1, neighbour)
        need([(0.55, 0.8), (0.4, 0.6), (0.25, 0.45), (0.1, 0.2)], 3, neighbour)

    def lucky() -> None:
        """One seed of 16 is the lowest of all, and its mean is high; by the mean 4 is the best, and 16 touches it."""
        results = {8: [2.30, 2.31, 2.32], 32: [2.19, 2.21, 2.20], 16: [2.05, 2.60, 2.58], 4: [2.10, 2.11, 2.12]}
        got = candidate({name: list(losses) for name, losses in results.items()})
        if got != 16:
            note = (
                "one lucky seed does not make a setting the best"
                if got in (8, 32)
                else "16 touches it, and comes first"
            )
            raise Wrong(
                f"the cheapest first, {results}: you return {got!r} instead of 16; {note}",
                "By which number of its seeds is a setting the best: the lowest, or the mean?",
                TOUCH,
            )

    def one_point() -> None:
        same = "Two ranges share one point. Can you tell the settings apart?"
        need([(0.5, 0.75), (0.25, 0.5)], 0, same)  # binary fractions, so that 2.5 is the same number for both
        need([(0.25, 0.25), (0.25, 0.25)], 0, same)

    steps: list[Step] = [
        ("the best, if no cheaper one comes near", clear),
        ("a cheaper one whose range touches that of the best", touching),
        ("compared with the best, not with a neighbour", chain),
        ("the best is the one with the lowest mean", lucky),
        ("ranges that touch in one point", one_point),
    ]
    return run_steps("the best within the noise", steps, hint)


class Valley:
    """A pretended training run: its loss depends on the rate alone, and it remembers for which rates it was called."""

    def __init__(self, optimum: float):
        self.optimum = optimum
        self.calls: list[float] = []
        self.left, self.right = random.uniform(0.4, 0.6), random.uniform(0.6, 0.8)

    def __call__(self, rate: float) -> float:
        need_number(rate, "With what do you call loss_of?", "With one learning rate, a number.")
        if rate <= 0:
            raise Wrong(
                f"you train at the rate {rate}", "Which way is lower?", "Divide by the factor; do not subtract."
            )
        self.calls.append(rate)
        away = math.log10(rate / self.optimum)
        if away > 1.2:
            return math.nan
        return 3.5 + (self.right if away > 0 else self.left) * away**2


# How far the best rate lies from the guess. From 17 times above it on, training at the guess diverges.
NEARBY, FAR, DIVERGING = (1.0, 1.4, 0.7), (3.0, 5.0, 10.0, 17.0, 28.0, 1 / 3, 1 / 5, 1 / 10), (1 / 17, 1 / 20, 1 / 28)
NEAR, RUNS = 1.5, 8


def rate_sweep(candidate: Callable[..., Sequence[Any]], hint: int = 1) -> Report:
    """Exercise B2 of lesson 10: ``candidate(loss_of, guess, budget)`` is (rate, runs, bracketed)."""
    plan = (
        "Go by factors of 3 from the guess until the best rate has a worse one on each side; spend what is left on "
        "finer steps around the best, for instance by √3."
    )

    def asked(valley: Valley, guess: float, budget: int) -> tuple[float, int, bool]:
        question, fix = "What do you want to know after a sweep?", "Return Sweep(rate, runs, bracketed)."

        def loss_of(rate: float) -> float:
            if len(valley.calls) == budget:
                raise Wrong(
                    f"a budget of {budget} runs, and you start run {budget + 1}",
                    "Where do you look at the budget before you train?",
                    "Ask len(tried) < budget before each call of loss_of.",
                )
            return valley(rate)

        got = candidate(loss_of, guess, budget)
        rate, runs, bracketed = need_several(got, 3, "three values", question, fix)
        need_number(rate, question, fix)
        need_whole(runs, question, fix)
        if not isinstance(bracketed, bool | np.bool_):
            raise Wrong(f"bracketed is {bracketed!r}: expected True or False", question, fix)
        return rate, runs, bool(bracketed)

    def found(factors: Sequence[float]) -> None:
        for factor in factors:
            guess = random.uniform(1e-4, 1e-3)
            valley = Valley(guess * factor)
            rate, _, _ = asked(valley, guess, RUNS)
            off = max(rate / valley.optimum, valley.optimum / rate) if rate > 0 else math.inf
            if not any(close_number(rate, tried) for tried in valley.calls):
                raise Wrong(
                    f"you choose the rate {rate:.3g}, and it is none of the {len(valley.calls)} that you tried",
                    "Do you know the loss at this rate?",
                    "Choose one of the rates that you have trained with.",
                )
            if off > NEAR:
                where = ", ".join(f"{each:.2g}" for each in valley.calls)
                raise Wrong(
                    f"guess {guess:.2g}, the best rate is {valley.optimum:.2g}; after {len(valley.calls)} of {RUNS} "
                    f"runs (at {where}) you choose {rate:.2g}, which is a factor of {off:.1f} away",
                    "Is the best rate that you tried between two worse ones, and are there runs left for finer steps?",
                    plan,
                )

    def careful() -> None:
        for factor in (1.0, 10.0, 0.1):
            for budget in (1, 2, 4, RUNS):
                guess = random.uniform(1e-4, 1e-3)
                valley = Valley(guess * factor)
                _, runs, _ = asked(valley, guess, budget)
                calls = len(valley.calls)
                twice = calls - len({float(f"{rate:.6g}") for rate in valley.calls})
                if twice:
                    raise Wrong(
                        f"{twice} of your {calls} runs repeat a rate that you had tried",
                        "Where do you remember what has been tried?",
                        "Keep a dictionary {rate: loss}, and train only with rates that are not in it.",
                    )
                if runs != calls:
                    raise Wrong(
                        f"you report {runs} runs, and loss_of was called {calls} times (budget {budget})",
                        "How many runs were paid for?",
                        "runs = len(tried), if each run puts one rate into it.",
                    )

    def honest() -> None:
        for factor in (*NEARBY, *FAR, *DIVERGING):
            for budget in (2, 3, RUNS):
                guess = random.uniform(1e-4, 1e-3)
                valley = Valley(guess * factor)
                _, _, bracketed = asked(valley, guess, budget)
                losses = {each: valley(each) for each in tuple(valley.calls)}
                finite = {each: loss for each, loss in losses.items() if math.isfinite(loss)}
                best = min(finite, key=finite.__getitem__) if finite else None
                right = best is not None and min(losses) < best < max(losses)
                if bracketed != right:
                    tried = ", ".join(f"{each:.2g}" for each in sorted(losses))
                    raise Wrong(
                        f"budget {budget}, tried {tried}, the best is {best if best is None else f'{best:.2g}'}: "
                        f"you say bracketed = {bracketed}",
                        "Has the best rate a lower one and a higher one beside it among those that were tried?",
                        "bracketed = min(tried) < rate < max(tried).",
                    )

    steps: list[Step] = [
        ("the best rate is near the guess", lambda: found(NEARBY)),
        ("no run beyond the budget, none twice, all reported", careful),
        ("the best rate is far from the guess", lambda: found(FAR)),
        ("runs that diverge", lambda: found(DIVERGING)),
        ("it says whether the best rate lies between two worse ones", honest),
    ]
    return run_steps("a sweep within a budget", steps, hint)
