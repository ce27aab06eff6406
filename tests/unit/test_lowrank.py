"""The low-rank tools against numpy in float64, against closed forms, and on bad input."""

import math

import numpy as np
import pytest
import torch

from lora_edu.lowrank import (
    amplification_factor,
    eckart_young_error,
    effective_rank,
    energy_rank,
    intruder_dimensions,
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


@pytest.mark.parametrize("shape", SHAPES)
def test_amplification_factor_is_numpys(shape):
    W, delta = draw(shape, seed=3), draw(shape, seed=4)
    u, _, vh = np.linalg.svd(delta.numpy())
    for r in range(1, min(shape) + 1):
        inside = sum((u[:, i] @ W.numpy() @ vh[j]) ** 2 for i in range(r) for j in range(r)) ** 0.5
        assert amplification_factor(W, delta, r) == pytest.approx(np.linalg.norm(delta) / inside, rel=1e-9)


def test_amplification_factor_in_closed_form():
    """An update along W's own k-th directions, c times as long, amplifies by c / σ_k: the weaker, the more."""
    sigma = [8.0, 4.0, 2.0, 0.5]
    U, V = orthonormal(9, 4, seed=5), orthonormal(7, 4, seed=6)
    W = torch.from_numpy(U * np.array(sigma) @ V.T)
    for k, value in enumerate(sigma):
        delta = torch.from_numpy(3 * np.outer(U[:, k], V[:, k]))
        assert amplification_factor(W, delta, 1) == pytest.approx(3 / value, rel=1e-9)
        assert amplification_factor(W, -10 * delta, 1) == pytest.approx(30 / value, rel=1e-9)
    both = torch.from_numpy(U[:, 2:] @ V[:, 2:].T)
    assert amplification_factor(W, both, 2) == pytest.approx((2 / (2.0**2 + 0.5**2)) ** 0.5, rel=1e-9)
    assert amplification_factor(W.half(), both, 2) == pytest.approx(amplification_factor(W, both.float(), 2), rel=1e-2)


def numpys_intruders(W, tuned, top_k, threshold):
    known = np.linalg.svd(W.numpy(), full_matrices=False)[0].T
    new = np.linalg.svd(tuned.numpy(), full_matrices=False)[0].T[:top_k]
    return sum(max(abs(float(u @ v)) for v in known) < threshold for u in new)


@pytest.mark.parametrize("shape", [(20, 20), (16, 40), (40, 16)])
def test_intruder_dimensions_are_numpys(shape):
    W, found = draw(shape, seed=7), []
    for scale in (0.0, 0.1, 1.0, 10.0):
        tuned = W + scale * draw((shape[0], 2), seed=8) @ draw((2, shape[1]), seed=9)
        for top_k, threshold in ((1, 0.5), (5, 0.7), (10, 0.5), (16, 0.9)):
            found.append(intruder_dimensions(W, tuned, top_k, threshold))
            assert found[-1] == numpys_intruders(W, tuned, top_k, threshold)
    assert found[:4] == [0, 0, 0, 0]  # what did not move holds nothing new
    assert max(found) > 2


def test_a_direction_made_of_many_known_ones_is_an_intruder():
    sigma = np.linspace(2, 1, 16)
    U, V = orthonormal(16, 16, seed=10), orthonormal(16, 16, seed=11)
    W = torch.from_numpy(U * sigma @ V.T)
    mixed = torch.from_numpy(np.outer(U.mean(axis=1) * 4, V.mean(axis=1) * 4))  # a cosine of 1/4 with every direction
    assert intruder_dimensions(W, W + 100 * mixed, top_k=1, threshold=0.26) == 1
    assert intruder_dimensions(W, W + 100 * mixed, top_k=1, threshold=0.24) == 0
    assert intruder_dimensions(W, W + 100 * torch.from_numpy(np.outer(U[:, 3], V[:, 3])), top_k=1) == 0
    assert intruder_dimensions(W, W - 3 * W) == 0  # a sign is no new direction


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"threshold_epsilon": 0.8}])
def test_intruder_dimensions_are_pefts(options):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(*[torch.nn.Linear(30, 30) for _ in range(6)], torch.nn.Linear(30, 18)),
        LoraConfig(r=3, lora_alpha=6, target_modules=[str(i) for i in range(7)], init_lora_weights=False),
    )
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    for scale, layer in zip((0, 0.3, 1, 3, 10, 30, 3), layers.values(), strict=True):
        layer.lora_B["default"].weight.data *= scale
    mine = {"top_k": options.get("top_k", 10), "threshold": options.get("threshold_epsilon", 0.5)}
    ours = {
        name: intruder_dimensions(layer.weight, layer.weight + layer.get_delta_weight("default"), **mine)
        for name, layer in layers.items()
    }
    said = []
    reduce_intruder_dimension(model, logging_sink=said.append, **options)
    counts = {line.split(": ")[0]: line.split(": ")[-1] for line in said if ": " in line}
    assert {name: 0 if text == "No intruders" else int(text) for name, text in counts.items()} == ours
    assert len(set(ours.values())) > 1
    assert 0 in ours.values()


@pytest.mark.errors
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: amplification_factor(torch.eye(3), torch.eye(4), 1), r"W is \(3, 3\) and delta \(4, 4\)"),
        (lambda: amplification_factor(torch.eye(3), torch.eye(3), 4), "r=4"),
        (lambda: amplification_factor(torch.eye(3), torch.zeros(3, 3), 1), "delta is zero.*was the adapter trained"),
        (lambda: amplification_factor(torch.zeros(3, 3), torch.eye(3), 1), "W is zero in delta's top 1"),
        (lambda: amplification_factor(torch.eye(3), torch.full((3, 3), math.nan), 1), "delta holds NaN"),
        (lambda: intruder_dimensions(torch.eye(12), torch.ones(12, 13)), r"W is \(12, 12\) and tuned \(12, 13\)"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3)), r"top_k=10: .* from 1 to 3"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3), 0), "top_k=0"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3), 2, 0.0), "threshold=0.0"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3), 2, 1.5), "threshold=1.5"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3), 2, math.nan), "threshold=nan"),
    ],
)
def test_bad_input_to_comparing_two_weights(call, says):
    with pytest.raises(ValueError, match=says):
        call()


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
