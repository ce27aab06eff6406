"""LoTR: layers of one shape share A and B, and each trains a small core between them. A card in the book.

PEFT has no such method; the name in our files is ``LOTR``. Source: Bershatsky et al. 2024
(https://arxiv.org/abs/2402.01376), and the authors' code (https://github.com/daskol/lotr). Lesson 17 counts it.

Idea: Put the updates of all layers of one shape into a stack, a tensor with three sides, and give it a low rank
(Tucker's, on two of them): what the layers read and write is shared, and only how it is mixed is each layer's own.
Formula: y = W x + s · B (G (A x)), with A (r, in) and B (out, r) shared, a core G (r, r) for each layer, s = alpha / r
Cost: r · (in + out) numbers for each shape, and r² for each layer: in a deep model far fewer than LoRA's of this rank.
Each pass computes one more small product than LoRA's.
Merging: exact up to one rounding: W + s · B G A is a plain weight, of another rank-r update in each layer.
Papers: [Bershatsky et al. 2024](https://arxiv.org/abs/2402.01376) report that it needs fewer trained numbers than LoRA,
above all in deep models. [Marmoret et al. 2025](https://arxiv.org/abs/2509.19391) compare ways to
stack updates, and find that the choice matters and that some do better than LoRA with similar numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, Pair, at_least_float32, innermost
from lora_edu.core.config import AdapterConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.layer import Factors, check_alpha, check_rank
from lora_edu.core.methods import InjectionContext, register
from lora_edu.variants.vera import shape_of

Shape = tuple[int, int]  # (out, in)


class SharedFactors(nn.Module):
    """A (r, in) and B (out, r) of all layers of one shape, which train. Every such layer holds this one module."""

    def __init__(self, lotr_A: Tensor, lotr_B: Tensor):
        super().__init__()
        self.lotr_A = nn.Parameter(lotr_A)
        self.lotr_B = nn.Parameter(lotr_B)


class LotrLayer(AdapterLayer):
    """A frozen layer plus a core between two shared factors: y = x Wᵀ + b + s · ((x Aᵀ) Gᵀ) Bᵀ.

    Args:
        base: the layer to adapt; its weight (out, in) and bias are frozen.
        shared: the factors of all layers of this shape.
        alpha: the update is scaled by s = alpha / r.
        init_weights: start with a core of zeros, and so at the base model; otherwise at random, for tests.

    Shapes:
        x: (..., in) → (..., out). ``lotr_G``: (r, r). ``shared.lotr_A``: (r, in). ``shared.lotr_B``: (out, r).

    Source: Bershatsky et al. 2024. Card in the book.
    """

    additive = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self.update(x)).to(y.dtype) if self.applies_in_forward() else y

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the output for x, in the adapter's precision: s · ((x Aᵀ) Gᵀ) Bᵀ."""
        A, B = self.shared_factors()
        h = F.linear(F.linear(x.to(A.dtype), A), self.lotr_G)  # (..., in) → (..., r) → (..., r)
        return F.linear(h, B) * self.scaling  # → (..., out)

    def delta_weight(self) -> Tensor:
        """ΔW = s · B G A, shape (out, in), at least float32."""
        A, B, G = map(at_least_float32, (*self.shared_factors(), self.lotr_G))
        return self.scaling * (B @ G @ A)

    def shared_factors(self) -> tuple[Tensor, Tensor]:
        """A and B where this layer's core is."""
        return self.shared.lotr_A.to(self.lotr_G), self.shared.lotr_B.to(self.lotr_G)

    def __init__(
        self, base: nn.Module, shared: SharedFactors, alpha: float = 1, init_weights: bool = True, **settings: Any
    ):
        super().__init__(base, **settings)
        self.in_features, self.out_features = self.features()
        self.shared = shared.to(self.weight.device, self.adapter_dtype)
        self.r = len(shared.lotr_A)
        self.scaling = alpha / self.r
        # 32 layers of 4096 → 4096 at r=32: 32 cores of 1,024 numbers and one pair of 262,144, not 32 pairs.
        self.lotr_G = self.new_parameter(self.r, self.r)
        if not init_weights:
            nn.init.normal_(self.lotr_G)

    def factors(self) -> Factors:
        """The layer as base(x) + s · B (A' x), with the core in A' = G A."""
        A, B = self.shared_factors()
        return self.lotr_G @ A, B, self.scaling, 0.0

    def adapted(self, weight: Tensor, bias: Tensor | None) -> Pair:
        return weight + self.oriented(self.delta_weight()), bias

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.lotr_G, self.shared.lotr_A, self.shared.lotr_B]

    def to_file(self) -> dict[str, Tensor]:
        return {"lotr_G": self.lotr_G}

    def reconfigure(self, config: Any, name: str) -> None:
        """Take over the scale: a file with another alpha needs another one."""
        self.scaling = config.alpha / self.r

    def extra_repr(self) -> str:
        return f"adapter_name={self.adapter_name!r}, r={self.r}, merged={self.merged}"


