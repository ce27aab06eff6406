"""Checks of lesson 01, continued: two factors without an SVD (B1) and the best matrix for the inputs (C1)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_edu.course.checks.lesson_01 import between, close, draw_matrix, need_matrix, need_rank
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.lowrank import eckart_young_error, low_rank_approximation


@contextmanager
def _without_svd() -> Iterator[None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Wrong(
            "you call the SVD; this exercise wants the factors without it",
            "If A is fixed, which B makes the error smallest? That is an ordinary least-squares problem.",
            "B = torch.linalg.lstsq(A.T, W.T).solution.T, then A = torch.linalg.lstsq(B, W).solution, many times.",
        )

    kept = torch.linalg.svd, torch.svd, torch.svd_lowrank, torch.pca_lowrank
    torch.linalg.svd = torch.svd = torch.svd_lowrank = torch.pca_lowrank = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.linalg.svd, torch.svd, torch.svd_lowrank, torch.pca_lowrank = kept


def fitted_factors(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise B1 of lesson 01: ``candidate(W, r)`` returns (B, A) near the optimum, by alternating least squares."""

    def fit(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
        with _without_svd():
            pair = candidate(W.clone(), r)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise Wrong(f"you return a {type(pair).__name__}", "How many factors are there?", "Return the pair (B, A).")
        m, n = W.shape
        shapes = tuple(tuple(getattr(factor, "shape", ())) for factor in pair)
        if shapes == ((r, n), (m, r)):
            raise Wrong("you return (A, B)", "Which factor stands on the left of the product?", "Return (B, A).")
        if shapes == ((n, r), (r, m)):
            raise Wrong(
                f"for W of shape {(m, n)} your B is {shapes[0]} and your A {shapes[1]}: you fitted Wᵀ",
                "Which side of W does B stand for?",
                "B is (m, r), its rows belong to the rows of W.",
            )
        return need_matrix(pair[0], (m, r), f"with r={r} your B"), need_matrix(pair[1], (r, n), f"with r={r} your A")

    def shapes() -> None:
        fit(draw_matrix(between(14, 18), 9), 3)
        fit(draw_matrix(9, between(14, 18)), 2)

    def near(W: Tensor, r: int, slack: float) -> None:
        B, A = fit(W, r)
        error = ((W - B @ A).norm() / eckart_young_error(W, r)[0]).item()
        if error <= 1 + slack:
            return
        better_B = (W - torch.linalg.lstsq(A.T, W.T).solution.T @ A).norm() / (W - B @ A).norm()
        better_A = (W - B @ torch.linalg.lstsq(B, W).solution).norm() / (W - B @ A).norm()
        if better_A > 1 - 1e-6:
            symptom = (
                f"your error is {error:.2f} times the smallest; A is the best one for your B, but B not for your A"
            )
        elif better_B > 1 - 1e-6:
            symptom = (
                f"your error is {error:.2f} times the smallest; B is the best one for your A, but A not for your B"
            )
        else:
            symptom = f"your error is {error:.2f} times the smallest; neither factor is the best one for the other"
        raise Wrong(
            symptom,
            "When you have found a new A, is the old B still the best one for it?",
            "Repeat both solves, B for A and A for B, 30 times or until the error stops falling.",
        )

    def scaled() -> None:
        near(1e4 * draw_matrix(12, 10, decay=0.6), 3, 0.01)

    steps = [
        ("B is (m, r), A is (r, n), without an SVD", shapes),
        ("within 1 % of the smallest error", lambda: near(draw_matrix(between(20, 30), 12, decay=0.6), 4, 0.01)),
        (
            "within 5 % where neighbouring σ are close",
            lambda: near(draw_matrix(15, between(20, 30), decay=0.9), 3, 0.05),
        ),
        ("also for a matrix ten thousand times larger", scaled),
    ]
    return run_steps("Two factors without an SVD", steps, hint)


def data_aware_approximation(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise C1 of lesson 01: ``candidate(W, X, r)`` minimises ‖(W − M) Xᵀ‖ over all M of rank at most r."""

    def draw(samples: int, d: int, k: int) -> tuple[Tensor, Tensor]:
        X = torch.randn(samples, k, dtype=torch.float64) @ draw_matrix(k, k, decay=0.5) + torch.randn(k).double() / 5
        return draw_matrix(d, k, decay=0.9), X

    def shape() -> None:
        W, X = draw(40, between(10, 12), 7)
        need_matrix(candidate(W, X, 3), (W.shape[0], 7), f"for W of shape {tuple(W.shape)} your result")

    def rank() -> None:
        W, X = draw(40, 11, 7)
        r = between(2, 4)
        need_rank(need_matrix(candidate(W, X, r), (11, 7), "your result"), r, 7)

    def best(samples: int) -> None:
        W, X = draw(samples, between(10, 12), 8)
        r = 2
        M = need_matrix(candidate(W, X, r), (W.shape[0], 8), f"with {samples} inputs your result")
        smallest = eckart_young_error(W @ X.T, r)[0]
        error = ((W - M) @ X.T).norm().item() / smallest
        if error <= 1 + 1e-6:
            return
        symptom = f"with {samples} inputs of length 8 your outputs' error is {error:.2f} times the smallest possible"
        _, _, directions = torch.linalg.svd(X, full_matrices=False)
        if close(M, low_rank_approximation(W, r)):
            symptom += ": this is the truncated SVD of W, the inputs play no part"
        elif close(M, W @ directions[:r].T @ directions[:r]):
            symptom += ": you keep the inputs' strongest directions, whatever W makes of them"
        raise Wrong(
            symptom,
            "The matrix of outputs is Y = W Xᵀ. Which of its pieces must M get right, and how are they made from W?",
            "Project W onto the r strongest left directions of Y: M = U Uᵀ W with U, _, _ = truncated_svd(W @ X.T, r).",
        )

    steps = [
        ("has the shape of W", shape),
        ("has rank r", rank),
        ("has the smallest error on the outputs", lambda: best(40)),
        ("also with fewer inputs than columns", lambda: best(5)),
    ]
    return run_steps("Best matrix for the inputs", steps, hint)
