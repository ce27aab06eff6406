"""The checks of lesson 02, continued: top directions against random ones (B2), an optimizer's update (C1)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.course.checks.lesson_02 import between, close
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.lowrank import singular_values


def top_against_random(candidate: Callable[[Tensor, int], tuple[float, float]], hint: int = 1) -> Report:
    """Exercise B2 of lesson 02: ``candidate(delta, r)`` gives the energy shares of the top and of random directions."""

    def call(delta: Tensor, r: int) -> tuple[float, float]:
        got: Any = candidate(delta, r)
        if not isinstance(got, tuple) or len(got) != 2 or not all(isinstance(share, float) for share in got):
            raise Wrong(
                f"you return {type(got).__name__}: expected two floats",
                "Which two shares are asked for?",
                "Return (top, random), each made a number with .item().",
            )
        return got

    def top() -> None:
        delta, r = torch.randn(9, between(12, 14), dtype=torch.float64), between(2, 4)
        got, sigma = call(delta, r)[0], singular_values(delta)
        right = ((sigma[:r] ** 2).sum() / (sigma**2).sum()).item()
        if abs(got - right) > 1e-6:
            slips = {
                "you added σ, not σ²": (sigma[:r].sum() / sigma.sum()).item(),
                "this is its square root": right**0.5,
                "this is what is left over": 1 - right,
                "these are the r smallest": ((sigma[-r:] ** 2).sum() / (sigma**2).sum()).item(),
                "this is the energy itself, not its share": (sigma[:r] ** 2).sum().item(),
            }
            note = next((text for text, value in slips.items() if abs(got - value) < 1e-6), "expected another share")
            raise Wrong(
                f"with r={r} you say the top directions hold {got:.3f} of the energy, it is {right:.3f}: {note}",
                "What is ‖ΔW‖² in terms of the singular values?",
                "(σ[:r] ** 2).sum() / (σ ** 2).sum()",
            )

    def everything() -> None:
        delta = torch.randn(5, 7, dtype=torch.float64)
        share = call(delta, 7)[1]
        if abs(share - 1) > 1e-6:
            raise Wrong(
                f"all 7 directions of a 7-dimensional input space should hold everything; yours hold {share:.3f}",
                "Do your random directions have length 1, and are they orthogonal to each other?",
                "Q, _ = torch.linalg.qr(torch.randn(k, r)), then (delta @ Q).norm() ** 2 / delta.norm() ** 2.",
            )

    def chance() -> None:
        d, k, r = 6, 30, between(4, 6)
        delta = torch.randn(d, k, dtype=torch.float64)
        draws = [call(delta, r)[1] for _ in range(300)]
        mean = sum(draws) / len(draws)
        if max(draws) - min(draws) < 1e-9:
            raise Wrong(
                "the random directions are the same at each call, or not drawn at all",
                "Do you measure the share, or compute what it should be?",
                "Draw Q inside the function, without setting a seed, and measure ‖ΔW Q‖².",
            )
        if abs(mean - r / k) > 0.02:
            note = "these are output directions" if abs(mean - r / d) < 0.05 else f"expected about {r / k:.2f}"
            raise Wrong(
                f"r={r} random directions of {k} inputs hold {mean:.2f} of the energy on average: {note}",
                "Which side of ΔW (d, k) do inputs enter?",
                "Inputs have k entries: Q is (k, r), and the energy is that of delta @ Q.",
            )

    steps = [
        ("the top directions' share of the energy is right", top),
        ("random directions are orthonormal: all of them hold everything", everything),
        ("random input directions hold r/k on average", chance),
    ]
    return run_steps("Top directions against random ones", steps, hint)


def optimizer_update(candidate: Callable[..., Tensor], hint: int = 1) -> Report:
    """Exercise C1 of lesson 02: ``candidate(W0, X, Y, make_optimizer, steps)`` trains W and returns ΔW."""

    def problem(n: int) -> tuple[Tensor, Tensor, Tensor]:
        W0, X = torch.randn(6, 9, dtype=torch.float64), torch.randn(n, 9, dtype=torch.float64)
        return W0, X, torch.randn(n, 6, dtype=torch.float64)

    def compare(make: Callable[..., torch.optim.Optimizer], steps: int) -> None:
        W0, X, Y = problem(between(3, 5))
        kept = W0.clone()
        got = candidate(W0, X, Y, make, steps)
        if not torch.equal(W0, kept):
            raise Wrong("your loop changed W0", "Do W and W0 share memory?", "Make the parameter from W0.clone().")
        if not isinstance(got, Tensor) or got.shape != W0.shape or got.requires_grad:
            raise Wrong(
                "expected ΔW as a plain tensor of W0's shape",
                "What should the function return?",
                "Return W.detach() - W0.",
            )
        right, summed, grown = (_reference(W0, X, Y, make, steps, kind) for kind in ("mean", "sum", "grow"))
        if close(got, right):
            return
        slips = {
            "you return W instead of its change": W0 + right,
            "your loss is the sum of the squared errors, not their mean": summed,
            "gradients of earlier steps pile up": grown,
            "you return W0 − W: the sign is wrong": -right,
            "nothing was trained": torch.zeros_like(W0),
        }
        note = next((text for text, value in slips.items() if close(got, value)), "it differs from the reference loop")
        raise Wrong(
            f"after {steps} step{'s' * (steps > 1)} your ΔW is not right: {note}",
            "Which four things does a training step do, in which order?",
            "zero_grad, loss = ((X @ W.T - Y) ** 2).mean(), backward, step; at the end W.detach() - W0.",
        )

    def one() -> None:
        compare(lambda parameters: torch.optim.SGD(parameters, lr=0.1), 1)

    def many() -> None:
        compare(lambda parameters: torch.optim.SGD(parameters, lr=0.1), between(4, 7))

    def adam() -> None:
        compare(lambda parameters: torch.optim.Adam(parameters, lr=0.01), between(4, 7))

    steps = [
        ("one step of gradient descent", one),
        ("several steps of gradient descent", many),
        ("the optimizer that is given does the steps", adam),
    ]
    return run_steps("An optimizer's update", steps, hint)


def _reference(W0: Tensor, X: Tensor, Y: Tensor, make: Callable[..., Any], steps: int, kind: str) -> Tensor:
    """ΔW of the right loop ("mean"), with a summed loss ("sum"), or with gradients never cleared ("grow")."""
    W = nn.Parameter(W0.clone())
    optimizer = make([W])
    for _ in range(steps):
        if kind != "grow":
            optimizer.zero_grad()
        errors = (X @ W.T - Y) ** 2
        (errors.sum() if kind == "sum" else errors.mean()).backward()
        optimizer.step()
    return W.detach() - W0
