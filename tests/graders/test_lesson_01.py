"""The checks of lesson 01 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from found import assert_found, each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.course.notebooks.stored import find_notebook, read
from lora_edu.lowrank import eckart_young_error, energy_rank, low_rank_approximation, singular_values, truncated_svd

pytestmark = pytest.mark.graders
CHECKS = ["rank_r_approximation", "pieces_for_energy", "fitted_factors", "data_aware_approximation", "truncated_svd"]


def pieces(W):
    return torch.linalg.svd(W, full_matrices=False)


def first(W, r):
    """The right answer with r pieces, none or all of them included."""
    U, S, Vh = pieces(W)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def published_bug(W, r):
    U, S, Vh = torch.svd(W)  # really V
    return U[:, :r] @ torch.diag(S[:r]) @ Vh[:r, :]


def cut(W, r):
    U, S, Vh = pieces(W)
    return U[:, :r], S[:r], Vh[:r]


def sorted_pieces(W, r):
    U, S, Vh = cut(W, r)
    return U.T, S, Vh


def join(U, S, Vh):
    return (U * S) @ Vh


TRUNCATION = {
    "singular values forgotten": (lambda W, r: pieces(W)[0][:, :r] @ pieces(W)[2][:r], "error", "values are missing"),
    "singular values twice": (
        lambda W, r: (pieces(W)[0][:, :r] * pieces(W)[1][:r] ** 2) @ pieces(W)[2][:r],
        "error",
        "twice",
    ),
    "the smallest kept": (
        lambda W, r: (pieces(W)[0][:, -r:] * pieces(W)[1][-r:]) @ pieces(W)[2][-r:],
        "error",
        "smallest pieces",
    ),
    "one piece too many": (lambda W, r: first(W, r + 1), "rank r", "1 too many"),
    "one piece too few": (lambda W, r: first(W, r - 1), "error", "times the smallest possible"),
    "nothing dropped": (lambda W, r: W, "rank r", "nothing was dropped"),
    "transposed": (lambda W, r: first(W, r).T, "shape", "transposed"),
    "V for Vᴴ, as published": (published_bug, "shape", "expected (7,"),
    "V for Vᴴ, columns": (
        lambda W, r: (torch.svd(W)[0][:, :r] * torch.svd(W)[1][:r]) @ torch.svd(W)[2][:, :r],
        "shape",
        "cannot be multiplied",
    ),
    "first r rows": (lambda W, r: torch.cat([W[:r], 0 * W[r:]]), "error", "times the smallest possible"),
    "first r columns of W": (lambda W, r: W[:, :r], "shape", "expected"),
    "a tuple": (lambda W, r: (first(W, r), r), "shape", "is a tuple"),
    "the library's": (lambda W, r: low_rank_approximation(W, r), "shape", "you call low_rank_approximation"),
}


def overwritten(W, r):
    W.zero_()
    return W


TRUNCATION["W overwritten"] = (overwritten, "error", "times the smallest possible")
test_truncation_names_the_mistake = each_is_found(checks.rank_r_approximation, TRUNCATION)
RIGHT_TRUNCATION = {
    "a diagonal": lambda W, r: pieces(W)[0][:, :r] @ torch.diag(pieces(W)[1][:r]) @ pieces(W)[2][:r],
    "a sum of pieces": lambda W, r: sum(s * torch.outer(u, v) for u, s, v in zip(*sorted_pieces(W, r), strict=True)),
    "an index sum": lambda W, r: torch.einsum("ik,k,kj->ij", *(x for x in cut(W, r))),
    "the rest cut to zero": lambda W, r: (pieces(W)[0] * (torch.arange(7) < r) * pieces(W)[1]) @ pieces(W)[2],
    "a projection": lambda W, r: pieces(W)[0][:, :r] @ (pieces(W)[0][:, :r].T @ W),
}
test_other_truncations_pass = each_passes(checks.rank_r_approximation, RIGHT_TRUNCATION)


def held(W):
    """The share of the energy that the first 1, 2, 3, … pieces hold."""
    energy = singular_values(W) ** 2
    return energy.cumsum(0) / energy.sum()


def kept(values, share):
    return int((values.cumsum(0) / values.sum() < share).sum()) + 1


ENERGY = {
    "values in place of squares": (lambda W, share: kept(singular_values(W), share), "square matrix", "in place of σ²"),
    "fourth powers": (lambda W, share: kept(singular_values(W) ** 4, share), "square matrix", "hold only"),
    "counted from 0": (lambda W, share: int((held(W) < share).sum()), "one piece", "counted from 0"),
    "one too many": (lambda W, share: int((held(W) < share).sum()) + 2, "one piece", "already"),
    "the error at most 1 − share": (
        lambda W, share: int(((1 - held(W)).clamp(min=0).sqrt() > 1 - share).sum()) + 1,
        "square matrix",
        "already",
    ),
    "the smallest first": (
        lambda W, share: kept(singular_values(W).flip(0) ** 2, share),
        "one piece",
        "already",
    ),
    "a share of the pieces": (lambda W, share: math.ceil(share * min(W.shape)), "one piece", "already"),
    "not divided by the whole": (
        lambda W, share: int(((singular_values(W) ** 2).cumsum(0) < share).sum()) + 1,
        "square matrix|a thousand times",
        "hold only",
    ),
    "values above a threshold": (
        lambda W, share: int((singular_values(W) > (1 - share) * singular_values(W)[0]).sum()),
        "square matrix",
        "already",
    ),
    "all of them": (lambda W, share: int(torch.linalg.matrix_rank(W)), "one piece", "already"),
    "a share": (lambda W, share: held(W)[0].item(), "one piece", "expected a whole number"),
    "the comparisons": (lambda W, share: held(W) < share, "one piece", "expected a whole number"),
    "the library's": (lambda W, share: energy_rank(W, share), "one piece", "you call energy_rank"),
}
test_pieces_for_energy_names_the_mistake = each_is_found(checks.pieces_for_energy, ENERGY)


def counted(W, share):
    energy = [s**2 for s in singular_values(W).tolist()]
    r = 1
    while sum(energy[:r]) < share * sum(energy):
        r += 1
    return r


def by_errors(W, share):
    """The first r at which the best approximation leaves no more than the rest."""
    rest = (1 - share) * W.norm().item() ** 2
    return next(r for r in range(1, min(W.shape) + 1) if (W - first(W, r)).norm() ** 2 <= rest)


RIGHT_ENERGY = {
    "counted": counted,
    "by the errors": by_errors,
    "searched": lambda W, share: int(torch.searchsorted(held(W), share)) + 1,
    "eigenvalues": lambda W, share: kept(torch.linalg.eigvalsh(W.T @ W).flip(0), share),
    "in numpy": lambda W, share: (
        int(np.argmax(np.cumsum(np.linalg.svd(W.numpy())[1] ** 2) >= share * (W**2).sum().item())) + 1
    ),
}
test_other_counts_of_pieces_pass = each_passes(checks.pieces_for_energy, RIGHT_ENERGY)


def als(W, r, sweeps=40):
    A = torch.randn(r, W.shape[1], dtype=W.dtype)
    for _ in range(sweeps):
        B = torch.linalg.lstsq(A.T, W.T).solution.T
        A = torch.linalg.lstsq(B, W).solution
    return B, A


def only_B(W, r):
    A = torch.randn(r, W.shape[1], dtype=W.dtype)
    return torch.linalg.lstsq(A.T, W.T).solution.T, A


def descent(W, r):
    B, A = torch.randn(W.shape[0], r, dtype=W.dtype), torch.randn(r, W.shape[1], dtype=W.dtype)
    for _ in range(500):
        rest = B @ A - W
        B, A = B - 0.02 * rest @ A.T, A - 0.02 * B.T @ rest
    return B, A


def without_inverse(W, r):
    A = torch.randn(r, W.shape[1], dtype=W.dtype)
    for _ in range(5):
        B = W @ A.T
        A = B.T @ W / (B.T @ B).norm()
    return B, A


def by_svd(W, r):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] * S[:r], Vh[:r]


def by_eigenvectors(W, r):
    A = torch.linalg.eigh(W.T @ W).eigenvectors[:, -r:].T
    return W @ A.T, A


def by_numpys_svd(W, r):
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    return torch.from_numpy(U[:, :r] * S[:r]), torch.from_numpy(Vh[:r])


def from_a_name_of_its_own(W, r, decompose=torch.linalg.svd):
    U, S, Vh = decompose(W, full_matrices=False)
    return U[:, :r] * S[:r], Vh[:r]


FACTORS = {
    "an SVD after all": (by_svd, "without an SVD", "you call svd"),
    "the library's SVD": (lambda W, r: truncated_svd(W, r)[::2], "without an SVD", "you call svd"),
    "NumPy's SVD": (by_numpys_svd, "without an SVD", "you call svd"),
    "an SVD imported before": (from_a_name_of_its_own, "without an SVD", "you call svd"),
    "eigenvectors of WᵀW": (by_eigenvectors, "without an SVD", "you call eigh"),
    "factors swapped": (lambda W, r: als(W, r)[::-1], "(m, r)", "you return (A, B)"),
    "the transpose fitted": (lambda W, r: als(W.T, r), "(m, r)", "you fitted Wᵀ"),
    "the product": (lambda W, r: torch.matmul(*als(W, r)), "(m, r)", "return a Tensor"),
    "only B solved": (only_B, "within 1 %", "A not for your B"),
    "one sweep": (lambda W, r: als(W, r, 1), "within 1 %", "B not for your A"),
    "a rank too many": (lambda W, r: als(W, r + 1), "(m, r)", "your B has shape"),
    "products for solves": (without_inverse, "within 1 %", "neither factor"),
    "descent with one fixed rate": (descent, "", "NaN"),
}


@pytest.mark.parametrize("mistake", FACTORS)
def test_fitted_factors_names_the_mistake(mistake: str) -> None:
    answer, step, symptom = FACTORS[mistake]
    report = checks.fitted_factors(answer)
    if mistake == "descent with one fixed rate":  # too slow or divergent: which of them comes first is a matter of luck
        assert report.status == "failed", report.text
        assert "NaN" in report.symptom or "times the smallest" in report.symptom
    else:
        assert_found(report, step, symptom)


def by_pseudoinverse(W, r):
    A = torch.randn(r, W.shape[1], dtype=W.dtype)
    for _ in range(40):
        B = W @ torch.linalg.pinv(A)
        A = torch.linalg.pinv(B) @ W
    return B, A


def by_normal_equations(W, r):
    A = torch.randn(r, W.shape[1], dtype=W.dtype)
    for _ in range(40):
        B = torch.linalg.solve(A @ A.T, A @ W.T).T
        A = torch.linalg.solve(B.T @ B, B.T @ W)
    return [B, A]


def subspace_iteration(W, r):
    Q = torch.randn(W.shape[1], r, dtype=W.dtype)
    for _ in range(60):
        Q, _ = torch.linalg.qr(W.T @ (W @ Q))
    return W @ Q, Q.T


def until_it_stops(W, r):
    A, last = torch.randn(r, W.shape[1], dtype=W.dtype), float("inf")
    while True:
        B = torch.linalg.lstsq(A.T, W.T).solution.T
        A = torch.linalg.lstsq(B, W).solution
        error = (W - B @ A).norm().item()
        if error > last * (1 - 1e-6):
            return B, A
        last = error


RIGHT_FACTORS = {
    "30 sweeps": lambda W, r: als(W, r, 30),
    "pseudo-inverses": by_pseudoinverse,
    "normal equations": by_normal_equations,
    "subspace iteration": subspace_iteration,
    "until the error stops falling": until_it_stops,
}
test_other_factors_pass = each_passes(checks.fitted_factors, RIGHT_FACTORS)


def input_directions(W, X, r):
    _, _, Vh = truncated_svd(X, r)
    return W @ Vh.T @ Vh


def weighted_not_undone(W, X, r):
    C = X.T @ X
    values, vectors = torch.linalg.eigh(C)
    return low_rank_approximation(W @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T, r)


def weighted_by_inverse(W, X, r):
    values, vectors = torch.linalg.eigh(X.T @ X)
    root = (vectors * values.sqrt()) @ vectors.T
    return low_rank_approximation(W @ root, r) @ torch.linalg.inv(root)


def centred(W, X, r):
    U, _, _ = truncated_svd(W @ (X - X.mean(0)).T, r)
    return U @ U.T @ W


def projected(U, W):
    return U @ (U.T @ W)


def row_norms(W, X, r):
    scale = X.norm(dim=0)
    return low_rank_approximation(W * scale, r) / scale


DATA_AWARE = {
    "inputs ignored": (lambda W, X, r: low_rank_approximation(W, r), "error on the outputs", "inputs play no part"),
    "the inputs' directions": (input_directions, "error on the outputs", "inputs' strongest directions"),
    "outputs returned": (lambda W, X, r: low_rank_approximation(W @ X.T, r), "shape", "has shape"),
    "weighting not undone": (weighted_not_undone, "error on the outputs", "times the smallest possible"),
    "a root that has no inverse": (weighted_by_inverse, "fewer inputs", ""),
    "inputs centred": (centred, "error on the outputs", "times the smallest possible"),
    "only the lengths of columns": (row_norms, "error on the outputs", "times the smallest possible"),
    "not low-rank": (lambda W, X, r: W, "rank r", "nothing was dropped"),
    "samples as columns": (
        lambda W, X, r: truncated_svd(W @ X, r)[0] @ truncated_svd(W @ X, r)[0].T @ W,
        "shape",
        "cannot be multiplied",
    ),
}
test_data_aware_names_the_mistake = each_is_found(checks.data_aware_approximation, DATA_AWARE)


def vectors_of_gram(W):
    """W's right directions and singular values from the eigenvectors of WᵀW, the largest first."""
    values, vectors = torch.linalg.eigh(W.T @ W)
    return vectors.flip(1), values.flip(0).clamp(min=0).sqrt()


