"""VeRA: two random matrices for all layers, and two trained vectors in each. Built in lesson 17.

PEFT's name: ``VERA``. Source: Kopiczko et al. 2023 (https://arxiv.org/abs/2310.11454), equation 2.

Idea: LoRA's A and B need not train. One random pair serves every layer; each layer trains a scale for each of the r
inner directions, and one for each of its outputs.
Formula: y = W x + λ_b ⊙ B (λ_d ⊙ (A x)), with A (r, in) and B (out, r) random, frozen and cut from one shared pair
Cost: r + out numbers train in each adapted layer, few enough that r may be 256. The two products of that width are
computed all the same, so a step takes no less time than LoRA's of a small rank. The random pair is in the file, or only
its seed.
Merging: exact up to one rounding: W + diag(λ_b) B diag(λ_d) A is a plain weight.
Papers: [Kopiczko et al. 2023](https://arxiv.org/abs/2310.11454) report LoRA's quality on GLUE and E2E with about a
tenth of its numbers. [Bałazy et al. 2024](https://arxiv.org/abs/2405.17604) (LoRA-XS) train an r × r matrix between two
frozen ones instead, and report to match or beat LoRA and VeRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, Pair, at_least_float32, innermost
from lora_edu.core.config import AdapterConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.layer import Factors, check_rank
from lora_edu.core.matching import expand_targets
from lora_edu.core.methods import InjectionContext, register

KEYS = ("base_model.vera_A", "base_model.vera_B")  # in the file, once for the whole model


class Projections(nn.Module):
    """The random A (r, widest in) and B (widest out, r), which never train.

    One module, which every layer of an adapter holds: so the pair moves with the model and stays one.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, vera_A: Tensor, vera_B: Tensor):
        super().__init__()
        self.register_buffer("vera_A", vera_A)
        self.register_buffer("vera_B", vera_B)


def drawn_projections(r: int, inside: int, outside: int, seed: int) -> Projections:
    """A and B from their seed, number for number as PEFT draws them: A first, uniform within ±√(6 / columns).

    They are drawn on the CPU and in float32, whatever the model is in, so that a seed means the same everywhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))  # Kaiming's, in PEFT's order: equal to the last bit
        return torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)

    return Projections(uniform(r, inside), uniform(outside, r))


class VeraLayer(AdapterLayer):
    """A frozen layer plus a random update that two vectors scale: y = x Wᵀ + b + λ_b ⊙ ((λ_d ⊙ (dropout(x) Aᵀ)) Bᵀ).

    Args:
        base: the layer to adapt; its weight (out, in) and bias are frozen.
        projections: the shared pair; this layer uses the first ``in`` columns of A and the first ``out`` rows of B.
        vera_dropout: probability of zeroing an entry of x on its way into A, in training only.
        d_initial: what λ_d starts at. λ_b starts at zero, and so the layer at the base model.
        init_weights: False: λ_d normal and λ_b ones, so that the layer starts away from the base; for tests.

    Shapes:
        x: (..., in) → (..., out). ``vera_lambda_d``: (r,). ``vera_lambda_b``: (out,).

    Raises:
        ValueError: if the pair is too small for this layer.

    Source: Kopiczko et al. 2023, eq. 2. Built in lesson 17.
    """

    additive = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self.update(x)).to(y.dtype) if self.applies_in_forward() else y

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the output for x, in the adapter's precision."""
        A, B = self.slices()
        h = F.linear(self.dropout(x.to(A.dtype)), A) * self.vera_lambda_d  # (..., in) → (..., r)
        return F.linear(h, B) * self.vera_lambda_b  # → (..., out)

    def delta_weight(self) -> Tensor:
        """ΔW = diag(λ_b) B · diag(λ_d) A, shape (out, in), at least float32."""
        A, B, _, _ = self.factors()
        return at_least_float32(B) @ at_least_float32(A)

    def slices(self) -> tuple[Tensor, Tensor]:
        """This layer's part of the shared pair, where its vectors are: A (r, in) and B (out, r)."""
        A, B = self.projections.vera_A[:, : self.in_features], self.projections.vera_B[: self.out_features]
        return A.to(self.vera_lambda_d), B.to(self.vera_lambda_b)

    def __init__(
        self,
        base: nn.Module,
        projections: Projections,
        vera_dropout: float = 0.0,
        d_initial: float = 0.1,
        init_weights: bool = True,
        **settings: Any,
    ):
        super().__init__(base, **settings)
        self.in_features, self.out_features = self.features()
        (self.r, inside), (outside, _) = projections.vera_A.shape, projections.vera_B.shape
        if inside < self.in_features or outside < self.out_features:
            raise ValueError(
                f"the shared matrices are for layers of at most {inside} → {outside}, and this one is "
                f"{self.in_features} → {self.out_features}: they were made for another model or other target_modules"
            )
        self.projections = projections.to(self.weight.device, self.adapter_dtype)
        self.dropout = nn.Dropout(vera_dropout) if vera_dropout > 0 else nn.Identity()
        # 4096 → 4096 at r=256: 4,352 numbers train, where LoRA of rank 8 trains 65,536.
        self.vera_lambda_d = self.new_parameter(self.r)
        self.vera_lambda_b = self.new_parameter(self.out_features)
        if init_weights:
            nn.init.constant_(self.vera_lambda_d, d_initial)
        else:
            nn.init.normal_(self.vera_lambda_d)
            nn.init.ones_(self.vera_lambda_b)
        self.train(base.training)

    def factors(self) -> Factors:
        """The layer as base(x) + B' (A' · drop(x)), with the vectors in A' = diag(λ_d) A and B' = diag(λ_b) B."""
        A, B = self.slices()
        dropout_p = self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0
        return self.vera_lambda_d[:, None] * A, self.vera_lambda_b[:, None] * B, 1.0, dropout_p

    def adapted(self, weight: Tensor, bias: Tensor | None) -> Pair:
        return weight + self.oriented(self.delta_weight()), bias

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.vera_lambda_b, self.vera_lambda_d]

    def to_file(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}

    def extra_repr(self) -> str:
        return f"adapter_name={self.adapter_name!r}, r={self.r}, merged={self.merged}"


