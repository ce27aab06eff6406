"""The short checks of lesson 10: another scale, the same training (A1), and the amplification factor (A2)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.lowrank import amplification_factor

Problem = tuple[Tensor, Tensor, Tensor, Tensor]
STEPS = 12


def drawn_problem() -> Problem:
    """(W₀, x, targets, start of A with σ = 1) in float64, with in ≠ out and r > 1."""
    inputs, outputs, r = random.randint(10, 13), random.randint(6, 9), random.randint(2, 4)
    shapes = (outputs, inputs), (16, inputs), (16, outputs), (r, inputs)
    weight, x, targets, start = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
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
        if not isinstance(got, tuple | list) or len(got) != 2:
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
            if ((other - old).norm() / old.norm()).item() > 1e-6:
                of_sigma, of_rate = (
                    round(math.log(a / b) / math.log(k), 6) for a, b in zip(new, (sigma, rate), strict=True)
                )
                raise Wrong(
                    f"k = {k:.3f}, after {steps} step{'s' * (steps > 1)} of Adam: the update differs by "
                    f"{((other - old).norm() / old.norm()).item():.0%} (your sigma_A is times k^{of_sigma:.3g}, "
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


def amplification(candidate: Callable[[Tensor, Tensor, int], float], hint: int = 1) -> Report:
    """Exercise A2 of lesson 10: ``candidate(W, delta, r)`` is ‖ΔW‖ / ‖Uᵀ W V‖ in ΔW's top r directions."""

    def drawn(rank: int | None, tall: bool) -> tuple[Tensor, Tensor]:
        shape = (random.randint(15, 20), random.randint(9, 12))
        shape = shape if tall else shape[::-1]
        W, delta = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        if rank:
            delta = torch.randn(shape[0], rank, dtype=torch.float64) @ torch.randn(rank, shape[1], dtype=torch.float64)
        return W, delta * random.uniform(0.1, 3)

    def compare(tall: bool, full: bool = False) -> None:
        got, wrong, right = [], [], []
        for _ in range(3):
            r = random.randint(2, 4)
            W, delta = drawn(None if full else r, tall)
            value = candidate(W, delta, r)
            if isinstance(value, Tensor) and value.numel() != 1:
                raise Wrong(
                    f"W is {tuple(W.shape)}, r = {r}: you return a tensor of shape {tuple(value.shape)}",
                    "Which two norms are divided?",
                    "One number: delta.norm() / (U[:, :r].T @ W @ Vh[:r].T).norm().",
                )
            got.append(float(value))
            wrong.append(other_factors(W, delta, r))
            right.append(factor(W.numpy(), delta.numpy(), r))
        if not agree(got, right):
            note = named(got, wrong) or "not ΔW's norm over that of W in ΔW's directions"
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


def factor(W: np.ndarray, delta: np.ndarray, r: int) -> float:
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
    right, size = factor(W.numpy(), delta.numpy(), r), delta.norm().item()
    return found | {
        "these are squared norms": right**2,
        "this is the factor upside down": 1 / right,
        "the numerator is the norm of all of ΔW, not of its top r directions": right * S[:r].norm().item() / size,
        "the numerator is ΔW's Frobenius norm, not its largest singular value": right * S[0].item() / size,
    }


def agree(one: Sequence[float], other: Sequence[float]) -> bool:
    """Equal to rounding, number by number."""
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) for a, b in zip(one, other, strict=True))


def named(got: Sequence[float], wrong: Sequence[Mapping[str, Any]]) -> str | None:
    """The mistake whose values are all the learner's; each of ``wrong`` gives {mistake: its value} for one draw."""
    return next((words for words in wrong[0] if agree(got, [each[words] for each in wrong])), None)
