"""The checks of lesson 10 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from found import assert_random_state_kept, each_is_found, each_passes
from lora_edu.course import checks

pytestmark = pytest.mark.graders
NOTEBOOK = "10_choosing_hyperparameters"


SAME_TRAINING = {
    "nothing changes": (lambda a, eta, k: (a, eta), "one step", "nothing has shrunk"),
    "the scale taken for a rate": (lambda a, eta, k: (a, eta / k), "12 steps", "take the scale for a learning rate"),
    "all in A": (lambda a, eta, k: (a / k, eta), "12 steps", "goes into the start of A"),
    "uneven": (lambda a, eta, k: (a / k**0.25, eta / k**0.75), "12 steps", "rate / sigma_A must stay"),
    "A alone": (lambda a, eta, k: (a / k**0.5, eta), "one step", "how large B gets"),
    "B alone": (lambda a, eta, k: (a, eta / k**0.5), "one step", "B is smaller now. And A?"),
    "both by k": (lambda a, eta, k: (a / k, eta / k), "one step", "divide by k twice"),
    "the other way round": (lambda a, eta, k: (a * k**0.5, eta * k**0.5), "one step", "grow or shrink"),
    "SGD's": (lambda a, eta, k: (a / k**0.5, eta / k), "one step", "right for plain SGD"),
    "by k squared": (lambda a, eta, k: (a / k**2, eta / k**2), "one step", "which product of three numbers"),
    "swapped": (lambda a, eta, k: (eta / k**0.5, a / k**0.5), "two positive", "these are swapped"),
    "factors": (lambda a, eta, k: (k**-0.5, k**-0.5), "two positive", "these are factors"),
    "one number": (lambda a, eta, k: eta / k**0.5, "two positive", "Which two numbers"),
    "whole numbers": (lambda a, eta, k: (a // k**0.5, eta // k**0.5), "two positive", "Can training start"),
}
test_same_training_names_the_mistake = each_is_found(checks.same_training, SAME_TRAINING)


def chosen(
    split: str = "validation",
    report: str = "test",
    of_rate: Callable[[list[float]], float] = statistics.fmean,
    pick: Callable[..., float] = min,
    complete: str = "both",
    centre: Callable[[list[float]], float] = statistics.fmean,
    deviation: Callable[[list[float]], float] = statistics.stdev,
    over: str = "chosen",
    edge: str = "tried",
    give_up: bool = False,
    seeds: list[int] | None = None,
) -> Callable[[list[dict]], tuple]:
    """The choice with switches for its mistakes."""

    def choice(runs: list[dict]) -> tuple:
        wanted = set(seeds or [line["job"]["seed"] for line in runs])
        groups: dict[float, list[dict]] = {}
        for line in runs:
            groups.setdefault(line["job"]["learning_rate"], []).append(line)
        kept = {}
        for rate, lines in groups.items():
            if complete == "finite rows":
                lines = [line for line in lines if math.isfinite(line["validation"])]
            finite = all(math.isfinite(line["validation"]) for line in lines)
            there = {line["job"]["seed"] for line in lines} >= wanted
            if (
                lines
                and (there or complete in ("finite", "no", "finite rows"))
                and (finite or complete in ("all", "no"))
            ):
                kept[rate] = lines
        if not kept and not give_up:
            raise ValueError("no complete rate")
        kept = kept or groups
        best = pick(kept, key=lambda rate: of_rate([line[split] for line in kept[rate]]))
        values = [line[report] for line in (kept[best] if over == "chosen" else runs)]
        tried = {
            "tried": groups,
            "complete": kept,
            "upper": {min(groups) / 2: 0, max(groups): 0},
            "first and last": {runs[0]["job"]["learning_rate"]: 0, runs[-1]["job"]["learning_rate"]: 0},
        }[edge]
        ends = (min(tried), max(tried)) if edge != "first and last" else tuple(tried)
        return best, centre(values), deviation(values), best in ends

    return choice


def pstdev_of_mean(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def mean_rate(runs: list[dict]) -> tuple:
    found = chosen()(runs)
    return statistics.fmean({line["job"]["learning_rate"] for line in runs}), *found[1:]


LOWEST = "the lowest mean on validation"
PICK_BEST = {
    "chosen on test": (chosen(split="test"), LOWEST, "no test any more"),
    "one lucky seed": (chosen(of_rate=min), LOWEST, "one lucky seed"),
    "the highest": (chosen(pick=max), LOWEST, "highest validation loss"),
    "averaged over rates": (chosen(over="all"), LOWEST, "mean over all rates"),
    "an averaged rate": (mean_rate, LOWEST, "nobody tried it"),
    "validation reported": (chosen(report="validation"), LOWEST, "by which you have chosen"),
    "the best seed reported": (chosen(centre=min), LOWEST, "the best seed, not the mean"),
    "population deviation": (chosen(deviation=statistics.pstdev), LOWEST, "divides by n ="),
    "error of the mean": (chosen(deviation=pstdev_of_mean), LOWEST, "error of the mean"),
    "variance": (chosen(deviation=statistics.variance), LOWEST, "the variance"),
    "range": (chosen(deviation=lambda values: max(values) - min(values)), LOWEST, "the range"),
    "three values": (lambda runs: chosen()(runs)[:3], LOWEST, "expected four values"),
    "seeds 0, 1, 2": (chosen(seeds=[0, 1, 2]), LOWEST, "They need not be 0, 1, 2"),
    "a missing seed ignored": (chosen(complete="finite"), "lacks a seed", "seeds: its mean is over other runs"),
    "a diverged run left out": (
        chosen(complete="finite rows"),
        "lacks a seed|diverged",
        "its mean is over other runs|a run diverged",
    ),
    "NaN among the losses": (chosen(complete="all"), "diverged", "some runs diverged"),
    "nothing left out": (chosen(complete="no"), "lacks a seed", "its mean is over other runs"),
    "edge of the complete ones": (chosen(edge="complete"), "at the edge", "was tried and diverged"),
    "upper edge only": (chosen(edge="upper"), "at the edge", "the lowest; you say at_edge = False"),
    "edge by the order of the runs": (chosen(edge="first and last"), "at the edge", "in any order"),
    "never refuses": (chosen(give_up=True), "no complete rate", "Raise ValueError"),
}

PICK_BEST["texts"] = (lambda runs: tuple(map(str, chosen()(runs))), "the lowest mean", "expected a number")
test_other_choices_pass = each_passes(checks.pick_best, {"with switches": chosen()})
test_pick_best_names_the_mistake = each_is_found(checks.pick_best, PICK_BEST)


def difference(
    rates: Callable[[float, float], tuple[float, float]] = lambda a, b: (a, b),
    split: str = "validation",
    report: str = "test",
    paired: str = "seed",
    deviation: Callable[[list[float]], float] = statistics.stdev,
    sign: int = 1,
    fewest: int = 2,
) -> Callable[[list[dict], list[dict]], tuple]:
    """The difference with switches for its mistakes."""

    def fair(runs_a: list[dict], runs_b: list[dict]) -> tuple:
        best = rates(*(chosen(split=split)(runs)[0] for runs in (runs_a, runs_b)))
        a, b = (
            {line["job"]["seed"]: line[report] for line in runs if line["job"]["learning_rate"] == rate}
            for runs, rate in zip((runs_a, runs_b), best, strict=True)
        )
        gaps = [b[seed] - a[seed] for seed in a if seed in b]
        if len(gaps) < fewest:
            raise ValueError("too few pairs")
        mean, n = statistics.fmean(gaps), len(gaps)
        one, other = list(a.values()), list(b.values())
        if paired == "means":
            mean = statistics.fmean(other) - statistics.fmean(one)
        sd = {
            "seed": lambda: deviation(gaps),
            "means": lambda: deviation(gaps),
            "squares": lambda: math.hypot(statistics.stdev(one), statistics.stdev(other)),
            "pooled": lambda: math.sqrt((statistics.variance(one) + statistics.variance(other)) / 2),
            "minus": lambda: abs(statistics.stdev(one) - statistics.stdev(other)),
            "order": lambda: deviation([y - x for x, y in zip(one, other, strict=False)]),
            "runs": lambda: deviation(gaps),
        }[paired]()
        return sign * mean, sd, n if paired != "runs" else len(runs_a) + len(runs_b)

    return fair


OWN = "each at its own best rate"
FAIR_DIFFERENCE = {
    "a minus b": (difference(sign=-1), OWN, "this is a − b"),
    "the size alone": (lambda a, b: (abs(difference()(a, b)[0]), *difference()(a, b)[1:]), OWN, "the size alone"),
    "a's rate for both": (difference(rates=lambda a, b: (a, a)), OWN, "b runs at a's best rate"),
    "b's rate for both": (difference(rates=lambda a, b: (b, b)), OWN, "a runs at b's best rate"),
    "chosen on test": (difference(split="test"), OWN, "chosen on the test split"),
    "validation losses": (difference(report="validation"), OWN, "the validation losses"),
    "spreads added in squares": (difference(paired="squares"), OWN, "nothing in common"),
    "pooled spread": (difference(paired="pooled"), OWN, "the two spreads' mean"),
    "spreads subtracted": (difference(paired="minus"), OWN, "do not subtract"),
    "paired by order": (difference(paired="order"), OWN, "paired by seed"),
    "population deviation": (difference(deviation=statistics.pstdev), OWN, "divides by n"),
    "error of the mean": (difference(deviation=pstdev_of_mean), OWN, "error of the mean"),
    "all runs counted": (difference(paired="runs"), OWN, "you say n ="),
    "seeds without a partner": (difference(paired="means"), "without a partner", "only one of the two has"),
    "one pair is enough": (
        difference(fewest=1, deviation=lambda gaps: statistics.stdev(gaps) if len(gaps) > 1 else 0.0),
        "fewer than two",
        "the spread of one number",
    ),
}
FAIR_DIFFERENCE["no numbers"] = (lambda a, b: (None, None, None), OWN, "expected a number")
test_other_differences_pass = each_passes(checks.fair_difference, {"with switches": difference()})
test_fair_difference_names_the_mistake = each_is_found(checks.fair_difference, FAIR_DIFFERENCE)


def test_a_difference_waits_for_the_choice(from_solution: Callable, from_stub: Callable) -> None:
    def built_on(pick_best: Callable) -> Callable:
        def fair(runs_a: list, runs_b: list) -> Any:
            pick_best(runs_a)
            return difference()(runs_a, runs_b)

        return fair

    assert checks.fair_difference(built_on(from_stub(NOTEBOOK, "pick_best"))).status == "not done"
    assert checks.fair_difference(built_on(from_solution(NOTEBOOK, "pick_best"))).status == "passed"


def test_checks_leave_the_random_state_alone() -> None:
    assert_random_state_kept(checks.same_training, lambda a, eta, k: (a / k**0.5, eta / k**0.5))


def next_rate(
    default: float = 3,
    diverged: str = "worst",
    choose: Callable[..., Any] = min,
    end: Callable[[float], Any] = lambda best: None,
    lower: Callable[[float, float], float] = lambda rate, factor: rate / factor,
    order: Callable[[Any], list] = sorted,
    fixed: float | None = None,
    edges: str = "rates",
) -> Callable[..., Any]:
    """The rule with switches for its mistakes."""

    def rule(tried: dict[float, float], factor: float = default) -> float | None:
        factor = fixed or factor
        rates = order(tried)
        losses = {
            rate: math.inf if diverged == "worst" and not math.isfinite(tried[rate]) else tried[rate] for rate in rates
        }
        if diverged == "left out":
            losses = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
            rates = list(losses)
        best = choose(losses, key=losses.get)
        first, last = (rates[0], rates[-1]) if edges == "order" else (min(rates), max(rates))
        if best == first:
            return lower(best, factor)
        return best * factor if best == last else end(best)

    return rule


HIGHER, LOWER, END = "go higher", "go lower", "worse rates on both sides"
DIVERGED, ALL_DIVERGED = "diverged is worse", "all runs diverged"
NEXT_RATE = {
    "the highest loss": (next_rate(choose=max), HIGHER, "highest loss|the wrong way|worse one on one of its sides"),
    "always higher": (lambda tried, factor=3: max(tried) * factor, LOWER, "the wrong way|the highest loss"),
    "always lower": (lambda tried, factor=3: min(tried) / factor, HIGHER, "the wrong way"),
    "a factor of its own": (next_rate(fixed=3), HIGHER, "by a factor of 3"),
    "a difference": (
        next_rate(lower=lambda rate, factor: rate - factor * rate),
        LOWER,
        "neither the lowest rate divided",
    ),
    "no end": (next_rate(end=lambda best: best * 3), END, "instead of None"),
    "the best again": (next_rate(end=lambda best: best), END, "instead of None"),
    "a finer step": (next_rate(end=lambda best: best * math.sqrt(3)), END, "instead of None"),
    "the first and the last in the dictionary": (
        next_rate(order=list, edges="order"),
        f"{HIGHER}|{LOWER}|{END}|{DIVERGED}",
        "best",
    ),
    "NaN among the losses": (next_rate(diverged="as it is", order=list), DIVERGED, "best"),
    "diverged runs left out": (next_rate(diverged="left out"), DIVERGED, "instead of None"),
    "the highest if all diverged": (
        next_rate(order=lambda tried: sorted(tried, reverse=True)),
        ALL_DIVERGED,
        "the wrong way",
    ),
    "nothing if all diverged": (
        lambda tried, factor=3: next_rate()(tried, factor) if any(map(math.isfinite, tried.values())) else None,
        ALL_DIVERGED,
        "a better one may lie there",
    ),
    "one rate ends it": (
        lambda tried, factor=3: next_rate()(tried, factor) if len(tried) > 1 else None,
        "one rate alone",
        "a better one may lie there",
    ),
    "a text": (lambda tried, factor=3: str(next_rate()(tried, factor)), HIGHER, "expected a number"),
    "the loss": (lambda tried, factor=3: min(tried.values()), HIGHER, "neither the lowest"),
}


def by_places(tried: dict[float, float], factor: float) -> float | None:
    """The same with a sorted list and the place of the best rate in it; a single rate goes up."""
    rates = sorted(tried)
    values = [tried[rate] if math.isfinite(tried[rate]) else 1e9 for rate in rates]
    place = values.index(min(values))
    if place == len(rates) - 1 and values[place] < 1e9:
        return factor * rates[place]
    return rates[0] / factor if place == 0 else None


def by_neighbours(tried: dict[float, float], factor: float) -> float | None:
    """The same by asking whether anything was tried above and below."""
    finite = {rate: loss for rate, loss in tried.items() if loss == loss and loss != float("inf")}
    best = min(finite, key=finite.get) if finite else min(tried)
    if all(rate >= best for rate in tried):
        return best * factor**-1
    return None if any(rate > best for rate in tried) else best * factor


RIGHT_NEXT_RATE = {"with switches": next_rate(), "by places": by_places, "by neighbours": by_neighbours}
test_other_next_rates_pass = each_passes(checks.next_rate, RIGHT_NEXT_RATE)
test_next_rate_names_the_mistake = each_is_found(checks.next_rate, NEXT_RATE)


def within(
    best: Callable[[list[float]], float] = statistics.fmean,
    touch: Callable[[list[float], list[float]], bool] = lambda losses, best: min(losses) <= max(best),
    order: Callable[[Any], list] = list,
) -> Callable[[dict], Any]:
    """The choice with switches for its mistakes."""

    def choice(results: dict[Any, list[float]]) -> Any:
        top = min(results.values(), key=best)
        return next(name for name in order(results) if touch(results[name], top))

    return choice


def by_chain(results: dict[Any, list[float]]) -> Any:
    """Goes from neighbour to neighbour, beginning at the best."""
    names = list(results)
    place = names.index(min(results, key=lambda name: statistics.fmean(results[name])))
    while place and min(results[names[place - 1]]) <= max(results[names[place]]):
        place -= 1
    return names[place]


CLEAR, TOUCHES, CHAIN = "no cheaper one comes near", "whose range touches", "not with a neighbour"
BEST_WITHIN_NOISE = {
    "the lowest mean": (
        lambda results: min(results, key=lambda name: statistics.fmean(results[name])),
        TOUCHES,
        "a cheaper one cannot be told from it",
    ),
    "the cheapest": (lambda results: next(iter(results)), CLEAR, "each of its seeds is worse"),
    "the dearest that touches": (
        within(order=lambda results: list(results)[::-1]),
        f"{CLEAR}|{TOUCHES}",
        "a cheaper one",
    ),
    "from neighbour to neighbour": (by_chain, f"{TOUCHES}|{CHAIN}", "each of its seeds is worse|a cheaper one"),
    "the luckiest seed": (within(best=min), "the lowest mean", "one lucky seed"),
    "ranges that must overlap": (
        within(touch=lambda losses, best: losses is best or min(losses) < max(best)),
        "touch in one point",
        "a cheaper one cannot be told",
    ),
    "the mean within the range": (
        within(touch=lambda losses, best: statistics.fmean(losses) <= max(best)),
        TOUCHES,
        "a cheaper one",
    ),
    "the worst within the range": (
        within(touch=lambda losses, best: max(losses) <= max(best)),
        TOUCHES,
        "a cheaper one",
    ),
    "the losses": (lambda results: results[within()(results)], CLEAR, "not one of the settings"),
    "its place": (lambda results: -1 - list(results).index(within()(results)), CLEAR, "not one of the settings"),
}


def by_loop(results: dict[Any, list[float]]) -> Any:
    means = {name: sum(losses) / len(losses) for name, losses in results.items()}
    limit = sorted(results[sorted(means, key=means.get)[0]])[-1]
    for name, losses in results.items():
        if any(loss <= limit for loss in losses):
            return name
    raise AssertionError("the best touches itself")


RIGHT_WITHIN = {"with switches": within(), "by a loop": by_loop}
test_other_choices_within_the_noise_pass = each_passes(checks.best_within_noise, RIGHT_WITHIN)
test_best_within_noise_names_the_mistake = each_is_found(checks.best_within_noise, BEST_WITHIN_NOISE)


TRIED_NEXT = next_rate()


def swept(
    coarse: float = 3,
    fine: int = 2,
    rule: Callable[..., Any] = TRIED_NEXT,
    allowed: Callable[[int], int] = lambda budget: budget,
    choose: Callable[..., Any] = min,
    finite: bool = True,
    runs: Callable[[dict, int], int] = lambda tried, budget: len(tried),
    bracketed: Callable[[dict, float], bool] = lambda tried, best: min(tried) < best < max(tried),
) -> Callable[..., tuple]:
    """The sweep with switches for its mistakes: coarse steps until the best is bracketed, then finer ones."""

    def sweep(loss_of: Callable[[float], float], guess: float, budget: int) -> tuple:
        tried: dict[float, float] = {}

        def lowest() -> float:
            usable = {rate: loss for rate, loss in tried.items() if math.isfinite(loss) or not finite}
            return choose(usable, key=usable.get) if usable else min(tried)

        rate = guess
        while rate is not None and len(tried) < allowed(budget):
            tried[rate] = loss_of(rate)
            rate = rule(tried, coarse)
        step = coarse
        for _ in range(fine):
            step, best = math.sqrt(step), lowest()
            for rate in (best / step, best * step):
                if len(tried) < allowed(budget):
                    tried[rate] = loss_of(rate)
        best = lowest()
        return best, runs(tried, budget), bracketed(tried, best)

    return sweep


def grid(loss_of: Callable[[float], float], guess: float, budget: int) -> tuple:
    """A grid over three decades, fixed beforehand."""
    rates = [guess * 1000 ** (i / max(budget - 1, 1) - 0.5) for i in range(budget)]
    tried = {rate: loss_of(rate) for rate in rates}
    usable = {rate: loss if math.isfinite(loss) else math.inf for rate, loss in tried.items()}
    best = min(usable, key=usable.get)
    return best, budget, min(tried) < best < max(tried)


def confirming(loss_of: Callable[[float], float], guess: float, budget: int) -> tuple:
    """Keeps one run, and trains with the best rate once more."""
    rate, runs, bracketed = swept(allowed=lambda budget: max(1, budget - 1))(loss_of, guess, budget)
    if runs < budget:
        loss_of(rate)
        runs += 1
    return rate, runs, bracketed


NEAR, FAR, CAREFUL, HONEST = "near the guess", "far from the guess", "beyond the budget", "two worse ones"
RATE_SWEEP = {
    "over the budget": (swept(allowed=lambda budget: budget + 1), f"{NEAR}|{CAREFUL}", "you start run"),
    "no budget at all": (swept(allowed=lambda budget: 99, fine=4), f"{NEAR}|{CAREFUL}", "you start run"),
    "coarse steps only": (swept(fine=0), f"{NEAR}|{FAR}", "which is a factor of"),
    "a fixed grid": (grid, f"{NEAR}|{FAR}", "which is a factor of"),
    "around the guess only": (swept(rule=lambda tried, factor: None, fine=4), f"{NEAR}|{FAR}", "which is a factor of"),
    "always upwards": (swept(rule=lambda tried, factor: max(tried) * factor), f"{NEAR}|{FAR}", "which is a factor of"),
    "the highest loss": (swept(choose=max), NEAR, "which is a factor of"),
    "NaN among the losses": (swept(finite=False), "runs that diverge", "which is a factor of"),
    "the best rate once more": (confirming, CAREFUL, "repeat a rate"),
    "the mean of the best": (
        lambda loss_of, guess, budget: (swept()(loss_of, guess, budget)[0] * 1.01, *swept()(lambda r: 4.0, 1, 1)[1:]),
        NEAR,
        "it is none of the",
    ),
    "the budget reported": (swept(runs=lambda tried, budget: budget, fine=1), CAREFUL, "you report"),
    "a hundredfold guess": (
        lambda loss_of, guess, budget: swept()(loss_of, guess * 100, budget),
        f"{NEAR}|{FAR}",
        "which is a factor of",
    ),
    "always bracketed": (swept(bracketed=lambda tried, best: True), HONEST, "you say bracketed = True"),
    "never bracketed": (swept(bracketed=lambda tried, best: False), HONEST, "you say bracketed = False"),
    "two values": (lambda loss_of, guess, budget: swept()(loss_of, guess, budget)[:2], NEAR, "expected three values"),
    "bracketed as a word": (
        swept(bracketed=lambda tried, best: "yes"),
        NEAR,
        "expected True or False",
    ),
}
RIGHT_SWEEPS = {
    "with switches": swept(),
    "by tens, then finer": swept(coarse=10, fine=3),
    "by fours": swept(coarse=4),
    "a truth value of NumPy": swept(
        bracketed=lambda tried, best: np.less(min(tried), best) & np.less(best, max(tried))
    ),
}


def by_golden_section(loss_of: Callable[[float], float], guess: float, budget: int) -> tuple:
    """Brackets by threes, then always halves the wider of the two intervals beside the best."""
    tried: dict[float, float] = {}

    def value(rate: float) -> float:
        return tried[rate] if math.isfinite(tried[rate]) else math.inf

    rate: float | None = guess
    while len(tried) < budget:
        if rate is None:
            rates = sorted(tried)
            place = rates.index(min(rates, key=value))
            below, best, above = rates[place - 1 : place + 2]
            rate = math.sqrt(best * above) if above / best > best / below else math.sqrt(best * below)
        tried[rate] = loss_of(rate)
        rate = next_rate()(tried)
    best = min(sorted(tried), key=value)
    return best, len(tried), min(tried) < best < max(tried)


RIGHT_SWEEPS["halving the wider side"] = by_golden_section
test_other_sweeps_pass = each_passes(checks.rate_sweep, RIGHT_SWEEPS)
test_rate_sweep_names_the_mistake = each_is_found(checks.rate_sweep, RATE_SWEEP)
