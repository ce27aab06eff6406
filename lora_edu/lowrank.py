"""Low rank and the singular value decomposition: what a rank-r matrix can hold, and how to measure it.

Every function takes a 2-D tensor in any floating type on any device and computes in at least float32 (float64 stays
float64). Built in lesson 01; used again in lessons 02 (is the update low-rank?) and 10 (do two ranks find the same
directions?).
"""

import math
import operator

import torch
from torch import Tensor


def truncated_svd(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular values of W with their vectors: W ≈ U · diag(S) · Vh.

    The columns of U and the rows of Vh are unit vectors and orthogonal to each other. Their signs are arbitrary: flip
    a column of U together with the same row of Vh and the product stays what it is. Only the product is unique, and
    only if σ_r > σ_{r+1}.

    Args:
        W: the matrix, (m, n).
        r: how many to keep, 1 ≤ r ≤ min(m, n).

    Returns:
        U (m, r), S (r,) in falling order, Vh (r, n); note Vh, not V: its rows are the directions in input space.

    Raises:
        ValueError: if W is not a finite floating matrix or r is out of range.

    Source: Eckart and Young 1936. Built in lesson 01.
    """
    W = _matrix(W)
    r = _rank(r, min(W.shape), "r", f"min{tuple(W.shape)}")
    # 576 × 576 at r=8: U is (576, 8), S (8,), Vh (8, 576).
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r, :]


def low_rank_approximation(W: Tensor, r: int) -> Tensor:
    """The rank-r matrix nearest to W in the Frobenius and in the spectral norm, (m, n). Built in lesson 01."""
    U, S, Vh = truncated_svd(W, r)
    return (U * S) @ Vh


def singular_values(W: Tensor) -> Tensor:
    """All min(m, n) singular values of W, largest first.

    Raises:
        ValueError: if W is not a finite floating matrix.
    """
    return torch.linalg.svdvals(_matrix(W))


def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The singular values of B A from its thin factors, without forming the product: at most r of them, largest first.

    With B = Q_B R_B and Aᵀ = Q_A R_A they are those of the small matrix R_B R_Aᵀ, as Q_B and Q_A only turn.

    Args:
        B: (m, r).
        A: (r, n).

    Raises:
        ValueError: if one is not a finite floating matrix, or they cannot be multiplied.
    """
    B, A = _matrix(B, "B"), _matrix(A, "A")
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"B is {tuple(B.shape)} and A {tuple(A.shape)}: B needs as many columns as A has rows")
    dtype = torch.promote_types(A.dtype, B.dtype)
    R_B, R_A = (torch.linalg.qr(factor.to(dtype), mode="r").R for factor in (B, A.T))
    return singular_values(R_B @ R_A.T)


def eckart_young_error(W: Tensor, r: int) -> tuple[float, float]:
    """The smallest error that any matrix of rank at most r can have against W: what the theorem promises.

    Args:
        W: the matrix (m, n), or its singular values (min(m, n),) if you have them already.
        r: the rank, 0 ≤ r ≤ min(m, n); at r = 0 the error is the norm of W itself.

    Returns:
        (Frobenius, spectral): √(σ²_{r+1} + σ²_{r+2} + …) and σ_{r+1}.

    Raises:
        ValueError: if W is neither a matrix nor a list of singular values, or r is out of range.

    Source: Eckart and Young 1936 (Frobenius), Mirsky 1960 (every norm made of singular values). Built in lesson 01.
    """
    S = _spectrum(W)
    r = _rank(r, len(S), "r", "the number of singular values", smallest=0)
    rest = S[r:]
    return (rest.norm().item(), rest[0].item()) if len(rest) else (0.0, 0.0)


def effective_rank(W: Tensor) -> float:
    """How many singular values take part, weighted by size: exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ.

    It is 1 for a rank-one matrix, n if all n singular values are equal, and in between it moves smoothly. A matrix of
    rank k has at most k. Unlike the rank it does not jump to full when a little noise is added.

    Args:
        W: the matrix (m, n), or its singular values.

    Raises:
        ValueError: if W is zero (no direction has any share), or is not a matrix or a list of singular values.

    Source: Roy and Vetterli 2007. Built in lesson 01.
    """
    S = _spectrum(W)
    p = S / _positive(S.sum())
    return math.exp(-torch.special.xlogy(p, p).sum().item())