@dataclass
class LotrConfig(AdapterConfig):
    """Settings of LoTR. What PEFT's methods have in common is called as there.

    Args:
        r: rows of A and columns of B, and the size of every core.
        alpha: updates are scaled by alpha / r. The factors start larger than LoRA's A, so that 1 is a usual value.
        target_modules: as in ``LoraConfig``.
        bias: which biases train: ``"none"``, ``"all"``, or ``"lotr_only"`` (those of adapted layers).
        init_weights: start at the base model.

    Raises:
        ValueError: for a rank below 1 or not whole, or an alpha that is not finite.
    """

    peft_type: ClassVar[str] = "LOTR"

    r: int = 8
    alpha: float = 1
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.r = check_rank(self.r)
        check_alpha(self.alpha)

    def shared_to_file(self, context: InjectionContext) -> dict[str, Tensor]:
        shared: dict[Shape, SharedFactors] = context.shared["lotr"]
        pairs = {shape: (factors.lotr_A, factors.lotr_B) for shape, factors in shared.items()}
        return {key: tensor for shape in pairs for key, tensor in zip(keys_of(shape), pairs[shape], strict=True)}

    def shared_from_file(self, tensors: Mapping[str, Tensor], context: InjectionContext) -> None:
        shared = context.shared.setdefault("lotr", {})
        for shape in map(shape_of, self.targets.values()):
            A, B = (tensors[key] for key in keys_of(shape))
            if A.shape != (self.r, shape[1]) or B.shape != (shape[0], self.r):
                raise ValueError(
                    f"the shared factors of layers {shape[1]} → {shape[0]} have the shapes {tuple(A.shape)} and "
                    f"{tuple(B.shape)}, expected {(self.r, shape[1])} and {(shape[0], self.r)} for r={self.r}"
                )
            shared.setdefault(shape, SharedFactors(A, B))


def keys_of(shape: Shape) -> tuple[str, str]:
    """The keys of A and B in a file, for the layers of one shape."""
    return f"base_model.lotr_A.{shape[0]}x{shape[1]}", f"base_model.lotr_B.{shape[0]}x{shape[1]}"


def build(base: nn.Module, name: str, config: LotrConfig, context: InjectionContext) -> AdapterLayer:
    """The adapted layer for the module called ``name``; the first one of a shape starts what all of it share."""
    shared: dict[Shape, SharedFactors] = context.shared.setdefault("lotr", {})
    outside, inside = shape = shape_of(innermost(base))
    if shape not in shared:
        shared[shape] = SharedFactors(torch.randn(config.r, inside), torch.randn(outside, config.r))
    return LotrLayer(base, shared[shape], config.alpha, config.init_weights, **context.settings)


register("LoTR", LotrConfig, {nn.Linear: build, Conv1D: build})

register_entrant(
    "lotr-r32",
    method="LoTR",
    config=lambda place: LotrConfig(r=32, target_modules=place.targets),
    rates=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
    card=__doc__,
)
