"""Checks of lesson 01: truncation (A1) and break-even (A2); those of B1 and C1 are in ``lesson_01_factors``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.lowrank import eckart_young_error


def between(low: int, high: int) -> int:
    """A random whole number, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def draw_matrix(m: int, n: int, decay: float = 0.7) -> Tensor:
    """Random directions with singular values 1, decay, decay², …: clearly different from each other."""
    k = min(m, n)
    U, _ = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))
    return (U * decay ** torch.arange(k, dtype=torch.float64)) @ V.T


def need_matrix(value: Any, shape: tuple[int, int], what: str) -> Tensor:
    """The learner's value in float64, if it is a finite tensor of that shape; else say what is wrong with it."""
    if not isinstance(value, Tensor):
        raise Wrong(f"{what} is a {type(value).__name__}", "What should the function return?", "Return a torch tensor.")
    if tuple(value.shape) == shape[::-1] != shape:
        raise Wrong(
            f"{what} has shape {tuple(value.shape)}, expected {shape}: it is transposed",
            "Which side of W are the rows?",
            "Multiply in the order (m, r) @ (r, n).",
        )
    if tuple(value.shape) != shape:
        raise Wrong(
            f"{what} has shape {tuple(value.shape)}, expected {shape}",
            "Which shapes have U, S and Vh, and where does the cut at r go in each?",
            "Print the shape of every factor: U[:, :r] is (m, r) and Vh[:r, :] is (r, n).",
        )
    if not value.isfinite().all():
        raise Wrong(
            f"{what} holds NaN or infinity", "Do you divide by, or invert, something that can be zero?", "Avoid it."
        )
    return value.double()


def need_rank(value: Tensor, r: int, full: int) -> None:
    """Say so if the rank is above r; ``full`` is the rank that W has."""
    rank = int(torch.linalg.matrix_rank(value, rtol=1e-9))
    if rank > r:
        dropped = "nothing was dropped" if rank == full else f"that is {rank - r} too many"
        raise Wrong(
            f"with r={r} your result has rank {rank}: {dropped}",
            "How many columns of U take part?",
            "Keep r columns of U, r values of S and r rows of Vh.",
        )


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding, shape included."""
    return a.shape == b.shape and bool((a - b).norm() <= 1e-6 * b.norm())


def rank_r_approximation(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise A1 of lesson 01: ``candidate(W, r)`` is the truncated SVD's matrix, for tall and wide W."""

    def shape() -> None:
        for m, n in ((between(9, 12), 7), (7, between(9, 12))):
            need_matrix(candidate(draw_matrix(m, n), between(2, 4)), (m, n), f"for W of shape {(m, n)} your result")

    def rank() -> None:
        r = between(2, 4)
        need_rank(need_matrix(candidate(draw_matrix(11, 7), r), (11, 7), "your result"), r, 7)

    def best() -> None:
        r = between(2, 3)
        W = 3 * draw_matrix(between(10, 12), 7)
        M = need_matrix(candidate(W, r), (W.shape[0], 7), "your result")
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        unscaled, squared = U[:, :r] @ Vh[:r], (U[:, :r] * S[:r] ** 2) @ Vh[:r]
        smallest = (U[:, -r:] * S[-r:]) @ Vh[-r:]
        if close(M, unscaled):
            raise Wrong(
                "every piece has length 1 in your result: the singular values are missing",
                "How much of the first piece is in W?",
                "Multiply column i of U by S[i]: (U[:, :r] * S[:r]) @ Vh[:r].",
            )
        if close(M, squared):
            raise Wrong(
                "the singular values are in your result twice", "Which factor carries S?", "Put S into one factor."
            )
        if close(M, smallest):
            raise Wrong(
                f"you kept the {r} smallest pieces",
                "In which order do the singular values come?",
                "They fall: the largest come first, so cut at [:r].",
            )
        error = ((W - M).norm() / eckart_young_error(W, r)[0]).item()
        if error > 1 + 1e-6:
            raise Wrong(
                f"your error is {error:.2f} times the smallest possible",
                "Are your rows those of Vh, and are the first r of each taken?",
                "torch.linalg.svd returns Vh; torch.svd returns V, whose columns are the directions.",
            )

    steps = [("has the shape of W", shape), ("has rank r", rank), ("has the smallest error possible", best)]
    return run_steps("Truncated SVD", steps, hint)


def break_even_rank(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise A2 of lesson 01: ``candidate(d, k)`` is the largest whole r with r(d + k) < dk."""

    def test(d: int, k: int) -> None:
        r = candidate(d, k)
        if isinstance(r, bool) or not isinstance(r, int):
            raise Wrong(
                f"for {d} × {k} you return {r!r}, a {type(r).__name__}",
                "Can a matrix have 418.9 columns?",
                "Return an int: // divides whole numbers.",
            )
        factors, full = r * (d + k), d * k
        if factors >= full:
            relation = "exactly as many as" if factors == full else "more than"
            raise Wrong(
                f"for {d} × {k} you say r={r}: that is {factors:,} numbers, {relation} the matrix ({full:,})",
                "Is a rank still smaller when both counts are equal?",
                "Find the largest r with r·(d + k) ≤ dk − 1: (d·k − 1) // (d + k).",
            )
        if (r + 1) * (d + k) < full:
            raise Wrong(
                f"for {d} × {k} you say r={r}, but r={r + 1} needs {(r + 1) * (d + k):,} numbers, still below {full:,}",
                "What do d and k each contribute to r(d + k)?",
                "Solve r·(d + k) < d·k for r; for shapes that are not square half the smaller side is not the answer.",
            )

    def squares() -> None:
        for half in (2048, 288, between(9, 999)):
            test(2 * half, 2 * half)

    def rectangles() -> None:
        for d, k in ((1536, 576), (576, 1536), (between(100, 200), between(3000, 4000)), (4096, 1)):
            test(d, k)

    def exact() -> None:
        d = between(10, 1000) * 6 * 10**9
        for k in (d, 2 * d, d + 1):
            test(d, k)

    steps = [
        ("a whole number", lambda: test(1537, 577)),
        ("right for square matrices", squares),
        ("right for other shapes", rectangles),
        ("right for very large shapes", exact),
    ]
    return run_steps("Break-even rank", steps, hint)