def stable_rank(W: Tensor) -> float:
    """‖W‖²_F / σ₁²: like the effective rank between 1 and the rank, but it only asks how far the first one leads.

    Args:
        W: the matrix (m, n), or its singular values.

    Raises:
        ValueError: if W is zero, or is not a matrix or a list of singular values.

    Source: Rudelson and Vershynin 2007. Used in lesson 02.
    """
    S = _spectrum(W)
    return ((S / _positive(S[0])) ** 2).sum().item()


def energy_rank(W: Tensor, share: float) -> int:
    """The smallest r whose truncated SVD holds at least this share of the energy Σσ² = ‖W‖²_F.

    Args:
        W: the matrix (m, n), or its singular values.
        share: of the energy, 0 < share ≤ 1.

    Raises:
        ValueError: if the share is out of range, W is zero, or is not a matrix or a list of singular values.

    Built in lesson 01.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a share of the energy, above 0 and at most 1 (0.9 for 90 %)")
    S = _spectrum(W)
    energy = (S / _positive(S[0])) ** 2
    # What is left after keeping 0, 1, 2, … values, summed from the small end, so that rounding does not hide the tail.
    left = energy.flip(0).cumsum(0).flip(0)
    return max(1, int((left > (1 - share) * left[0]).sum()))


def subspace_similarity(A: Tensor, B: Tensor, i: int, j: int) -> float:
    """How much of the span of A's top i directions lies in the span of B's top j: φ in [0, 1].

    φ(A, B, i, j) = ‖U_Aⁱᵀ U_Bʲ‖²_F / min(i, j), where the columns of U_Aⁱ are the top i *right* singular vectors of A
    (directions in its input space) and likewise for B. 1: the smaller span lies inside the larger one; 0: orthogonal.
    Two random spans in k dimensions give about max(i, j) / k, so a small φ may still be chance.

    Args:
        A: (r, k); LoRA's A for one run. Any matrix with k columns works: (d, k) for a whole ΔW.
        B: (r', k); another run's A. For LoRA's B matrices, whose directions are outputs, pass both transposed.
        i, j: how many directions of each, at least 1 and at most the number of singular values.

    Raises:
        ValueError: if the numbers of columns differ, i or j is out of range, or a matrix is not a finite one.

    Source: Hu et al. 2021, eq. 4. Used in lessons 02 and 10.
    """
    A, B = _matrix(A, "A"), _matrix(B, "B")
    if A.shape[1] != B.shape[1]:
        raise ValueError(
            f"A is {tuple(A.shape)} and B {tuple(B.shape)}: their directions are compared in input space, so both "
            "need the same number of columns; transpose both to compare output directions"
        )
    dtype = torch.promote_types(A.dtype, B.dtype)
    i, j = _rank(i, min(A.shape), "i", f"min{tuple(A.shape)}"), _rank(j, min(B.shape), "j", f"min{tuple(B.shape)}")
    _, _, VhA = truncated_svd(A.to(dtype), i)
    _, _, VhB = truncated_svd(B.to(dtype), j)
    phi = ((VhA @ VhB.T) ** 2).sum().item() / min(i, j)
    return min(phi, 1.0)  # rounding may reach 1.0000001


def amplification_factor(W: Tensor, delta: Tensor, r: int) -> float:
    """How many times stronger ΔW is than W in the directions in which ΔW is strongest.

    ‖ΔW‖_F / ‖Uᵀ W V‖_F, where U (m, r) and V (n, r) hold ΔW's top r singular vectors. Large: the update amplifies
    directions that W has but does not stress. About 1 or below: it goes along directions that are already strong.

    Args:
        W: the pretrained weight, (m, n).
        delta: the update, of the same shape, for instance ``layer.delta_weight()``.
        r: how many of ΔW's directions to look at.

    Raises:
        ValueError: if the shapes differ, r is out of range, the update is zero, or W has nothing in its directions.

    Source: Hu et al. 2021, section 7.3 and table 7. Used in the recorded runs of ``lab/recording/experiments.py``.
    """
    W, delta = _same_shape(W, delta, "delta")
    U, _, Vh = truncated_svd(delta, r)
    stressed = (U.T @ W @ Vh.T).norm()  # (r, m) · (m, n) · (n, r): how much of W lies in these directions
    if not delta.any():
        raise ValueError("delta is zero: an update that does nothing has no directions; was the adapter trained?")
    if stressed == 0:
        raise ValueError(f"W is zero in delta's top {r} directions, so there is nothing that could be amplified")
    return (delta.norm() / stressed).item()


def intruder_dimensions(W: Tensor, tuned: Tensor, top_k: int = 10, threshold: float = 0.5) -> int:
    """How many of the tuned weight's top singular directions the pretrained weight does not know.

    One of the ``top_k`` left singular vectors of ``tuned`` is an intruder if its cosine with every left singular
    vector of ``W`` stays below ``threshold`` in size.

    Args:
        W: the pretrained weight, (m, n).
        tuned: the weight after training, of the same shape, for instance ``layer.effective_weight()``.
        top_k: how many of its directions to look at, from 1 to min(m, n).
        threshold: below which cosine a direction counts as unknown, above 0 and at most 1.

    Raises:
        ValueError: if the shapes differ, or ``top_k`` or ``threshold`` is out of range.

    Source: Shuttleworth et al. 2024, algorithm 1; PEFT's ``reduce_intruder_dimension`` has the same defaults.
    Used in the recorded runs of ``lab/recording/experiments.py``.
    """
    W, tuned = _same_shape(W, tuned, "tuned")
    top_k = _rank(top_k, min(W.shape), "top_k", f"min{tuple(W.shape)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected a cosine above 0 and at most 1 (the paper takes 0.5)")
    U, _, _ = truncated_svd(tuned, top_k)
    known, _, _ = torch.linalg.svd(W, full_matrices=False)
    return int(((known.T @ U).abs().amax(dim=0) < threshold).sum())


def _same_shape(W: Tensor, other: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both as matrices of one floating type; a shape that differs is an error that calls the other by its name."""
    W, other = _matrix(W), _matrix(other, name)
    if W.shape != other.shape:
        raise ValueError(f"W is {tuple(W.shape)} and {name} {tuple(other.shape)}: both need the shape of one layer")
    dtype = torch.promote_types(W.dtype, other.dtype)
    return W.to(dtype), other.to(dtype)


def _matrix(W: Tensor, name: str = "W") -> Tensor:
    if not isinstance(W, Tensor) or not W.is_floating_point():
        kind = W.dtype if isinstance(W, Tensor) else type(W).__name__
        raise ValueError(f"{name} is {kind}: expected a floating-point torch tensor; torch.as_tensor(…).float() helps")
    if W.ndim != 2 or 0 in W.shape:
        raise ValueError(f"{name} has shape {tuple(W.shape)}: expected a matrix (m, n); reshape or pick one matrix")
    if not W.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite entries: it has no singular values; look for where they arise")
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))


def _spectrum(W: Tensor) -> Tensor:
    """Singular values in float64 from a matrix, or from a vector that holds them already."""
    if isinstance(W, Tensor) and W.ndim == 1:
        S = _matrix(W[None, :], "the vector of singular values")[0]
        if (S < 0).any():
            raise ValueError(f"a singular value is {S.min().item()}: expected none below zero; is this a matrix row?")
        return S.to("cpu", torch.float64).sort(descending=True).values
    return singular_values(W).to("cpu", torch.float64)


def _rank(r: int, largest: int, name: str, limit: str, smallest: int = 1) -> int:
    try:
        whole = operator.index(r)
    except TypeError:
        raise ValueError(f"{name}={r!r}: expected a whole number") from None
    if isinstance(r, bool) or not smallest <= whole <= largest:
        raise ValueError(f"{name}={r}: expected a whole number from {smallest} to {largest}, which is {limit}")
    return whole


def _positive(value: Tensor) -> Tensor:
    if value == 0:
        raise ValueError("all singular values are zero: a zero matrix has no directions to count or share out")
    return value
