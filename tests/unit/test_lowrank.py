"""The low-rank tools against numpy in float64, against closed forms, and on bad input."""

import math

import numpy as np
import pytest
import torch

from lora_edu.lowrank import (
    eckart_young_error,
    effective_rank,
    energy_rank,
    low_rank_approximation,
    singular_values,
    stable_rank,
    subspace_similarity,
    truncated_svd,
)

SHAPES = [(7, 7), (5, 12), (12, 5), (1, 6), (6, 1)]


def draw(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(n, k, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0]


def with_spectrum(values, m, n, seed=0):
    """A matrix (m, n) whose singular values are known because it was built from them."""
    k = len(values)
    return torch.from_numpy(orthonormal(m, k, seed) * np.array(values, float) @ orthonormal(n, k, seed + 1).T)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncated_svd_is_numpys(shape):
    W = draw(shape)
    for r in range(1, min(shape) + 1):
        U, S, Vh = truncated_svd(W, r)
        assert (U.shape, S.shape, Vh.shape) == ((shape[0], r), (r,), (r, shape[1]))
        u, s, vh = np.linalg.svd(W.numpy(), full_matrices=False)
        np.testing.assert_allclose(S, s[:r], rtol=1e-12)
        np.testing.assert_allclose((U * S) @ Vh, u[:, :r] * s[:r] @ vh[:r], atol=1e-12)
        np.testing.assert_allclose(low_rank_approximation(W, r), u[:, :r] * s[:r] @ vh[:r], atol=1e-12)
        np.testing.assert_allclose(U.T @ U, np.eye(r), atol=1e-12)
        np.testing.assert_allclose(Vh @ Vh.T, np.eye(r), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    W = draw((9, 14), dtype=dtype)
    U, S, Vh = truncated_svd(W, 9)
    assert (U.dtype, S.dtype, Vh.dtype) == (torch.float32,) * 3
    np.testing.assert_allclose((U * S) @ Vh, W.float(), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_eckart_young_error_is_the_error_of_the_truncation(shape):
    W = draw(shape, seed=1)
    for r in range(1, min(shape) + 1):
        rest = (W - low_rank_approximation(W, r)).numpy()
        expected = (np.linalg.norm(rest), np.linalg.norm(rest, 2))
        np.testing.assert_allclose(eckart_young_error(W, r), expected, atol=1e-12)
        np.testing.assert_allclose(eckart_young_error(singular_values(W), r), expected, atol=1e-12)
    np.testing.assert_allclose(eckart_young_error(W, 0), (np.linalg.norm(W), np.linalg.norm(W, 2)), rtol=1e-12)


def test_no_other_matrix_of_that_rank_comes_below():
    r = 2
    best, best_spectral = eckart_young_error(draw((10, 6), seed=2), r)
    W = draw((10, 6), seed=2).numpy()
    rng = np.random.default_rng(0)
    for trial in range(200):
        span = np.linalg.qr(W @ rng.normal(size=(6, r)))[0]
        other = span @ (span.T @ W) + (trial % 2) * 0.01 * span @ rng.normal(size=(r, 6))
        assert np.linalg.norm(W - other) > best
        assert np.linalg.norm(W - other, 2) >= best_spectral - 1e-12


def test_effective_rank_closed_forms():
    assert effective_rank(with_spectrum([3.0], 8, 5)) == pytest.approx(1)
    assert effective_rank(with_spectrum([2, 2, 2, 2], 8, 5)) == pytest.approx(4)
    p = np.array([4, 2, 1, 1]) / 8
    assert effective_rank(with_spectrum([4, 2, 1, 1], 6, 9)) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    # (1/2, 1/4, 1/8, 1/8) has an entropy of 7/4 bits
    assert effective_rank(torch.tensor([4.0, 2, 1, 1])) == pytest.approx(2**1.75)
    assert effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)


def test_effective_rank_forgets_scale_order_and_orientation():
    W = draw((6, 11), seed=3)
    for other in (1e-20 * W, W.T, W[torch.randperm(6, generator=torch.Generator().manual_seed(0))]):
        assert effective_rank(other) == pytest.approx(effective_rank(W))
    assert effective_rank(torch.tensor([1.0, 4, 2, 1])) == pytest.approx(2**1.75)


def test_stable_rank():
    assert stable_rank(with_spectrum([4, 2, 1], 5, 7)) == pytest.approx(21 / 16)
    assert stable_rank(torch.eye(6)) == pytest.approx(6)


@pytest.mark.parametrize(
    ("share", "rank"), [(0.1, 1), (0.63, 1), (0.65, 2), (0.95, 2), (0.97, 3), (0.98, 3), (0.995, 4), (1.0, 4)]
)
def test_energy_rank(share, rank):
    # energies 64, 32, 3, 1 of 100: cumulative shares 0.64, 0.96, 0.99, 1
    assert energy_rank(torch.tensor([64.0, 32, 3, 1]).sqrt(), share) == rank
    assert energy_rank(with_spectrum(np.sqrt([64, 32, 3, 1]), 6, 4), share) == rank


def test_energy_rank_keeps_the_share_it_promises():
    W = draw((20, 30), seed=4)
    for share in (0.01, 0.3, 0.5, 0.9, 0.999):
        r = energy_rank(W, share)
        total = np.linalg.norm(W) ** 2
        assert 1 - eckart_young_error(W, r)[0] ** 2 / total >= share
        assert r == 1 or 1 - eckart_young_error(W, r - 1)[0] ** 2 / total < share


def test_subspace_similarity_is_the_papers_formula():
    A, B = draw((4, 9), seed=5), draw((6, 9), seed=6)
    right_a, right_b = (np.linalg.svd(M.numpy())[2].T for M in (A, B))
    for i in range(1, 5):
        for j in range(1, 7):
            expected = np.linalg.norm(right_a[:, :i].T @ right_b[:, :j]) ** 2 / min(i, j)
            assert subspace_similarity(A, B, i, j) == pytest.approx(expected, abs=1e-12)
            assert subspace_similarity(B, A, j, i) == pytest.approx(expected, abs=1e-12)


def test_subspace_similarity_extremes_and_invariance():
    basis = orthonormal(12, 8)
    first = torch.from_numpy(np.diag([4.0, 3, 2, 1]) @ basis[:, :4].T)
    second = torch.from_numpy(np.diag([4.0, 3, 2, 1]) @ basis[:, 4:].T)
    assert subspace_similarity(first, first, 2, 4) == pytest.approx(1)
    assert subspace_similarity(first, second, 4, 4) == pytest.approx(0, abs=1e-20)
    # output space does not matter: any rotation from the left leaves φ as it was
    turned = torch.from_numpy(orthonormal(4, 4, seed=3)) @ first
    assert subspace_similarity(turned, first, 3, 2) == pytest.approx(1)
    assert subspace_similarity(first.float(), first, 4, 4) <= 1.0


def test_subspace_similarity_of_random_spans_is_the_larger_over_k():
    values = [subspace_similarity(draw((8, 200), s), draw((16, 200), s + 100), 8, 16) for s in range(20)]
    assert np.mean(values) == pytest.approx(16 / 200, rel=0.1)


def test_inputs_are_left_alone_and_gradients_do_not_leak():
    W = draw((4, 5)).requires_grad_()
    before = W.detach().clone()
    U, S, _ = truncated_svd(W, 2)
    assert not U.requires_grad
    assert not S.requires_grad
    assert torch.equal(W.detach(), before)


@pytest.mark.errors
@pytest.mark.parametrize("r", [0, -1, 5, 2.0, "2", None, True])
def test_rank_out_of_range(r):
    with pytest.raises(ValueError, match=r"r="):
        truncated_svd(draw((4, 6)), r)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("W", "says"),
    [
        (torch.ones(2, 3, 4), r"shape \(2, 3, 4\)"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.empty(0, 3), r"shape \(0, 3\)"),
        (torch.ones(2, 2, dtype=torch.int64), "int64"),
        (np.ones((2, 2)), "ndarray"),
        (torch.tensor([[1.0, math.nan]]), "NaN"),
        (torch.tensor([[1.0, -math.inf]]), "infinite"),
    ],
)
def test_not_a_finite_matrix(W, says):
    with pytest.raises(ValueError, match=says):
        truncated_svd(W, 1)


@pytest.mark.errors
def test_other_bad_input():
    with pytest.raises(ValueError, match="zero"):
        effective_rank(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="zero"):
        stable_rank(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="below zero"):
        effective_rank(torch.tensor([1.0, -1.0]))
    for share in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share="):
            energy_rank(torch.eye(3), share)
    with pytest.raises(ValueError, match="r=4"):
        eckart_young_error(torch.eye(3), 4)
    with pytest.raises(ValueError, match="same number of columns"):
        subspace_similarity(torch.eye(3), torch.ones(3, 4), 1, 1)
    with pytest.raises(ValueError, match="i=4"):
        subspace_similarity(torch.eye(3), torch.eye(3), 4, 1)
    with pytest.raises(ValueError, match="j=0"):
        subspace_similarity(torch.eye(3), torch.eye(3), 1, 0)
    with pytest.raises(ValueError, match="B holds NaN"):
        subspace_similarity(torch.eye(3), torch.full((3, 3), math.nan), 1, 1)
