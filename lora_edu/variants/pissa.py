"""PiSSA: train the weight's largest singular directions, and freeze the rest. Built in lesson 16.

Idea: LoRA starts with random directions. PiSSA starts with those in which the weight itself is largest, its principal
singular vectors, and lets these train.
Formula: s · B₀ A₀ = U_r S_r V_rᵀ of W = U S Vᵀ, with A₀ = √(S_r / s) V_rᵀ and B₀ = U_r √(S_r / s); then
y = (W − s · B₀ A₀) x + s · B A x
Cost: one singular value decomposition of each weight before training (``"pissa_niter_4"``: a randomised one). Then
LoRA's numbers train; here the start is kept beside them, since the base stays as it is: 2r · (in + out) numbers are
stored and multiplied.
Merging: exact up to one rounding: W + s · (B A − B₀ A₀) is a plain weight. A file is a plain LoRA of twice the rank.
Papers: [Meng et al. 2024](https://arxiv.org/abs/2404.02948) report quicker convergence than LoRA's and, with
Mistral-7B on GSM8K, 72.86 % against 67.7 %, in one set-up for both. [Lee et al.
2026](https://arxiv.org/abs/2602.04998) tune the learning rate of each method anew: the best results lie within one or
two percent of each other, and PiSSA wants a smaller rate than LoRA.

Switched on by ``LoraConfig(init_lora_weights="pissa")``, as in PEFT. There the start is taken out of the frozen weight,
in place; see ``shifted.py`` for what is done here, on four-bit layers and embeddings too (PEFT quietly starts
embeddings as plain LoRA).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.methods import InjectionContext, register
from lora_edu.lowrank import truncated_svd
from lora_edu.variants.shifted import Start, as_plain_lora, shifted_builders

PREFIX = "pissa_niter_"


def pissa_start(W: Tensor, r: int, s: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """A₀ and B₀ with s · B₀ A₀ = the rank-r matrix nearest to W, the singular values shared evenly between them.

    Args:
        W: the weight, (out, in).
        r: the rank, at most min(out, in).
        s: the scale that the product will get.
        niter: for a randomised decomposition with so many power iterations: quicker on large weights, and not exact.

    Returns:
        A₀ (r, in) and B₀ (out, r).

    Source: Meng et al. 2024, section 3. Built in lesson 16.
    """
    if niter is None:
        U, S, Vh = truncated_svd(W, r)
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=niter)
        Vh = V.T
    root = (S / s).sqrt()
    return root[:, None] * Vh, U * root


def start_of(name: str, config: LoraConfig, context: InjectionContext) -> Start:
    """The start that ``init_lora_weights`` asks for: exact, or with a number of iterations.

    Raises:
        ValueError: if what follows ``"pissa"`` is no number of iterations.
    """
    word = str(config.init_lora_weights)
    if word == "pissa":
        return pissa_start
    number = word.removeprefix(PREFIX)
    if number == word or not number.isdecimal():
        raise ValueError(
            f"init_lora_weights={word!r}: expected 'pissa', or 'pissa_niter_4' with any whole number of iterations"
        )
    return partial(pissa_start, niter=int(number))


def _applies(config: Any) -> bool:
    return str(config.init_lora_weights).startswith("pissa") and not config.use_dora


register("PiSSA", LoraConfig, shifted_builders(start_of), applies=_applies, file_fields=as_plain_lora)

register_entrant(
    "pissa-r8",
    method="PiSSA",
    config=lambda place: LoraConfig(r=8, lora_alpha=16, target_modules=place.targets, init_lora_weights="pissa"),
    rates={
        "tiny": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "smollm2-135m": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
        "minilm": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    },
    card=__doc__,
)