@dataclass
class VeraConfig(AdapterConfig):
    """Settings of VeRA. Names, defaults and meaning are PEFT's.

    Args:
        r: rows of A and columns of B: more than for LoRA, as each costs one number in a layer.
        target_modules: as in ``LoraConfig``.
        projection_prng_key: the seed of A and B.
        save_projection: write A and B into the file. Otherwise whoever loads it draws them from the seed, and needs a
            PyTorch that draws as this one does.
        vera_dropout: probability of dropping an input entry on its way into A, in training.
        d_initial: what λ_d starts at.
        bias: which biases train: ``"none"``, ``"all"``, or ``"vera_only"`` (those of adapted layers).
        init_weights: start at the base model.

    Raises:
        ValueError: for a rank below 1 or not whole, a seed that is not whole, a dropout outside [0, 1], a d_initial
            that is not finite.
    """

    peft_type: ClassVar[str] = "VERA"
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.r = check_rank(self.r)
        if isinstance(self.projection_prng_key, bool) or not isinstance(self.projection_prng_key, Integral):
            raise ValueError(
                f"projection_prng_key={self.projection_prng_key!r}: expected a whole number, for example 0"
            )
        if not isinstance(self.vera_dropout, int | float) or not 0 <= self.vera_dropout <= 1:
            raise ValueError(f"vera_dropout={self.vera_dropout!r}: expected a probability between 0 and 1")
        if not isinstance(self.d_initial, Real) or not math.isfinite(self.d_initial):
            raise ValueError(f"d_initial={self.d_initial!r}: expected a finite number, for example 0.1")

    def default_targets(self, model: nn.Module, modules: dict[str, nn.Module]) -> Sequence[str]:
        return without_phis_feedforward(model, expand_targets(None, model, modules))

    def shared_to_file(self, context: InjectionContext) -> dict[str, Tensor]:
        if not self.save_projection:
            return {}
        projections = context.shared["vera"]
        return dict(zip(KEYS, (projections.vera_A, projections.vera_B), strict=True))

    def shared_from_file(self, tensors: Mapping[str, Tensor], context: InjectionContext) -> None:
        if self.save_projection:
            A, B = (tensors[key] for key in KEYS)
            if A.dim() != 2 or B.dim() != 2 or not len(A) == B.shape[1] == self.r:
                raise ValueError(
                    f"vera_A has shape {tuple(A.shape)} and vera_B {tuple(B.shape)}, expected ({self.r}, …) and "
                    f"(…, {self.r}): this file's matrices do not belong to its r={self.r}"
                )
            context.shared["vera"] = Projections(A, B)


def without_phis_feedforward(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """PEFT's defaults for VeRA and SHiRA: those of LoRA, but of Phi only query and value."""
    phi = getattr(getattr(model, "config", None), "model_type", None) == "phi"
    return [target for target in targets if not (phi and target in ("fc1", "fc2"))]


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer's weight, however it is stored."""
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def build(base: nn.Module, name: str, config: VeraConfig, context: InjectionContext) -> AdapterLayer:
    """The adapted layer for the module called ``name``; the first one draws the pair that all of them share."""
    if "vera" not in context.shared:
        outside, inside = (max(sizes) for sizes in zip(*map(shape_of, config.targets.values()), strict=True))
        projections = drawn_projections(config.r, inside, outside, config.projection_prng_key)
        if (dtype := innermost(base).weight.dtype) in (torch.float16, torch.bfloat16):
            projections.to(dtype)  # PEFT rounds the pair to the base's precision, whatever it then keeps it in
        context.shared["vera"] = projections
    return VeraLayer(
        base,
        context.shared["vera"],
        vera_dropout=config.vera_dropout,
        d_initial=config.d_initial,
        init_weights=config.init_weights,
        **context.settings,
    )


register("VeRA", VeraConfig, {nn.Linear: build, Conv1D: build})

register_entrant(
    "vera-r256",
    method="VeRA",
    config=lambda place: VeraConfig(r=256, target_modules=place.targets),
    rates=(2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1),
    card=__doc__,
)