def one_sign_flipped(W, r):
    U, S, Vh = by_slices(W, r)
    return U * torch.tensor([-1.0] + [1.0] * (r - 1)), S, Vh


def v_for_vh(W, r):
    U, S, V = torch.svd(W, some=False)  # full V: for W with fewer rows than columns its rows have the right length
    return U[:, :r], S[:r], V[:r]


def by_slices(W, r):
    U, S, Vh = pieces(W)
    return U[:, :r], S[:r], Vh[:r]


def put_together(W, r):
    U, S, Vh = by_slices(W, r)
    return (U * S) @ Vh


PIECES = {
    "nothing cut": (lambda W, r: pieces(W), "U is (m, r)", "all its columns are still there"),
    "S not cut": (lambda W, r: (pieces(W)[0][:, :r], pieces(W)[1], pieces(W)[2][:r]), "U is", "values are still there"),
    "Vh cut by columns": (lambda W, r: (pieces(W)[0][:, :r], pieces(W)[1][:r], pieces(W)[2][:, :r]), "U is", "columns"),
    "U cut by rows": (lambda W, r: (pieces(W)[0][:r], pieces(W)[1][:r], pieces(W)[2][:r]), "U is", "your U is"),
    "V for Vh": (lambda W, r: (*by_slices(W, r)[:2], by_slices(W, r)[2].T), "U is", "that is V"),
    "rows of V, as published": (v_for_vh, "as close to W", "torch.svd returns V"),
    "S as a matrix": (
        lambda W, r: (by_slices(W, r)[0], by_slices(W, r)[1].diag(), by_slices(W, r)[2]),
        "U is",
        "diagonal",
    ),
    "put together already": (put_together, "U is", "expected U, S and Vh"),
    "two factors": (lambda W, r: by_slices(W, r)[::2], "U is", "2 objects"),
    "the smallest pieces": (
        lambda W, r: (pieces(W)[0][:, -r:], pieces(W)[1][-r:], pieces(W)[2][-r:]),
        "largest",
        "the smallest ones",
    ),
    "eigenvalues": (
        lambda W, r: (by_slices(W, r)[0], by_slices(W, r)[1] ** 2, by_slices(W, r)[2]),
        "largest",
        "squares",
    ),
    "S in U as well": (
        lambda W, r: (by_slices(W, r)[0] * by_slices(W, r)[1], *by_slices(W, r)[1:]),
        "orthogonal unit vectors",
        "which S holds already",
    ),
    "the library's": (lambda W, r: truncated_svd(W, r), "U is", "which truncates for you"),
    "one sign flipped": (one_sign_flipped, "as close to W", "signs"),
}
test_pieces_name_the_mistake = each_is_found(checks.truncated_svd, PIECES)


