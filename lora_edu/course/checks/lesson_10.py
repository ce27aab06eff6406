"""The checks of lesson 10: a scale (A1), amplification (A2), the best rate (B1), intruders (B2), a difference (C1)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, pstdev, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.course.checks.tools import (
    close_number,
    is_number,
    is_several,
    is_tensor,
    is_whole,
    known_slip,
    low_rank,
    need_number,
    need_refusal,
    need_several,
    normal,
    off_by,
)
from lora_edu.lowrank import amplification_factor, intruder_dimensions

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


def right_factor(W: np.ndarray, delta: np.ndarray, r: int) -> float:
    """The right one, with NumPy."""
    U, _, Vh = np.linalg.svd(delta, full_matrices=False)
    return float(np.linalg.norm(delta) / np.linalg.norm(U[:, :r].T @ W @ Vh[:r].T))


def other_factors(W: Tensor, delta: Tensor, r: int) -> dict[str, float]:
    """What usual mistakes would give here."""
    (U, S, Vh), (own_U, _, own_Vh) = (torch.linalg.svd(each, full_matrices=False) for each in (delta, W))
    projected = {
        "W is not projected, you take its whole norm": W,
        "these are the directions of W, not those of ΔW": own_U[:, :r].T @ W @ own_Vh[:r].T,
        "you project on the output side only": U[:, :r].T @ W,
        "you project on the input side only": W @ Vh[:r].T,
        "you take all directions, not the top r": U.T @ W @ Vh.T,
        "these are ΔW's weakest directions, not its strongest": U[:, -r:].T @ W @ Vh[-r:].T,
    }
    if W.shape[0] >= W.shape[1]:  # else the shapes do not even fit
        projected["input directions are the rows of Vh, not its columns"] = U[:, :r].T @ W @ Vh[:, :r]
    found = {words: (delta.norm() / matrix.norm()).item() for words, matrix in projected.items()}
    right, size = right_factor(W.numpy(), delta.numpy(), r), delta.norm().item()
    return found | {
        "these are squared norms": right**2,
        "this is the factor upside down": 1 / right,
        "the numerator is the norm of all of ΔW, not of its top r directions": right * S[:r].norm().item() / size,
        "the numerator is ΔW's Frobenius norm, not its largest singular value": right * S[0].item() / size,
    }


@without(
    "lora_edu.lowrank",
    symptom="you call {name} of lora_edu.lowrank; this exercise wants the line itself",
    question="Whose directions, on which side, and how many of them? Which of the two norms stands on top?",
    fix="Columns of U and rows of Vh, r of each: delta.norm() / (U[:, :r].T @ W @ Vh[:r].T).norm().",
)
def amplification(candidate: Callable[[Tensor, Tensor, int], float], hint: int = 1) -> Report:
    """Exercise A2 of lesson 10: ``candidate(W, delta, r)`` is ‖ΔW‖ / ‖Uᵀ W V‖ in ΔW's top r directions."""

    def drawn(rank: int | None, tall: bool) -> tuple[Tensor, Tensor]:
        shape = (random.randint(15, 20), random.randint(9, 12))
        shape = shape if tall else shape[::-1]
        W, delta = normal(*shape), normal(*shape)
        if rank:
            delta = low_rank(*shape, rank)
        return W, delta * random.uniform(0.1, 3)

    def compare(tall: bool, full: bool = False) -> None:
        got, wrong, right = [], [], []
        for _ in range(3):
            r = random.randint(2, 4)
            W, delta = drawn(None if full else r, tall)
            value = candidate(W.clone(), delta.clone(), r)
            if not (is_number(value) or is_tensor(value, ())):
                seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise Wrong(
                    f"W is {tuple(W.shape)}, r = {r}: you return {seen}",
                    "Which two norms are divided?",
                    "One number: delta.norm() / (U[:, :r].T @ W @ Vh[:r].T).norm().",
                )
            got.append(float(value))
            wrong.append(other_factors(W, delta, r))
            right.append(right_factor(W.numpy(), delta.numpy(), r))
        if not agree(got, right):
            note = named(got, wrong, "not ΔW's norm over that of W in ΔW's directions")
            raise Wrong(
                f"for W {tuple(W.shape)} and r = {r} you get {got[-1]:.4f} instead of {right[-1]:.4f}: {note}",
                "Whose directions, on which side, and how many of them? Which of the two norms stands on top?",
                "Columns of U and rows of Vh, r of each: delta.norm() / (U[:, :r].T @ W @ Vh[:r].T).norm().",
            )

    def library() -> None:
        W, delta = drawn(None, tall=False)
        got, right = float(candidate(W, delta, 3)), amplification_factor(W, delta, 3)
        if not agree([got], [right]):
            raise Wrong(
                f"you get {got:.6f}, the library {right:.6f}",
                "Does your function do the same at every call?",
                "delta.norm() / (U[:, :r].T @ W @ Vh[:r].T).norm()",
            )

    steps = [
        ("an update of rank r, more outputs than inputs", lambda: compare(True)),
        ("more inputs than outputs", lambda: compare(False)),
        ("an update with more directions than r", lambda: compare(True, full=True)),
        ("equal to the library", library),
    ]
    return run_steps("amplification factor", steps, hint)


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


