"""Checks of lesson 01: truncation (A1), energy (A2), factors without an SVD (B1), best for the inputs (C1).

The last one is that of the lesson's *Your turn* cell.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    between,
    close_in_norm,
    is_several,
    is_tensor,
    is_transposed,
    known_slip,
    need_whole,
    normal,
    shape_or_type,
    with_note,
)
from lora_edu.lowrank import eckart_young_error, low_rank_approximation


def draw_matrix(m: int, n: int, decay: float = 0.7) -> Tensor:
    """Random directions with singular values 1, decay, decay², …: clearly different from each other."""
    k = min(m, n)
    U, _ = torch.linalg.qr(normal(m, k))
    V, _ = torch.linalg.qr(normal(n, k))
    return (U * decay ** torch.arange(k, dtype=torch.float64)) @ V.T


def need_matrix(value: Any, shape: tuple[int, int], what: str) -> Tensor:
    """The learner's value in float64, if it is a finite tensor of that shape; else say what is wrong with it."""
    if not isinstance(value, Tensor):
        raise Wrong(f"{what} is a {type(value).__name__}", "What should the function return?", "Return a torch tensor.")
    if is_transposed(value.shape, shape):
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


@without(
    "lora_edu.lowrank.low_rank_approximation",
    symptom="you call {name}, which does all of it for you",
    question="The columns of U are there already. How is a column of W projected onto what they span?",
    fix="Return U @ (U.T @ W).",
)
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
        M = need_matrix(candidate(W.clone(), r), (W.shape[0], 7), "your result")
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        unscaled, squared = U[:, :r] @ Vh[:r], (U[:, :r] * S[:r] ** 2) @ Vh[:r]
        smallest = (U[:, -r:] * S[-r:]) @ Vh[-r:]
        if close_in_norm(M, unscaled):
            raise Wrong(
                "every piece has length 1 in your result: the singular values are missing",
                "How much of the first piece is in W?",
                "Multiply column i of U by S[i]: (U[:, :r] * S[:r]) @ Vh[:r].",
            )
        if close_in_norm(M, squared):
            raise Wrong(
                "the singular values are in your result twice", "Which factor carries S?", "Put S into one factor."
            )
        if close_in_norm(M, smallest):
            raise Wrong(
                f"you kept the {r} smallest pieces",
                "In which order do the singular values come?",
                "They fall: the largest come first, so cut at [:r].",
            )
        error = ((W - M).norm() / eckart_young_error(W, r)[0]).item()
        if not error <= 1 + 1e-6:
            raise Wrong(
                f"your error is {error:.2f} times the smallest possible",
                "Are your rows those of Vh, and are the first r of each taken?",
                "torch.linalg.svd returns Vh; torch.svd returns V, whose columns are the directions.",
            )

    steps = [("has the shape of W", shape), ("has rank r", rank), ("has the smallest error possible", best)]
    return run_steps("Truncated SVD", steps, hint)


