"""GoRA's start: ranks by weight times gradient, and the first step of gradient descent taken. Card in the book.

Idea: Before training, the gradients of the full weights are averaged over a few batches. Layers in which weight times
gradient is large get more ranks. A starts at random as in LoRA, and B so that s · B A is as much of a step against the
gradient as a product with this A can be: training starts with one step of gradient descent behind it.
Formula: B₀ = −(γ √(in / r) / s) · G A⁺, with A⁺ = Aᵀ (A Aᵀ)⁻¹, so that s · B₀ A = −γ √(in / r) · G A⁺ A; layer i gets
rᵢ = round(aᵢ · Σⱼ r √(inⱼ + outⱼ) / √(inᵢ + outᵢ)) ranks, where aᵢ is its part of the sum of all mean abs(W ⊙ G)
Cost: a few forward and backward passes through the full weights before training, and memory for the gradients of some
layers at a time. Then it is LoRA, with about as many numbers: fewer where ``r_max`` cuts what a layer would get, more
where ``r_min`` adds to it.
Merging: as LoRA's: W + s · B A.
Papers: [He et al. 2025](https://arxiv.org/abs/2502.12171) report 5.13 points more than LoRA on GSM8K with Llama-3.1-8B,
and at high ranks more than full fine-tuning. [He et al. 2026](https://arxiv.org/abs/2601.22708), some of the same
authors, compare LoRA's variants in one code base and find that LoRA with proper settings, the learning rate above all,
does as well as most of them or better.

Switched on by ``GoraConfig(...)`` and ``inject(..., batches=[...])``. PEFT does not have it; its file is a plain LoRA
with ``rank_pattern``, which PEFT reads. As in the paper the base is left alone and nothing is subtracted: the adapted
model starts at W + s · B₀ A, away from the base, and with the adapter disabled it is the base. √(in / r) makes up for
what A⁺ A, a projection on r of in directions, takes away of a gradient without a preferred direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import at_least_float32
from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.layer import LoRAConv1D, LoRALinear, check_rank, scale_of
from lora_edu.core.methods import register
from lora_edu.variants.from_data import Batch, exactly, features, started_builder, weight_gradients


@dataclass
class GoraConfig(LoraConfig):
    """Settings of GoRA's start, besides LoRA's. Its file is LoRA's.

    Args:
        r: the rank that every layer would have if all mattered alike: it sets the budget.
        use_rslora: scale by lora_alpha / √r, here by default, as in the paper.
        gamma: γ, the length of the step that the adapter starts with, as a learning rate of gradient descent.
        r_min, r_max: bounds for a layer's rank; None means r / 2, rounded up, and 4 · r.

    Raises:
        ValueError: if gamma is not above zero, or the bounds do not enclose r, or it is switched on together with
            ``rank_pattern``, another start or DoRA.

    Source: He et al. 2025. Card in the book.
    """

    use_rslora: bool = True
    gamma: float = 0.05
    r_min: int | None = None
    r_max: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma={self.gamma}: expected a step length above 0, for example 0.05")
        if self.use_dora or self.init_lora_weights is not True:
            raise ValueError(
                "GoRA is a start of its own, of plain LoRA: leave init_lora_weights and use_dora as they are"
            )
        lowest, highest = self.bounds()
        if not lowest <= self.r <= highest:
            raise ValueError(f"r_min={lowest} and r_max={highest}: expected r_min ≤ r={self.r} ≤ r_max")

    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest rank of a layer."""
        lowest = -(-self.r // 2) if self.r_min is None else check_rank(self.r_min)
        return lowest, 4 * self.r if self.r_max is None else check_rank(self.r_max)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
        """{layer: (A, B)} to start from; ``rank_pattern`` becomes the ranks that the gradients ask for.

        Raises:
            ValueError: if the batches do not do, see ``weight_gradients``, or every gradient is zero, or the scale is.
        """
        if self.rank_pattern:
            raise ValueError(f"rank_pattern={self.rank_pattern}: GoRA finds the ranks itself; leave it out")
        importance: dict[str, float] = {}
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, gradient in weight_gradients(model, self.targets, batches):
            importance[name] = importance_of(self.targets[name], gradient)
            # Its rank is known when all layers are seen. Until then A has all the rows that it could need; fewer are
            # the first of them, and so are the columns of G Aᵀ.
            A = torch.empty(self.most(name), gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            seen[name] = A, gradient @ A.T
        ranks = self.ranks(importance)
        starts = {}
        for name, rank in ranks.items():
            A, products = seen[name]
            scaling = scale_of(self.alpha_of(name), rank, self.use_rslora)
            if scaling == 0:
                raise ValueError("lora_alpha=0: no B makes a step at scale 0; choose another lora_alpha")
            starts[name] = A[:rank], first_step(A[:rank], products[:, :rank], self.gamma, scaling)
        self.rank_pattern = {exactly(name): rank for name, rank in ranks.items() if rank != self.r}
        return starts

    def most(self, name: str) -> int:
        """The largest rank that this layer can get."""
        return min(self.bounds()[1], *features(self.targets[name]))

    def ranks(self, importance: Mapping[str, float]) -> dict[str, int]:
        """The ranks, by each layer's part of all importance."""
        if not (total := math.fsum(importance.values())):
            raise ValueError("every gradient is zero: GoRA cannot tell which layers matter; pass batches with a loss")
        widths = {name: math.sqrt(sum(features(self.targets[name]))) for name in importance}
        budget = self.r * sum(widths.values())
        lowest = self.bounds()[0]
        return {
            name: min(max(round(budget * each / total / widths[name]), lowest), self.most(name))
            for name, each in importance.items()
        }

    def to_file(self) -> dict[str, Any]:
        fields = super().to_file()
        return {name: value for name, value in fields.items() if name not in ("gamma", "r_min", "r_max")}


def importance_of(layer: Any, gradient: Tensor) -> float:
    """mean abs(W ⊙ G): to first order, how much the loss depends on changes in proportion to the weights.

    Source: He et al. 2025, equation 5.
    """
    gradient = gradient.T if isinstance(layer, Conv1D) else gradient
    return (at_least_float32(layer.weight.detach()) * gradient).abs().mean().item()


def first_step(A: Tensor, products: Tensor, gamma: float, scaling: float) -> Tensor:
    """B₀ = −(γ √(in / r) / s) · G Aᵀ (A Aᵀ)⁻¹, from A (r, in) and G Aᵀ (out, r).

    Of all B it is the one whose product with A is nearest to −γ √(in / r) / s · G.

    Source: He et al. 2025, equations 9 and 10.
    """
    r, inside = A.shape
    step = torch.linalg.solve(A @ A.T, products, left=False)  # X with X (A Aᵀ) = G Aᵀ
    return -(gamma * math.sqrt(inside / r) / scaling) * step


register("GoRA", GoraConfig, {layer.kind: started_builder(layer) for layer in (LoRALinear, LoRAConv1D)})

register_entrant(
    "gora-r8",
    method="GoRA",
    config=lambda place: GoraConfig(r=8, lora_alpha=16, target_modules=place.targets),
    rates={
        "tiny": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "smollm2-135m": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
        "minilm": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    },
    card=__doc__,
)