def rotation(n: int) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(normal(n, n)).Q


def drawn_shape(tall: bool = True) -> tuple[int, int]:
    """(out, in): about 40 rows, so that a random direction has no cosine near 1 with any of W's."""
    large, small = random.randint(38, 46), random.randint(26, 32)
    return (large, small) if tall else (small, large)


def drawn_svd(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of a matrix whose singular values are well apart, so that its directions are unique."""
    n = min(size)
    S = torch.linspace(9, 1, n, dtype=torch.float64) + 0.1 * torch.rand(n, dtype=torch.float64)
    return rotation(size[0])[:, :n], S, rotation(size[1])[:n]


def rotated_inputs(tall: bool) -> Case:
    """Every output direction is known, no input direction is."""
    U, S, Vh = drawn_svd(drawn_shape(tall))
    W = (U * S) @ Vh
    return W, W @ rotation(W.shape[1]), random.randint(6, 12), 0.6


def rotated_outputs(tall: bool) -> Case:
    """Every input direction is known, no output direction is."""
    U, S, Vh = drawn_svd(drawn_shape(tall))
    W = (U * S) @ Vh
    return W, rotation(W.shape[0]) @ W, random.randint(6, 12), random.uniform(0.3, 0.45)


def reordered(tall: bool) -> Case:
    """All directions are known, and the weakest have become the strongest."""
    U, S, Vh = drawn_svd(drawn_shape(tall))
    return (U * S) @ Vh, (U * S.flip(0)) @ Vh, random.randint(5, 9), 0.5


def planted(tall: bool) -> Case:
    """A few new directions, stronger than the known ones."""
    U, S, Vh = drawn_svd(drawn_shape(tall))
    W, some = (U * S) @ Vh, random.randint(2, 4)
    tuned = W + random.uniform(9, 14) * rotation(W.shape[0])[:, :some] @ rotation(W.shape[1])[:some]
    return W, tuned, random.randint(some + 2, some + 5), random.uniform(0.45, 0.65)


def weak(tall: bool) -> Case:
    """The weaker half of the directions is new, the stronger half is as it was."""
    U, S, Vh = drawn_svd(drawn_shape(tall))
    half = len(S) // 2
    other = torch.linalg.qr(torch.cat([U[:, :half], normal(len(U), len(S) - half)], 1)).Q
    other[:, :half] = U[:, :half]
    return (U * S) @ Vh, (other * S) @ Vh, random.randint(5, 9), random.uniform(0.45, 0.65)


def outside(tall: bool) -> Case:
    """A new direction that the pretrained weight maps nothing to: the only one, with one output more than inputs."""
    n = random.randint(26, 34)
    frame = rotation(n + 1)
    _, S, Vh = drawn_svd((n + 1, n))
    W = (frame[:, :n] * S) @ Vh
    return W, W + 14 * frame[:, n:] @ rotation(n)[:1], random.randint(4, 8), random.uniform(0.5, 0.7)


def low_rank_update(tall: bool) -> Case:
    """An update of low rank, as LoRA's."""
    out, inputs = drawn_shape(tall)
    W, r = normal(out, inputs), random.randint(2, 4)
    return W, W + random.uniform(0.4, 1.2) * low_rank(out, inputs, r), random.randint(5, 10), random.uniform(0.3, 0.8)


KINDS = {
    rotated_inputs: ("rotated inputs: every direction is known", "Which side's vectors? What is a sign worth?"),
    reordered: ("the order has changed: every direction is known", "With which pretrained vectors do you compare?"),
    rotated_outputs: ("rotated outputs: most directions are new", "When does the pretrained weight know a direction?"),
    planted: ("new directions at the top", "Whose directions do you count, and which of them fit none?"),
    weak: ("new directions too weak for the top", "How many of the tuned weight's directions do you look at?"),
    outside: ("a direction that W maps nothing to is new", "How many left singular vectors does W really have?"),
    low_rank_update: ("updates of low rank", "What makes a direction of the tuned weight an intruder?"),
}


def cosines(W: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """Left against left: a row for each of W's vectors, a column for each of the tuned weight's."""
    return np.linalg.svd(W, full_matrices=False)[0].T @ np.linalg.svd(tuned, full_matrices=False)[0]


def count_intruders(W: np.ndarray, tuned: np.ndarray, top_k: int, threshold: float) -> int:
    """The right number, with NumPy."""
    return int((np.abs(cosines(W, tuned)[:, :top_k]).max(0) < threshold).sum())


def is_clear(case: Case) -> bool:
    """No cosine that decides lies so near the threshold that rounding could move it over."""
    largest = np.abs(cosines(case[0].numpy(), case[1].numpy())).max(0)
    return bool(np.abs(largest - case[3]).min() > 1e-4)


def other_counts(W: Tensor, tuned: Tensor, top_k: int, threshold: float) -> dict[str, int]:
    """What usual mistakes would give here."""
    (U, _, Vh), (new_U, _, new_Vh) = (torch.linalg.svd(each, full_matrices=False) for each in (W, tuned))
    signed = U.T @ new_U[:, :top_k]
    left, top = signed.abs(), (U[:, :top_k].T @ new_U[:, :top_k]).abs()
    whole = (torch.linalg.svd(W)[0].T @ new_U[:, :top_k]).abs()
    delta_U = torch.linalg.svd(tuned - W, full_matrices=False)[0]

    def below(values: Tensor) -> int:
        return int((values < threshold).sum())

    return {
        "a sign is arbitrary: a cosine of −0.99 is a known direction, too": below(signed.amax(0)),
        "these are the right singular vectors, directions of the input": below((Vh @ new_Vh[:top_k].T).abs().amax(0)),
        "you compare with the pretrained weight's top directions only, not with all of them": below(top.amax(0)),
        "you compare number i with number i; the order may have changed": below(top.diagonal()),
        "one pretrained vector that fits is enough, so neither the mean nor the smallest tells": below(left.mean(0)),
        "you count pretrained directions that were lost, not new ones": below(left.amax(1)),
        "you count pretrained top directions that were lost, not new ones": below(top.amax(1)),
        "you count the known ones": top_k - below(left.amax(0)),
        "you look at all directions of the tuned weight, not at its top": below((U.T @ new_U).abs().amax(0)),
        "you look at the weakest directions of the tuned weight": below((U.T @ new_U[:, -top_k:]).abs().amax(0)),
        "directions that the pretrained weight maps nothing to are in your comparison": below(whole.amax(0)),
        "these are the directions of the update, not those of the tuned weight": below(
            (U.T @ delta_U[:, :top_k]).abs().amax(0)
        ),
        "you count pairs, not directions": below(left),
        "these are squared cosines": below((left**2).amax(0)),
        "your threshold stays at 0.5": int((left.amax(0) < 0.5).sum()),
    }


@without(
    "lora_edu.lowrank",
    symptom="you call {name} of lora_edu.lowrank; this exercise wants the count from scratch",
    question="What makes a direction of the tuned weight an intruder?",
    fix="Take U of both weights from torch.linalg.svd, and look at the cosines between their columns.",
)
def intruders(candidate: Callable[[Tensor, Tensor, int, float], int], hint: int = 1) -> Report:
    """Exercise B2 of lesson 10: ``candidate(W, tuned, top_k, threshold)`` counts intruder dimensions."""
    fix = (
        "U of both from torch.linalg.svd(…, full_matrices=False); cosines = (U_W.T @ U_tuned[:, :top_k]).abs(); "
        "count the columns whose largest value is below the threshold."
    )

    def draw(make: Callable[[bool], Case], tall: bool) -> tuple[int, int, Case]:
        """The learner's count, the right one, and the case."""
        while not is_clear(case := make(tall)):
            continue
        W, tuned, top_k, threshold = case
        got = number(candidate(W.clone(), tuned.clone(), top_k, threshold))
        return got, count_intruders(W.numpy(), tuned.numpy(), top_k, threshold), case

    def compare(make: Callable[[bool], Case], question: str) -> None:
        for tall in (True, False, True, False):
            got, right, (W, _, top_k, threshold) = draw(make, tall)
            if got == right:
                continue
            # One case may fit several mistakes, so the mistake is told by a case of every kind.
            told = [draw(kind, tall) for kind in KINDS for tall in (True, False)]
            wrong = [other_counts(*case) for *_, case in told]
            note = named([each[0] for each in told], wrong, "not the new directions")
            sizes = f"W {tuple(W.shape)}, top_k = {top_k}, threshold = {threshold:.2f}"
            raise Wrong(f"{sizes}: you count {got} instead of {right}; {note}", question, fix)

    def number(value: Any) -> int:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not (is_whole(value) or isinstance(value, np.integer)):
            raise Wrong(
                f"you return {type(value).__name__}: expected a whole number",
                "Do you return the cosines, a share, or a count?",
                fix,
            )
        return int(value)

    def library() -> None:
        while not (is_clear(case := low_rank_update(tall=False)) and is_clear((*case[:2], 10, 0.5))):
            continue
        got, right = number(candidate(*case[:2], 10, 0.5)), intruder_dimensions(*case[:2], 10, 0.5)
        if got != right:
            raise Wrong(f"you count {got}, the library {right}", "Does your function do the same at every call?", fix)

    steps: list[Step] = [(words, partial(compare, make, question)) for make, (words, question) in KINDS.items()]
    return run_steps("intruder dimensions", [*steps, ("equal to the library", library)], hint)


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