def by_eigenvectors(W, r):
    V, S = vectors_of_gram(W)
    return W @ V[:, :r] / S[:r], S[:r], V[:, :r].T


def in_numpy(W, r):
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    return [torch.from_numpy(np.ascontiguousarray(each)) for each in (U[:, :r], S[:r], Vh[:r])]


def by_torch_svd(W, r):
    U, S, V = torch.svd(W)
    return U[:, :r], S[:r], V[:, :r].T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("answer", [by_slices, by_eigenvectors, in_numpy, by_torch_svd])
def test_pieces_found_in_other_ways_pass(answer, seed, monkeypatch) -> None:
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", str(seed))
    assert checks.truncated_svd(answer).status == "passed"


def test_your_turn_in_the_lesson() -> None:
    cell = next(each for each in read(find_notebook("01")).cells if "your-turn" in each.metadata.get("tags", []))
    for source, status in ((cell.source, "passed"), (cell.metadata.stub, "not done")):
        space = {"torch": torch}
        exec(source, space)
        assert checks.truncated_svd(space["truncated_svd"]).status == status


RIGHT_DATA_AWARE = {
    "by a pseudo-inverse": lambda W, X, r: low_rank_approximation(W @ X.T, r) @ torch.linalg.pinv(X.T),
    "by PyTorch's SVD": lambda W, X, r: torch.linalg.svd(W @ X.T)[0][:, :r] @ torch.linalg.svd(W @ X.T)[0][:, :r].T @ W,
    "by eigenvectors": lambda W, X, r: projected(torch.linalg.eigh(W @ X.T @ X @ W.T).eigenvectors[:, -r:], W),
}
test_other_data_aware_matrices_pass = each_passes(checks.data_aware_approximation, RIGHT_DATA_AWARE)


@pytest.mark.parametrize("name", CHECKS)
def test_hints_go_from_symptom_to_fix(name: str, capsys: pytest.CaptureFixture) -> None:
    def nonsense(*arguments):
        return "42"

    texts = [getattr(checks, name)(nonsense, hint=hint).text for hint in (1, 2, 3)]
    assert len(set(texts)) == 3
    assert all("✗" in text for text in texts)


def test_numbers_in_the_prose() -> None:
    """What the lesson's folded answers and its text state without printing it."""
    assert eckart_young_error(torch.tensor([4.0, 2, 1]), 1) == pytest.approx((5**0.5, 2))
    assert f"{5**0.5:.3f}" == "2.236"
    W = low_rank_approximation(torch.randn(9, 7, dtype=torch.float64), 5)
    assert W.norm() == pytest.approx((W**2).sum().sqrt())  # the Frobenius norm, and from singular values
    assert W.norm() == pytest.approx(singular_values(W).norm())