@without(
    "lora_edu.lowrank.energy_rank",
    symptom="you call {name}, which counts for you",
    question="The energy of a piece is σ². How much of the whole do the first r pieces hold together?",
    fix="Compare the cumulative sums of sigma**2, divided by their total, with the share, and count.",
)
def pieces_for_energy(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise A2 of lesson 01: ``candidate(W, share)`` is the smallest r whose pieces hold this share of ‖W‖²."""

    def test(m: int, n: int, right: int, scale: float = 1.0) -> None:
        W = scale * draw_matrix(m, n)
        values = torch.linalg.svdvals(W)
        held = [0.0, *(values**2).cumsum(0).div((values**2).sum()).tolist()]  # by 0, 1, 2, … pieces
        share = (held[right - 1] + held[right]) / 2  # far from both, so that rounding decides nothing
        r = need_whole(
            candidate(W.clone(), share),
            "How many pieces are 2.4 pieces?",
            "Return an int, for example int((…).sum()) of the comparisons.",
        )
        if r == right:
            return
        added = (values.cumsum(0) / values.sum()).tolist()
        slips = [
            (1 + sum(part < share for part in added), "so many are needed if σ is added up in place of σ²"),
            (right - 1, "is it the place of the last piece, counted from 0?"),
        ]
        whole = f"for W of shape {(m, n)} and a share of {share:.1%} you return r={r}"
        if not 0 <= r < len(held):
            symptom = f"{whole}, but W has {len(held) - 1} pieces"
        elif r < right:
            symptom = f"{whole}, and the first {r} hold only {held[r]:.1%}"
        else:
            symptom = f"{whole}, and the first {right} hold {held[right]:.1%} already"
        raise Wrong(
            with_note(symptom, known_slip(r, slips)),
            "What do the first 1, 2, 3, … pieces hold together, and where does this first reach the share?",
            "Divide (sigma**2).cumsum(0) by (sigma**2).sum(), count what is below the share, and add 1.",
        )

    def shapes() -> None:
        test(between(9, 12), 7, right=2)
        test(7, between(9, 12), right=4)

    steps = [
        ("one piece can be enough", lambda: test(8, 6, right=1)),
        ("right for a square matrix", lambda: test(9, 9, right=3)),
        ("right for other shapes", shapes),
        ("a thousand times W needs as many", lambda: test(8, 10, right=3, scale=1000)),
    ]
    return run_steps("Pieces for a share of the energy", steps, hint)


@without(
    "svd", "svdvals", "svd_lowrank", "pca_lowrank", "svds", "eig", "eigh", "lobpcg", "eigsh",
    symptom="you call {name}; this exercise wants the factors without an SVD, and the eigenvectors of WᵀW are one",
    question="If A is fixed, which B makes the error smallest? That is an ordinary least-squares problem.",
    fix="B = torch.linalg.lstsq(A.T, W.T).solution.T, then A = torch.linalg.lstsq(B, W).solution, many times.",
)  # fmt: skip
def fitted_factors(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise B1 of lesson 01: ``candidate(W, r)`` returns (B, A) near the optimum, by alternating least squares."""

    def fit(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
        pair = candidate(W.clone(), r)
        if not is_several(pair, 2):
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
        X = normal(samples, k) @ draw_matrix(k, k, decay=0.5) + normal(k) / 5
        return draw_matrix(d, k, decay=0.9), X

    def shape() -> None:
        W, X = draw(40, between(10, 12), 7)
        need_matrix(candidate(W, X, 3), (W.shape[0], 7), f"for W of shape {tuple(W.shape)} your result")

    def rank() -> None:
        W, X = draw(40, 11, 7)
        r = between(2, 4)
        need_rank(need_matrix(candidate(W, X, r), (11, 7), "your result"), r, 7)

    def best(samples: int, columns: int) -> None:
        W, X = draw(samples, between(10, 12), columns)
        r = 2
        M = need_matrix(candidate(W.clone(), X.clone(), r), (len(W), columns), f"with {samples} inputs your result")
        smallest = eckart_young_error(W @ X.T, r)[0]
        error = ((W - M) @ X.T).norm().item() / smallest
        if error <= 1 + 1e-6:
            return
        symptom = (
            f"with {samples} inputs of length {columns} your outputs' error is {error:.2f} times the smallest possible"
        )
        _, _, directions = torch.linalg.svd(X, full_matrices=False)
        if close_in_norm(M, low_rank_approximation(W, r)):
            symptom += ": this is the truncated SVD of W, the inputs play no part"
        elif close_in_norm(M, W @ directions[:r].T @ directions[:r]):
            symptom += ": you keep the inputs' strongest directions, whatever W makes of them"
        raise Wrong(
            symptom,
            "The matrix of outputs is Y = W Xᵀ. Which of its pieces must M get right, and how are they made from W?",
            "Project W onto the r strongest left directions of Y: M = U Uᵀ W with U, _, _ = truncated_svd(W @ X.T, r).",
        )

    steps = [
        ("has the shape of W", shape),
        ("has rank r", rank),
        ("has the smallest error on the outputs", lambda: best(40, 8)),
        # So many directions have no input that no inverse survives them, however it is rounded.
        ("also with fewer inputs than columns", lambda: best(5, 24)),
    ]
    return run_steps("Best matrix for the inputs", steps, hint)


@without(
    "lora_edu.lowrank",
    symptom="you call {name}, which truncates for you",
    question="torch.linalg.svd returns all pieces, the largest first. Which part of each factor holds r of them?",
    fix="Return U[:, :r], S[:r], Vh[:r].",
)
def truncated_svd(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """*Your turn* of lesson 01: ``candidate(W, r)`` returns the r largest pieces as U (m, r), S (r,) and Vh (r, n)."""

    def pieces(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        (m, n), full = W.shape, min(W.shape)
        returned = candidate(W.clone(), r)
        if not is_several(returned, 3):
            kind = f"{len(returned)} objects" if isinstance(returned, tuple | list) else shape_or_type(returned)
            question, fix = "Which three factors make up the pieces?", "Return U[:, :r], S[:r], Vh[:r]: three tensors."
            raise Wrong(f"you return {kind}, expected U, S and Vh", question, fix)
        slips: dict[str, list[tuple[tuple[int, ...], str]]] = {
            "U": [((m, full), "all its columns are still there"), ((m, m), "all its columns are still there")],
            "S": [((full,), "all singular values are still there"), ((r, r), "that is a diagonal matrix")],
            "Vh": [
                ((n, r), "that is V, with the directions as columns"),
                ((full, n), "all its rows are still there"),
                ((n, n), "all its rows are still there"),
                ((full, r), "its columns are cut, and the directions are its rows"),
                ((r, full), "are its rows as long as those of W?"),
            ],
        }
        for (name, known), shape, factor in zip(slips.items(), ((m, r), (r,), (r, n)), returned, strict=True):
            if not is_tensor(factor, shape):
                got = tuple(factor.shape) if isinstance(factor, Tensor) else ()
                symptom = f"for W of shape {(m, n)} and r={r} your {name} is {shape_or_type(factor)}, expected {shape}"
                raise Wrong(
                    with_note(symptom, known_slip(got, known, same=lambda a, b: a == b)),
                    "In which dimension of each factor are the pieces counted?",
                    "U[:, :r] keeps r columns, S[:r] r numbers, Vh[:r] r rows.",
                )
        U, S, Vh = (factor.double() for factor in returned)
        return U, S, Vh

    def shapes() -> None:
        for m, n in ((between(9, 12), 7), (7, between(9, 12))):
            pieces(draw_matrix(m, n), between(2, 4))

    def values() -> None:
        r, W = between(2, 4), 3 * draw_matrix(between(9, 12), 7)
        _, S, _ = pieces(W, r)
        all_values = torch.linalg.svdvals(W)
        right = all_values[:r]
        if close_in_norm(S, right):
            return
        known = [
            (right**2, "these are their squares, the eigenvalues of WᵀW"),
            (right.flip(0), "they rise instead of falling"),
            (all_values[-r:], "these are the smallest ones"),
        ]
        raise Wrong(
            with_note(
                f"S begins with {S[0]:.2f}, and the largest singular value is {right[0]:.2f}",
                known_slip(S, known, same=close_in_norm),
            ),
            "What does torch.linalg.svd return as S, and in which order?",
            "S comes in falling order: S[:r] are the r largest.",
        )

    def directions() -> None:
        r, W = between(2, 4), 3 * draw_matrix(7, between(9, 12))
        U, S, Vh = pieces(W, r)
        for name, product in (("columns of U", U.T @ U), ("rows of Vh", Vh @ Vh.T)):
            if not close_in_norm(product, torch.eye(r, dtype=torch.float64)):
                scaled = close_in_norm(product, torch.diag(S**2)) or close_in_norm(product, torch.diag(S))
                raise Wrong(
                    with_note(
                        f"the {name} are no orthogonal unit vectors",
                        "they carry the singular values, which S holds already" if scaled else "",
                    ),
                    "Which of the three factors says how much of each piece is in W?",
                    "Leave U and Vh as torch.linalg.svd returns them, and only cut them.",
                )

    def best() -> None:
        r = between(2, 4)
        for m, n in ((between(9, 12), 7), (7, between(9, 12))):
            W = 3 * draw_matrix(m, n)
            U, S, Vh = pieces(W, r)
            right, _, directions = torch.linalg.svd(W, full_matrices=False)
            error = ((W - (U * S) @ Vh).norm() / eckart_young_error(W, r)[0]).item()
            if error <= 1 + 1e-6:
                continue
            signs = close_in_norm(U.abs(), right[:, :r].abs()) and close_in_norm(Vh.abs(), directions[:r].abs())
            raise Wrong(
                with_note(
                    f"put together again, your pieces leave {error:.2f} times the error that r right ones leave",
                    "each direction is right, but the signs of U and of Vh do not belong together" if signs else "",
                ),
                "Does row i of Vh belong to column i of U? torch.svd returns V, and not Vh.",
                "Take all three factors from one call of torch.linalg.svd(W, full_matrices=False).",
            )

    steps = [
        ("U is (m, r), S is (r,) and Vh is (r, n)", shapes),
        ("S holds the r largest singular values", values),
        ("the directions are orthogonal unit vectors", directions),
        ("put together again, the pieces come as close to W as r of them can", best),
    ]
    return run_steps("Truncated SVD", steps, hint)
