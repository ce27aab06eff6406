"""The checks of lesson 10 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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


def amplified(
    below: Callable[..., Tensor] = lambda W, U, S, Vh, r: U[:, :r].T @ W @ Vh[:r].T,
    above: Callable[..., Tensor] = lambda delta, S, r: delta.norm(),
    power: int = 1,
    of: str = "delta",
) -> Callable[[Tensor, Tensor, int], Any]:
    """The factor with switches for its mistakes."""

    def factor(W: Tensor, delta: Tensor, r: int) -> float:
        U, S, Vh = torch.linalg.svd(delta if of == "delta" else W, full_matrices=False)
        return (above(delta, S, r) / below(W, U, S, Vh, r).norm()).item() ** power

    return factor


RIGHT_BELOW = "an update of rank r"
AMPLIFICATION = {
    "no projection": (amplified(below=lambda W, U, S, Vh, r: W), RIGHT_BELOW, "not projected"),
    "W's own directions": (amplified(of="W"), RIGHT_BELOW, "not those of ΔW"),
    "the output side only": (amplified(below=lambda W, U, S, Vh, r: U[:, :r].T @ W), RIGHT_BELOW, "output side only"),
    "the input side only": (amplified(below=lambda W, U, S, Vh, r: W @ Vh[:r].T), RIGHT_BELOW, "input side only"),
    "columns of Vh": (
        amplified(below=lambda W, U, S, Vh, r: U[:, :r].T @ W @ Vh[:, :r]),
        RIGHT_BELOW,
        "the rows of Vh, not its columns",
    ),
    "the weakest directions": (
        amplified(below=lambda W, U, S, Vh, r: U[:, -r:].T @ W @ Vh[-r:].T),
        RIGHT_BELOW,
        "weakest directions",
    ),
    "squared norms": (amplified(power=2), RIGHT_BELOW, "squared norms"),
    "upside down": (amplified(power=-1), RIGHT_BELOW, "upside down"),
    "the largest singular value": (amplified(above=lambda d, S, r: S[0]), RIGHT_BELOW, "largest singular value"),
    "all directions": (amplified(below=lambda W, U, S, Vh, r: U.T @ W @ Vh.T), RIGHT_BELOW, "all directions"),
    "only the top of ΔW above": (
        amplified(above=lambda d, S, r: S[:r].norm()),
        "more directions than r",
        "the norm of all of ΔW",
    ),
    "a matrix": (lambda W, delta, r: delta / W.norm(), RIGHT_BELOW, "a tensor of shape"),
}


def overwritten(W: Tensor, delta: Tensor, r: int) -> float:
    """Makes both the same diagonal, whose factor is known."""
    for matrix in (W, delta):
        matrix.zero_().fill_diagonal_(1)
    return math.sqrt(min(W.shape) / r)


AMPLIFICATION["weights overwritten"] = (overwritten, "update of rank r", "instead of")
RIGHT_AMPLIFICATION = {
    "with switches": amplified(),
    "by an index sum": lambda W, delta, r: by_index_sum(W, delta, *torch.linalg.svd(delta)[::2], r),
    "of projectors": lambda W, delta, r: by_projectors(W, delta, *torch.linalg.svd(delta)[::2], r),
}


def by_index_sum(W: Tensor, delta: Tensor, U: Tensor, Vh: Tensor, r: int) -> Tensor:
    return delta.norm() / torch.einsum("oa,oi,bi->ab", U[:, :r], W, Vh[:r]).norm()


def by_projectors(W: Tensor, delta: Tensor, U: Tensor, Vh: Tensor, r: int) -> float:
    return (delta.norm() / (U[:, :r] @ U[:, :r].T @ W @ Vh[:r].T @ Vh[:r]).norm()).item()


test_other_amplifications_pass = each_passes(checks.amplification, RIGHT_AMPLIFICATION)
test_amplification_names_the_mistake = each_is_found(checks.amplification, AMPLIFICATION)


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


def left(matrix: Tensor, full: bool = False) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=full)[0]


def right(matrix: Tensor) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[2].T


def counting(
    known: Callable[[Tensor, int], Tensor] = lambda W, k: left(W),
    new: Callable[[Tensor, Tensor, int], Tensor] = lambda W, tuned, k: left(tuned)[:, :k],
    size: Callable[[Tensor], Tensor] = torch.abs,
    best: Callable[[Tensor], Tensor] = lambda cosines: cosines.amax(0),
    below: Callable[[Tensor, float], Tensor] = torch.lt,
) -> Callable[[Tensor, Tensor, int, float], int]:
    """The count with switches for its mistakes."""
    return lambda W, tuned, k, threshold: int(below(best(size(known(W, k).T @ new(W, tuned, k))), threshold).sum())


INTRUDERS = {
    "right vectors": (
        counting(known=lambda W, k: right(W), new=lambda W, tuned, k: right(tuned)[:, :k]),
        "rotated inputs",
        "right singular vectors",
    ),
    "signed cosines": (counting(size=lambda cosines: cosines), "rotated inputs", "a sign is arbitrary"),
    "the mean instead of the largest": (counting(best=lambda cosines: cosines.mean(0)), "rotated inputs", "mean"),
    "the smallest cosine": (counting(best=lambda cosines: cosines.amin(0)), "rotated inputs", "nor the smallest"),
    "the pretrained top only": (
        counting(known=lambda W, k: left(W)[:, :k]),
        "order has changed",
        "top directions only",
    ),
    "number i with number i": (
        counting(known=lambda W, k: left(W)[:, :k], best=torch.diagonal),
        "order has changed",
        "number i with number i",
    ),
    "the known ones": (counting(below=torch.ge), "rotated inputs", "you count the known ones"),
    "the other dimension": (counting(best=lambda cosines: cosines.amax(1)), "rotated inputs", "that were lost"),
    "all of the tuned weight": (counting(new=lambda W, tuned, k: left(tuned)), "rotated outputs", "not at its top"),
    "the tuned weight's weakest": (
        counting(new=lambda W, tuned, k: left(tuned)[:, -k:]),
        "rotated outputs",
        "weakest directions",
    ),
    "the update's directions": (
        counting(new=lambda W, tuned, k: left(tuned - W)[:, :k]),
        "rotated inputs",
        "the directions of the update",
    ),
    "the full U": (
        counting(known=lambda W, k: left(W, full=True)),
        "rotated outputs|W maps nothing to",  # the first only where a left-over direction happens to come near
        "maps nothing to",
    ),
    "squared cosines": (counting(size=torch.square), "rotated outputs", "squared cosines"),
    "pairs": (counting(best=lambda cosines: cosines), "rotated inputs", "pairs, not directions"),
    "a share": (lambda W, tuned, k, t: counting()(W, tuned, k, t) / k, "rotated inputs", "expected a whole number"),
    "a threshold of its own": (
        lambda W, tuned, k, t: counting()(W, tuned, k, 0.5),
        "rotated outputs",
        "threshold stays at 0.5",
    ),
}
test_intruders_names_the_mistake = each_is_found(checks.intruders, INTRUDERS)


def test_a_count_by_loops_passes_too() -> None:
    def by_loops(W: Tensor, tuned: Tensor, top_k: int, threshold: float) -> Tensor:
        count = torch.tensor(0)
        for y in left(tuned).T[:top_k]:
            count += all(abs(torch.dot(x, y)) < threshold for x in left(W).T)
        return count

    assert checks.intruders(by_loops).status == "passed"


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
